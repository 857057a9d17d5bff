"""The runs of the CIFAR tables: what they are, how they are run and resumed, what is taken from them and made of it."""
import json
import os
import re
import runpy
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import yaml

SCRIPTS = Path(__file__).parents[1] / 'scripts'
sys.path.insert(0, str(SCRIPTS))

import cifar_runs as runs  # noqa: E402
import cifar_tables as tables  # noqa: E402
from report import read_rows, readme_block  # noqa: E402
from timm_finet import launch  # noqa: E402

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
        print(f'Train: {epoch} [   0/5 (  0%)]  Loss: 2.3 (2.3)  Time: 1.000s,  100.00/s  (1.000s,  100.00/s)  LR: 1.000e-01')
        print(f'Train: {epoch} [   4/5 (100%)]  Loss: 2.3 (2.3)  Time: 0.400s,  250.00/s  (0.500s,  200.00/s)  LR: 1.000e-01')
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


RUNS = [(runs.finet('cifar10', 'finet_large_g8'), seed) for seed in (0, 1)]


def test_runs_are_the_rows_of_the_papers_tables():
    for dataset in runs.DATASETS:
        rows = {title: rows for title, rows in tables.rows_of(dataset)}
        planned = {setting for setting, _ in runs.missing([dataset], [], 'timm', [])}
        assert {setting for settings in rows.values() for _, setting, _ in settings} <= planned
        sizes = [len(rows[t]) for t in ('Table 5, with affine', 'Table 5, without affine', 'Table 6', 'Table 7')]
        assert sizes == [6 if dataset == 'cifar10' else 5, 5, 3, 6]
        assert sum(figure is not None for t, s in rows.items() if t.startswith('Table') for _, _, figure in s) == 5 + 5 + 3 + 5
    assert tables.PAPER['cifar100']['with affine'][4] == 77.202 and tables.PAPER['cifar10']['group size'][1] == 93.606


def test_order_and_seeds():
    planned = runs.missing(['cifar10'], [], 'timm', [])
    assert len(planned) == len(set(planned)) == 52 and len(runs.missing(['cifar100'], [], 'timm', [])) == 40
    assert [(str(s), seed) for s, seed in planned[:2]] == [
        ('cifar10 finet_large act_place=depthwise', 0), ('cifar10 finet_large_g8 act_place=depthwise', 0)]
    count = {}
    for setting, _ in planned:
        count[setting] = count.get(setting, 0) + 1
    assert {g: count[runs.finet('cifar10', name)] for g, name in runs.GROUPS.items()} == {1: 3, 2: 3, 4: 3, 6: 1, 8: 3}
    assert count[runs.finet('cifar10', 'finet_large', place='output')] == 2
    assert count[runs.resnet('cifar10', 'resnet18', 4)] == 3
    assert not any(setting.epochs for setting in count)  # cost is measured alone, and only when asked for
    cost = runs.missing(['cifar10'], ['cost'], 'timm', [])
    assert [(s.model, s.form) for s, _ in cost] == [
        ('finet_large', ''), ('finet_large_g8', ''), ('finet_large_g8', 'reference_form')]


def test_every_setting_builds_its_network():
    for dataset, classes in (('cifar10', 10), ('cifar100', 100)):
        for setting in {setting for setting, _ in runs.missing([dataset], [], 'timm', [])}:
            kwargs = {k: yaml.safe_load(v) for k, v in (arg.split('=') for arg in setting.kwargs)}
            model = timm.create_model(setting.model, num_classes=classes, small_input=True, device='meta', **kwargs)
            groups = {m.fbn_groups for m in model.modules() if hasattr(m, 'fbn_groups')}
            expected = {'finet_large_g8': {8}, 'finet_large_g6': {6}, 'finet_small_g4': {4}}.get(setting.model)
            if 'fbn_groups' in kwargs:
                expected = {kwargs['fbn_groups']}
            if 'fbn_group_size' in kwargs:
                expected = {max(1, c // kwargs['fbn_group_size']) for c in (24, 100, 200, 400)}
            assert expected in (None, groups)


@pytest.mark.scripts
@pytest.mark.skipif('"scripts" not in config.getoption("-m")', reason="needs timm's own train.py: pytest -m scripts")
def test_train_py_reads_the_commands_as_meant(monkeypatch):
    parse = runpy.run_path(launch.find_script('train'))['_parse_args']
    for dataset, classes in (('cifar10', 10), ('cifar100', 100)):
        for loader in ('timm', 'gpu'):
            for run in runs.missing([dataset], [], loader, []):
                line = runs.command(run, options(Path('out')))
                monkeypatch.setattr(sys, 'argv', ['train.py', *map(launch.find_recipe, line[5:])])
                args, _ = parse()
                setting, seed = run
                assert (args.model, args.seed, args.num_classes) == (setting.model, seed, classes)
                assert args.dataset == f"torch/{dataset}_{'gpu' if setting.loader == 'gpu' else 'pad2'}"
                assert args.no_prefetcher == (setting.loader == 'gpu') and args.epochs == (300 if 'modern' in setting else 200)
                assert args.batch_size == (64 if setting.recipe == 'resnet_cifar' else 128)
                assert args.mean[0] == (0.4914 if classes == 10 else 0.5071)
                assert args.model_kwargs.pop('small_input') is True
                assert [f'{k}={v}' for k, v in args.model_kwargs.items()] == list(setting.kwargs)
                assert args.device_modules == ['timm_finet', 'train_facts'] and args.experiment == runs.folder('', run).name


def test_a_finished_run_becomes_a_line_and_is_not_repeated(fake_train, tmp_path):
    args = options(tmp_path)
    assert runs.train(RUNS, args) == []
    first, second = sorted(read_rows(args.results), key=lambda row: row['seed'])
    assert (first['seed'], second['seed']) == ('0', '1')
    measured = {key: first[key] for key in (
        'setting', 'epochs', 'top1_last', 'top1_best', 'best_epoch', 'seconds_an_epoch', 'peak_mb', 'jobs', 'sessions',
        'precision', 'compiled', 'commit', 'timm')}
    assert measured == dict(
        setting='cifar10 finet_large_g8 act_place=depthwise', epochs='4', top1_last='20.0', top1_best='30.0',
        best_epoch='2', seconds_an_epoch='2.5', peak_mb='', jobs='2', sessions='1', precision='bfloat16', compiled='False',
        commit='abc', timm='2')
    assert first['command'] == (
        'timm-finet run train --config recipe:cifar10 --model finet_large_g8 --model-kwargs small_input=True '
        'act_place=depthwise --channels-last --seed 0 --data-dir DATA')
    assert 0 <= int(first['seconds']) < 60 and str(tmp_path) not in ''.join(first.values())
    curve = read_rows(tmp_path / 'cifar' / f'{runs.folder("", RUNS[0]).name}.csv')
    assert [row['eval_top1'] for row in curve] == ['10', '30', '25.5', '20']
    assert not set(RUNS) & set(runs.missing(['cifar10'], [], 'timm', read_rows(args.results)))
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


def line(setting, seed, top1, **more):
    return {**dict(setting=str(setting), seed=str(seed), top1_last=str(top1), top1_best=str(top1 + 1), device='a GPU',
                   seconds_an_epoch='2.5', peak_mb='1000'), **more}


def test_mean_deviation_and_difference():
    assert tables.mean_deviation([1, 2, 3]) == (2, 1) and tables.mean_deviation([5]) == (5, None)
    assert tables.difference([3, 5], [1, 3]) == (2, pytest.approx(2 ** 0.5))
    assert tables.difference([3], [1, 3]) == (1, None)


def test_tables_stand_beside_the_papers_figures():
    bn, fbn = (runs.finet('cifar10', name) for name in ('finet_large', 'finet_large_g8'))
    rows = [line(bn, seed, 92 + seed) for seed in range(3)] + [line(fbn, seed, 94 + seed) for seed in range(3)]
    rows += [line(fbn._replace(loader='gpu'), 0, 93.5)]
    cost = bn._replace(epochs=5), fbn._replace(epochs=5), fbn._replace(epochs=5, form='reference_form')
    rows += [line(s, 0, 50, seconds_an_epoch=str(t), peak_mb=str(m)) for s, t, m in zip(cost, (2, 3, 8), (1000, 700, 3000))]
    text = tables.tables(rows)
    assert '| Table 5, with affine | G = 1 | 93.00 ± 1.00 | 94.00 ± 1.00 | 0, 1, 2 | 92.584 |' in text
    assert '| Table 5, with affine | G = 8, loader on the GPU | 93.50 | 94.50 | 0 | 93.674 |' in text
    assert '| Table 6 | C/G = 50 | not measured |  |  | 93.606 |' in text
    assert '| finet_large | G = 8 | 2.00 ± 0.82 | 3 and 3 |' in text
    assert '| FBN, G = 8, reference form | a GPU | 8 | 3000 | 4.00 | 3.00 |' in text
    assert 'CIFAR-100' not in text and tables.tables([]) == 'Not measured yet.'


def test_readme_shows_the_results_file():
    results = SCRIPTS / 'results' / 'cifar.csv'
    assert readme_block('cifar') == tables.tables(read_rows(results) if results.exists() else [])


def test_plots(tmp_path):
    pytest.importorskip('matplotlib')
    rows = []
    for g, name in runs.GROUPS.items():
        rows += [line(runs.finet('cifar10', name), seed, 92 + seed + g / 10) for seed in range(3)]
    (tmp_path / 'cifar').mkdir()
    for g in (1, 8):
        name = runs.folder('', (runs.finet('cifar10', runs.GROUPS[g]), 0)).name
        (tmp_path / 'cifar' / f'{name}.csv').write_text('epoch,eval_top1\n0,10\n1,20\n')
    tables.plot(rows, tmp_path / 'cifar.csv')
    for name in ('cifar_groups.png', 'cifar_epochs_cifar10.png'):
        assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'


@pytest.mark.parametrize('argv, message', [
    (['cifar11'], "'cifar11' is unknown: use cifar10 or cifar100"),
    (['cifar10', '--output', 'x'], '--data-dir is missing'),
    (['cifar10', '--data-dir', 'x', '--output', 'x', '--only', 'cost', '--jobs', '2'], 'must run alone'),
    (['cifar10', '--data-dir', 'x', '--output', 'x', '--', '--epochs', '1'], "'--epochs 1'.*--results"),
    ([], 'name a dataset'),
    (['--plot', '--results', 'none.csv'], '--plot: none.csv holds no run yet'),
])
def test_bad_arguments_are_named(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['cifar_tables.py', *argv])
    with pytest.raises(SystemExit) as error:
        tables.main()
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_facts_are_printed_at_the_end(tmp_path):
    (tmp_path / 'train.py').write_text('import train_facts, reference_form, timm_finet; print(timm_finet.FBNConv2d.form)')
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])}
    result = subprocess.run([sys.executable, tmp_path / 'train.py'], capture_output=True, text=True, env=environment)
    form, facts = result.stdout.splitlines()
    assert form == 'reference' and json.loads(facts.removeprefix('facts: '))['timm'] == timm.__version__
