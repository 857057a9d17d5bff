"""The runs of the CIFAR tables: what they are, how they are run and resumed, what is taken from them and made of it."""
import ast
import json
import os
import re
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from scripts import cifar_runs as runs
from scripts.cifar_fit import fit
from scripts.paper import cifar_tables as tables
from scripts.paper import int8_groups
from scripts.paper import converted, quiet_branches, tied_affine  # noqa: F401 (they register networks)
from scripts.report import RESULTS, read_block, read_rows
from timm_finet import FBNConv2d, launch

ROOT = Path(__file__).parents[1]

FAKE = '''
import os, sys, time
from pathlib import Path
args = dict(zip(sys.argv[1:], sys.argv[2:]))
home = Path(args['--output'], args['--experiment'])
first = 0
if '--resume' in args:
    first = int(Path(args['--resume']).read_text()) + 1
epochs = 4
home.joinpath('args.yaml').write_text(
    f'{{epochs: {epochs}, batch_size: 100, amp: true, amp_dtype: bfloat16, torchcompile: null}}')
with home.joinpath('summary.csv').open('a') as file:
    print('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr', file=file)
    for epoch in range(first, epochs):
        print(f'Train: {epoch} [   0/5 (  0%)]  Loss: 2.3 (2.3)  Time: 1.000s,  100.00/s  (1.000s,  100.00/s)  LR: 0.1')
        print(f'Train: {epoch} [   4/5 (100%)]  Loss: 2.3 (2.3)  Time: 0.400s,  250.00/s  (0.500s,  200.00/s)  LR: 0.1')
        print(f'{epoch},2,2,{[10, 30, 25.5, 20][epoch]},50,0.1', file=file, flush=True)
        home.joinpath('last.pth.tar').write_text(str(epoch))
        if epoch == 1 and 'CUT' in os.environ and '--resume' not in args:
            if os.environ['CUT'] == 'sleep':
                time.sleep(60)
            raise SystemExit(3)
print('facts: {"peak_mb": null, "device": "none", "torch": "1", "timm": "2"}')
'''


def options(tmp_path, **changes):
    return Namespace(**{**dict(
        data_dir='DATA', output=str(tmp_path / 'out'), results=tmp_path / 'cifar.csv', jobs=2, minutes=1, commit='abc',
        extra=[]), **changes})


@pytest.fixture
def fake_train(tmp_path, monkeypatch):
    """In the place of `python -m timm_finet run train`: it writes what that would."""
    (tmp_path / 'train.py').write_text(FAKE)
    real = runs.command

    def command(run, args):
        line = real(run, args)
        assert line[:5] == [sys.executable, '-m', 'timm_finet', 'run', 'train']
        return [sys.executable, str(tmp_path / 'train.py'), *line[5:]]
    monkeypatch.setattr(runs, 'command', command)


RUNS = [(runs.short('finet_small_g8', runs.SMALL), seed) for seed in (0, 1)]


def planned(*protocols):
    return runs.missing(protocols, [], [], [])


def test_runs_of_the_paper_are_the_rows_of_its_tables():
    for dataset in ('cifar10', 'cifar100'):
        found = tables.tables_of([dataset])
        for title, figures in tables.PAPER[dataset].items():
            assert figures.keys() <= found[dataset, title].keys()
        assert len(set(planned(dataset))) == len(planned(dataset)) == 41
        first = [str(setting) for setting, _ in planned(dataset)[:2]]
        assert first == [f'{dataset} finet_large', f'{dataset} finet_large_g8']
        seeds = [seed for setting, seed in planned(dataset) if setting.model == 'finet_large_g8' and not setting.kwargs
                 and setting.recipe == dataset]
        assert seeds == [0, 1, 2]
    assert tables.PAPER['cifar100']['finet_large']['G = 8'] == 77.202
    assert tables.PAPER['cifar10']['finet_large']['C/G = 50'] == 93.606


def test_placement_compares_three_places_with_two_seeds_and_takes_a_third():
    assert [(setting.kwargs, seed) for setting, seed in planned('placement')] == [
        ((f'act_place={place}',), seed) for place in ('depthwise', 'pointwise', 'output') for seed in (0, 1)]
    (run,) = runs.missing(['placement'], ['output'], [2], [])
    assert run[1] == 2 and run[0].kwargs == ('act_place=output',) and run[0].options[:2] == ('--epochs', '10')


def test_evidence_compares_networks_of_equal_widths_under_one_protocol():
    found = tables.tables_of(['evidence'])
    widths = {key: {tuple(convs(build(setting))) for setting in rows.values()} for key, rows in found.items()}
    assert all(len(networks) == 1 for networks in widths.values()), widths
    assert {setting.recipe for rows in found.values() for setting in rows.values()} == {'cifar_short'}
    assert [*found['cifar100', 'finet_small']] == ['G = 1', 'G = 2', 'G = 4', 'G = 8', 'G = 8, tied affine']
    lines = [setting.args(0) for rows in found.values() for setting in rows.values()]
    assert sorted({line[line.index('--lr') + 1] for line in lines}) == ['0.05', '0.1']


def test_the_long_protocol_compares_networks_of_equal_widths_by_ten_seeds():
    found = tables.tables_of(['long'])
    for rows in found.values():
        assert len({tuple(convs(build(setting))) for setting in rows.values()}) == 1
        assert {setting.recipe for setting in rows.values()} == {'cifar_long'}
    assert [*found['cifar100', 'finet_small']] == [
        'G = 1', 'G = 2', 'G = 4', 'G = 8', 'G = 8, gamma from 1/sqrt(G)', 'G = 8, tied affine']
    runs = planned('long')
    assert [(str(setting).split()[2], seed) for setting, seed in runs[:5]] == [('finet_small', s) for s in range(5)]
    for name in ('finet_small', 'finet_small_g8'):
        plain = found['cifar100', 'finet_small']['G = 1' if name == 'finet_small' else 'G = 8']
        assert sorted(seed for setting, seed in runs if setting == plain) == [*range(10)]
    assert all(setting.args(0).count(f'torch/{part}') == 1 for part, dataset in (
        ('cifar100_first100', 'cifar100'), ('cifar10_first1000', 'cifar10'))
        for (name, _), rows in found.items() if name == dataset for setting in rows.values())


@pytest.mark.parametrize('title', ['G = 1', 'G = 8, gamma from 1/sqrt(G)', 'G = 8, tied affine', 'MobileNetV2'])
def test_fit_is_measured_on_the_training_images_of_every_kind_of_network(title, tmp_path):
    found = tables.tables_of(['long'])
    setting = found['cifar100', 'finet_small'].get(title)
    setting = setting or found['cifar100', 'mobilenetv2_035 through convert_fbn']['G = 8']
    kwargs = {k: ast.literal_eval(v) for k, v in (arg.split('=') for arg in setting.kwargs)} | dict(small_input=True)
    torch.manual_seed(0)
    model = timm.create_model(setting.model, num_classes=100, **kwargs).eval()
    args = options(tmp_path, data_dir=str(tmp_path))
    home = runs.folder(args.output, (setting, 0))
    home.mkdir(parents=True)
    mean, std = [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]
    trained_with = Namespace(
        model=setting.model, num_classes=100, model_kwargs=kwargs, dataset='torch/cifar100_first100', mean=mean,
        std=std, input_size=[3, 32, 32], crop_pct=1.0, interpolation='bilinear', in_chans=None, gp=None, bn_eps=None)
    torch.save(dict(state_dict=model.state_dict(), args=trained_with), home / 'last.pth.tar')
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std).view(3, 1, 1)
    with torch.no_grad():
        logits = model(x)
    labels = logits.argmax(1)
    labels[:2] = (labels[:2] + 1) % 100
    np.savez(tmp_path / 'cifar100.npz', train=images, train_labels=labels, test=images[:1], test_labels=labels[:1])
    found = fit((setting, 0), args)
    assert found['fit_top1'] == 75
    assert found['fit_loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=2e-3)


def test_quiet_branches_start_their_gammas_at_one_over_the_root_of_g():
    layer = next(m for m in timm.create_model('finet_small_g8_quiet').modules() if isinstance(m, FBNConv2d))
    torch.testing.assert_close(layer.bn.weight.detach(), torch.full((layer.bn.num_features,), 8 ** -0.5))


def build(setting):
    kwargs = {k: ast.literal_eval(v) for k, v in (arg.split('=') for arg in setting.kwargs if 'act_place' not in arg)}
    kwargs |= dict(arg.split('=') for arg in setting.kwargs if 'act_place' in arg)
    return timm.create_model(
        setting.model, num_classes=int(setting.dataset[5:]), small_input=True, device='meta', **kwargs)


def convs(model):
    return [m.weight.shape for m in model.modules() if isinstance(m, (torch.nn.Conv2d, FBNConv2d))]


def test_every_setting_builds_its_network():
    for setting in {setting for setting, _ in planned(*runs.PROTOCOLS)}:
        groups = {m.fbn_groups for m in build(setting).modules() if isinstance(m, FBNConv2d)}
        size = next((int(arg.split('=')[1]) for arg in setting.kwargs if 'group_size' in arg), None)
        named = re.search(r'_g(\d)|fbn_groups=(\d)', str(setting))
        expected = {int(named[1] or named[2])} if named else {2 if 'resnet' in setting.model else 1}
        if size:
            expected = {max(1, c // size) for c in (24, 100, 200, 400)}
        assert groups == expected, setting


def test_tied_groups_share_one_gamma_and_one_beta():
    layer = next(m for m in timm.create_model('finet_small_g8_tied').modules() if isinstance(m, FBNConv2d))
    layer(torch.randn(2, 24, 8, 8)).square().sum().backward()
    names = dict(layer.bn.named_parameters())
    assert {len(p) for p in names.values()} == {layer.out_channels} and all(p.grad is not None for p in names.values())
    with torch.no_grad():
        names['parametrizations.weight.original'].copy_(torch.arange(layer.out_channels))
    assert torch.equal(layer.bn.weight, torch.arange(layer.out_channels).float().repeat(8))


@pytest.mark.scripts
@pytest.mark.skipif('"scripts" not in config.getoption("-m")', reason="needs timm's own train.py: pytest -m scripts")
def test_train_py_reads_the_commands_as_meant(monkeypatch):
    parse = runpy.run_path(launch.find_script('train'))['_parse_args']
    for run in planned(*runs.PROTOCOLS):
        line = runs.command(run, options(Path('out')))
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(launch.find_recipe, line[5:])])
        args, _ = parse()
        setting, seed = run
        classes = int(setting.dataset[5:])
        assert (args.model, args.seed, args.num_classes) == (setting.model, seed, classes)
        parts = {'cifar10': '_first1000', 'cifar100': '_first100'}
        assert args.dataset.removeprefix(f'torch/{setting.dataset}') == (
            parts[setting.dataset] if setting.recipe == 'cifar_long' else '_pad2')
        assert args.mean[0] == (0.4914 if classes == 10 else 0.5071)
        epochs = {'modern': 300, 'cifar_short': 15, 'cifar_long': 50}.get(setting.recipe, 200)
        if '--epochs' in setting.options:
            epochs = int(setting.options[setting.options.index('--epochs') + 1])
        assert (args.epochs, args.batch_size) == (epochs, 64 if setting.recipe == 'resnet_cifar' else 128)
        assert args.model_kwargs.pop('small_input') is True and args.channels_last
        assert [f'{k}={v}'.replace(' ', '') for k, v in args.model_kwargs.items()] == list(setting.kwargs)
        assert args.device_modules == ['timm_finet', 'scripts.train_facts', *filter(None, [setting.module])]
        assert args.experiment == runs.folder('', run).name


def test_a_finished_run_becomes_a_line_and_is_not_repeated(fake_train, tmp_path):
    args = options(tmp_path)
    assert runs.train(RUNS, args) == []
    first, second = sorted(read_rows(args.results), key=lambda row: row['seed'])
    assert (first['seed'], second['seed']) == ('0', '1')
    measured = {key: first[key] for key in (
        'setting', 'epochs', 'top1_last', 'top1_best', 'best_epoch', 'seconds_an_epoch', 'peak_mb', 'jobs', 'sessions',
        'precision', 'compiled', 'commit', 'timm')}
    assert measured == dict(
        setting='cifar100 cifar_short finet_small_g8 channels=(32,64,120) --lr 0.1', epochs='4', top1_last='20.0',
        top1_best='30.0', best_epoch='2', seconds_an_epoch='2.5', peak_mb='', jobs='2', sessions='1',
        precision='bfloat16', compiled='False', commit='abc', timm='2')
    assert first['command'] == (
        "timm-finet run train --config recipe:cifar_short --model finet_small_g8 --model-kwargs small_input=True "
        "'channels=(32,64,120)' --dataset torch/cifar100_pad2 --num-classes 100 --mean 0.5071 0.4865 0.4409 "
        "--std 0.2673 0.2564 0.2762 --channels-last --lr 0.1 --seed 0 --data-dir DATA")
    assert 0 <= int(first['seconds']) < 60 and str(tmp_path) not in ''.join(first.values())
    curve = read_rows(tmp_path / 'cifar' / f'{runs.folder("", RUNS[0]).name}.csv')
    assert [row['eval_top1'] for row in curve] == ['10', '30', '25.5', '20']
    assert not set(RUNS) & set(runs.missing(['evidence'], [], [], read_rows(args.results)))
    args.results.unlink()  # finished, but not recorded: nothing is trained again
    assert runs.train(RUNS, args) == []
    assert [row['sessions'] for row in read_rows(args.results)] == ['1', '1']


def test_a_failed_run_is_told_and_goes_on_from_its_checkpoint(fake_train, tmp_path, monkeypatch, capsys):
    args = options(tmp_path)
    monkeypatch.setenv('CUT', 'yes')
    assert runs.train(RUNS[:1], args) == RUNS[:1]
    assert 'failed with status 3' in capsys.readouterr().out and not args.results.exists()
    assert '--resume' in runs.command(RUNS[0], args)
    with pytest.raises(ValueError, match='seed0 holds another experiment'):
        runs.train(RUNS[:1], options(tmp_path, extra=['--lr', '1']))
    assert runs.train(RUNS[:1], args) == []
    (row,) = read_rows(args.results)
    assert (row['epochs'], row['sessions'], row['top1_best'], row['top1_last']) == ('4', '2', '30.0', '20.0')
    curve = read_rows(tmp_path / 'cifar' / f'{runs.folder("", RUNS[0]).name}.csv')
    assert [row['epoch'] for row in curve] == ['0', '1', '2', '3']


def test_the_time_limit_cuts_runs_and_starts_no_more(fake_train, tmp_path, monkeypatch):
    args = options(tmp_path, jobs=1, minutes=0.03)
    monkeypatch.setenv('CUT', 'sleep')
    assert runs.train(RUNS, args) == []
    assert not args.results.exists() and not runs.folder(args.output, RUNS[1]).exists()
    args.minutes = 1
    monkeypatch.delenv('CUT')
    assert runs.train(RUNS[:1], args) == [] and len(read_rows(args.results)) == 1


RUNNER = """
import sys
from argparse import Namespace
sys.path.insert(0, sys.argv[1])
from scripts import cifar_runs as runs
train = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'
runs.command = lambda run, args: [sys.executable, '-c', train]
runs.train([(runs.short('finet_small'), 0)], Namespace(output=sys.argv[2], commit='', jobs=1, extra=[], minutes=1))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux alone lets a child die with its parent')
def test_runs_die_with_a_runner_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, '-c', RUNNER, ROOT, tmp_path]) as runner:
        child = wait_for(lambda: [
            pid for log in tmp_path.glob('*/log0.txt') for pid in re.findall(r'^\d+$', log.read_text(), re.M)])
        runner.kill()
    assert wait_for(lambda: gone(int(child[0])))


def wait_for(condition):
    for _ in range(200):
        if condition():
            return condition()
        time.sleep(0.1)


def gone(pid):
    """No such process, or dead where nobody has reaped it."""
    stat = Path(f'/proc/{pid}/stat')
    return not stat.exists() or stat.read_text().split()[2] == 'Z'


def line(setting, seed, top1, **more):
    return {**dict(setting=str(setting), seed=str(seed), top1_last=str(top1), top1_best=str(top1 + 1), device='a GPU',
                   seconds_an_epoch='2.5', peak_mb='1000'), **more}


def test_mean_deviation():
    assert tables.mean_deviation([1, 2, 3]) == (2, 1) and tables.mean_deviation([5]) == (5, None)


def test_paired_test_by_seed():
    assert tables.paired([2]) == (2, None, None)
    difference, error, p = tables.paired([1, 2, 3])
    assert (difference, error) == (2, pytest.approx(3 ** -0.5)) and p == pytest.approx(0.0742, abs=1e-4)
    textbook = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 8: 2.306, 9: 2.262}
    for freedom, t in textbook.items():
        assert tables.student(t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert tables.student(0, 2) == 1


def test_tables_stand_beside_the_papers_figures():
    bn, fbn = (runs.short(name, runs.SMALL) for name in ('finet_small', 'finet_small_g8'))
    rows = [line(bn, seed, 60 + seed) for seed in range(3)] + [line(fbn, seed, 61 + 2 * seed) for seed in range(3)]
    text = tables.tables(rows, ['placement', 'evidence'])
    assert '**finet_small, CIFAR-100**' in text and 'without affine' not in text
    assert '| G = 1 | 61.00 ± 1.00 | 60.00, 61.00, 62.00 |  |  | 75.62 | 2.5 | 1000 |' in text
    assert ('| G = 8 | 63.00 ± 2.00 | 61.00, 63.00, 65.00 | +2.00 ± 0.58 | 0.074 (n = 3) | 77.20 (+1.58) | 2.5 | 1000 |'
            in text)
    assert tables.tables([], ['evidence']) == ''
    text = tables.tables(rows[:2] + rows[4:], ['evidence'])
    assert '+2.00 |  |' in text  # one seed in common: no error, no test


@pytest.mark.parametrize('stem', runs.FILES)
def test_readme_shows_the_results_file(stem):
    results = RESULTS / f'{stem}.csv'
    assert read_block(stem) == tables.tables(read_rows(results) if results.exists() else [], runs.FILES[stem])


def test_tables_of_networks_that_fit_show_how_well_they_do():
    settings = tables.tables_of(['long'])['cifar100', 'finet_small']
    rows = [line(settings['G = 1'], seed, 60 + seed) | dict(fit_loss='0.5', fit_top1='90') for seed in range(2)]
    text = tables.tables(rows, ['long'])
    assert 'loss on the training images | top-1 on them' in text and '| 0.50 ± 0.00 | 90.00 ± 0.00 |' in text


def test_loss_by_int8_is_compared_seed_by_seed():
    rows = [dict(groups=name, seed=seed, top1_pytorch=float32, top1=int8) for name, seed, float32, int8 in (
        ('G = 8', '0', 60.0, 59.0), ('G = 8', '1', 62.0, 60.5), ('G = 1', '0', 60.0, 59.8), ('G = 1', '1', 60.0, 59.7))]
    bn, fbn = int8_groups.table(rows).splitlines()[2:]
    assert bn == '| G = 1 | 60.00 ± 0.00 | 59.75 ± 0.07 | -0.25 ± 0.07 | -0.20, -0.30 |  |  |'
    assert fbn == '| G = 8 | 61.00 ± 1.41 | 59.75 ± 1.06 | -1.25 ± 0.35 | -1.00, -1.50 | -1.00 ± 0.20 | 0.126 (n = 2) |'


def test_plots(tmp_path):
    pytest.importorskip('matplotlib')
    rows = []
    (tmp_path / 'cifar_short').mkdir()
    for name, setting in tables.tables_of(['evidence'])['cifar100', 'finet_small'].items():
        for seed in range(2):
            rows += [line(setting, seed, 92 + seed)]
            name = runs.folder('', (setting, seed)).name
            (tmp_path / 'cifar_short' / f'{name}.csv').write_text('epoch,train_loss,eval_top1\n0,3,10\n1,2,20\n')
    tables.plot(rows, ['evidence'], tmp_path / 'cifar_short.csv')
    for name in ('cifar_short_groups.png', 'cifar_short_epochs.png'):
        assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('argv, message', [
    (['cifar11'], "invalid choice: 'cifar11'.*cifar100"),
    (['cifar10', '--output', 'x', '--dry-run'], '--data-dir is missing'),
    (['evidence', '--data-dir', 'x'], '--output is missing'),
    (['cifar10', 'evidence'], 'cifar10 evidence: their results are different files'),
    (['cifar10', '--data-dir', 'x', '--output', 'x', '--', '--epochs', '1'], "'--epochs 1'.*--results"),
    ([], 'PROTOCOL'),
])
def test_bad_arguments_are_named(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['cifar_tables.py', *argv])
    with pytest.raises(SystemExit) as error:
        tables.main()
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_facts_are_printed_at_the_end(tmp_path):
    (tmp_path / 'train.py').write_text('import scripts.train_facts')
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    result = subprocess.run([sys.executable, tmp_path / 'train.py'], capture_output=True, text=True, env=environment)
    facts = json.loads(result.stdout.removeprefix('facts: '))
    assert facts['timm'] == timm.__version__ and facts['peak_mb'] > 10
