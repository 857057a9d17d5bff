"""FBN against BN on CIFAR: what is trained, how well it fits, and what is made of the results."""
import ast
import re
import runpy
import sys
from argparse import Namespace

import numpy as np
import pytest
import timm
import torch
import yaml

from scripts import runs
from scripts.paper import cifar_tables as tables
from scripts.paper import converted, quiet_branches, tied_affine  # noqa: F401 (they register networks)
from scripts.paper.cifar_plan import PROTOCOLS
from scripts.report import RESULTS, read_rows, write_rows
from scripts.weights import int8
from timm_finet import FBNConv2d
from timm_finet.commands import run as launch


def planned(protocol):
    return list(dict.fromkeys(run for section in PROTOCOLS[protocol] for run in section.runs))


def value_of(option, setting):
    return setting.args[setting.args.index(option) + 1]


def model_kwargs(setting):
    """Of train.py's --model-kwargs; a word is a word."""
    start = setting.args.index('--model-kwargs') + 1
    pairs = [arg.split('=') for arg in setting.args[start:setting.args.index('--dataset')]]
    return {key: value if value.isalpha() and value.islower() else ast.literal_eval(value) for key, value in pairs}


def build(setting, **kwargs):
    return timm.create_model(
        value_of('--model', setting), num_classes=int(value_of('--num-classes', setting)), **model_kwargs(setting),
        **kwargs)


def convs(model):
    return [m.weight.shape for m in model.modules() if isinstance(m, (torch.nn.Conv2d, FBNConv2d))]


@pytest.mark.slow  # it builds every network of the tables
@pytest.mark.parametrize('stem, recipe', [('cifar_short', 'cifar_short'), ('cifar_long', 'cifar_long')])
def test_networks_of_a_table_have_equal_widths_and_one_recipe(stem, recipe):
    for rows in tables.tables_of(stem).values():
        assert len({tuple(convs(build(setting, device='meta'))) for setting in rows.values()}) == 1
        assert {value_of('--config', setting) for setting in rows.values()} == {f'recipe:{recipe}'}


def test_the_long_protocol_is_trained_in_order_of_worth():
    assert [(section.name, len(section.runs)) for section in PROTOCOLS['long']] == [
        ('deviation', 5), ('small', 20), ('groups', 10), ('quiet', 5), ('tied', 5), ('affine', 10), ('rate', 4),
        ('cifar10', 10), ('mobilenet', 10)]
    runs = planned('long')
    assert len(runs) == 74
    assert [(setting.name.split()[2], seed) for setting, seed in runs[:5]] == [('finet_small', s) for s in range(5)]
    assert [(setting.name.split()[2], seed) for setting, seed in runs[5:9]] == [
        ('finet_small_g8', s) for s in range(4)]


@pytest.mark.parametrize('stem', tables.RESULTS_OF)
def test_results_are_of_the_plan_and_name_the_command_that_is_run_now(stem):
    """So that runs which have been cut go on, and those which are done are not run again."""
    plan = {run[0].name: run[0] for protocol in tables.RESULTS_OF[stem] for run in planned(protocol)}
    rows = read_rows(RESULTS / f'{stem}.csv')
    assert {row['setting'] for row in rows} - {*plan} <= {  # which has since been trained again on a GPU
        'cifar10 cifar_short finet_large_se_g4 --epochs 30 --batch-size 64 --smoothing 0.1 --reprob 0.25 --lr 0.1'}
    for row in rows:
        if row['setting'] in plan and not row['device'].startswith('NVIDIA'):  # there it ran from another folder
            assert row['command'] == runs.recorded_command((plan[row['setting']], int(row['seed'])))


@pytest.mark.slow
def test_every_setting_builds_its_network():
    for setting in {run[0] for protocol in PROTOCOLS for run in planned(protocol)}:
        groups = {m.fbn_groups for m in build(setting, device='meta').modules() if isinstance(m, FBNConv2d)}
        named = re.search(r'_g(\d)|fbn_groups=(\d)', setting.name)
        expected = int(named[1] or named[2]) if named else 2 if 'resnet' in setting.name else 1
        assert groups == {expected}, setting


@pytest.mark.scripts
@pytest.mark.skipif('"scripts" not in config.getoption("-m")', reason="needs timm's own train.py: pytest -m scripts")
def test_train_py_reads_the_commands_as_meant(monkeypatch):
    parse = runpy.run_path(launch.find_script('train'))['_parse_args']
    for run in (run for protocol in PROTOCOLS for run in planned(protocol)):
        setting, seed = run
        line = runs.command(run, Namespace(data_dir='DATA', output='out', jobs=2))
        monkeypatch.setattr(sys, 'argv', ['train.py', *map(launch.find_recipe, line[line.index('train') + 1:])])
        args, _ = parse()
        dataset, recipe, model = setting.name.split()[:3]
        assert (args.model, args.seed, args.num_classes) == (model, seed, int(dataset[5:]))
        parts = {'cifar10': '_first1000', 'cifar100': '_first100'}
        assert args.dataset.removeprefix(f'torch/{dataset}') == (parts[dataset] if recipe == 'cifar_long' else '_pad2')
        assert args.mean[0] == (0.4914 if dataset == 'cifar10' else 0.5071)
        assert args.epochs == int(value_of('--epochs', setting)) if '--epochs' in setting.args else (
            args.epochs == {'cifar_short': 15, 'cifar_long': 50, 'cifar100': 200}[recipe])
        assert args.model_kwargs == model_kwargs(setting) and args.channels_last
        on_cpus = ['scripts.several_cpus'] if setting.processes > 1 else []
        assert args.device_modules == ['timm_finet', 'scripts.train_facts', *on_cpus, *filter(None, [setting.module])]
        assert args.experiment == runs.folder('', run).name


@pytest.mark.parametrize('row', ['G = 1', 'G = 8, gamma from 1/sqrt(G)', 'G = 8, tied affine'])
def test_fit_is_measured_on_the_training_images_of_every_kind_of_network(row, tmp_path):
    setting = tables.tables_of('cifar_long')['cifar100', 'finet_small'][row]
    torch.manual_seed(0)
    model = build(setting).eval()
    home = runs.folder(tmp_path, (setting, 0))
    home.mkdir(parents=True)
    mean, std = [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]
    trained_with = dict(
        model=value_of('--model', setting), num_classes=100, model_kwargs=model_kwargs(setting),
        dataset='torch/cifar100_first100', mean=mean, std=std, input_size=[3, 32, 32], crop_pct=1.0,
        interpolation='bilinear', in_chans=None, gp=None, bn_eps=None)
    torch.save(dict(state_dict=model.state_dict(), args=Namespace(**trained_with)), home / 'last.pth.tar')
    (home / 'args.yaml').write_text(yaml.safe_dump(trained_with))
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(
        std).view(3, 1, 1)
    with torch.no_grad():
        logits = model(x)
    labels = logits.argmax(1)
    labels[:2] = (labels[:2] + 1) % 100
    np.savez(tmp_path / 'cifar100.npz', train=images, train_labels=labels, test=images[:1], test_labels=labels[:1])
    found = tables.fit((setting, 0), Namespace(output=tmp_path, data_dir=str(tmp_path)))
    assert found['fit_top1'] == 75
    assert found['fit_loss'] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=2e-3)


def test_quiet_branches_start_their_gammas_at_one_over_the_root_of_g():
    layer = next(m for m in timm.create_model('finet_small_g8_quiet').modules() if isinstance(m, FBNConv2d))
    torch.testing.assert_close(layer.bn.weight.detach(), torch.full((layer.bn.num_features,), 8 ** -0.5))


def test_tied_groups_share_one_gamma_and_one_beta():
    layer = next(m for m in timm.create_model('finet_small_g8_tied').modules() if isinstance(m, FBNConv2d))
    layer(torch.randn(2, 24, 8, 8)).square().sum().backward()
    names = dict(layer.bn.named_parameters())
    assert {len(p) for p in names.values()} == {layer.out_channels} and all(p.grad is not None for p in names.values())
    with torch.no_grad():
        names['parametrizations.weight.original'].copy_(torch.arange(layer.out_channels))
    assert torch.equal(layer.bn.weight, torch.arange(layer.out_channels).float().repeat(8))


def test_paired_test_by_seed():
    assert tables.paired([2]) == (2, None, None)
    difference, error, p = tables.paired([1, 2, 3])
    assert (difference, error) == (2, pytest.approx(3 ** -0.5)) and p == pytest.approx(0.0742, abs=1e-4)
    textbook = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 8: 2.306, 9: 2.262}
    for freedom, t in textbook.items():
        assert tables.student(t, freedom) == pytest.approx(0.05, abs=1e-4)
    assert tables.student(0, 2) == 1


def line(setting, seed, top1, **more):
    return dict(
        setting=setting.name, seed=str(seed), top1_last=str(top1), seconds_an_epoch='2.5', peak_mb='1000', **more)


def test_tables_stand_beside_the_papers_figures():
    settings = tables.tables_of('cifar_short')['cifar100', 'finet_small']
    bn, fbn = settings['G = 1'], settings['G = 8']
    rows = [line(bn, seed, 60 + seed) for seed in range(3)] + [line(fbn, seed, 61 + 2 * seed) for seed in range(3)]
    text = tables.table(rows, 'cifar_short')
    assert '**finet_small, CIFAR-100**' in text and 'without affine' not in text
    assert '| G = 1 | 61.00 ± 1.00 | 60.00, 61.00, 62.00 |  |  | 75.62 | 2.5 | 1000 |' in text
    assert ('| G = 8 | 63.00 ± 2.00 | 61.00, 63.00, 65.00 | +2.00 ± 0.58 | 0.074 (n = 3) | 77.20 (+1.58) | 2.5 | 1000 |'
            in text)
    assert tables.table([], 'cifar_short') == ''
    text = tables.table(rows[:2] + rows[4:], 'cifar_short')
    assert '+2.00 |  |' in text  # one seed in common: no error, no test


def test_tables_of_networks_that_fit_show_how_well_they_do():
    settings = tables.tables_of('cifar_long')['cifar100', 'finet_small']
    rows = [line(settings['G = 1'], seed, 60 + seed, fit_loss='0.5', fit_top1='90') for seed in range(2)]
    text = tables.table(rows, 'cifar_long')
    assert 'loss on the training images | top-1 on the training images' in text
    assert '| 0.50 ± 0.00 | 90.00 ± 0.00 |' in text


def test_loss_by_int8_is_compared_seed_by_seed():
    rows = [dict(groups=name, seed=seed, top1_pytorch=float32, top1=int8) for name, seed, float32, int8 in (
        ('G = 8', '0', 60.0, 59.0), ('G = 8', '1', 62.0, 60.5), ('G = 1', '0', 60.0, 59.8), ('G = 1', '1', 60.0, 59.7))]
    bn, fbn = int8.table_of_groups(rows).splitlines()[2:]
    assert bn == '| G = 1 | 60.00 ± 0.00 | 59.75 ± 0.07 | -0.25 ± 0.07 | -0.20, -0.30 |  |  |'
    assert fbn == '| G = 8 | 61.00 ± 1.41 | 59.75 ± 1.06 | -1.25 ± 0.35 | -1.00, -1.50 | -1.00 ± 0.20 | 0.126 (n = 2) |'


def test_plots(tmp_path):
    rows, results = [], tmp_path / 'cifar_short.csv'
    (tmp_path / 'cifar_short').mkdir()
    for setting in tables.tables_of('cifar_short')['cifar100', 'finet_small'].values():
        for seed in range(2):
            rows += [line(setting, seed, 92 + seed)]
            runs.curve_file(results, (setting, seed)).write_text('epoch,train_loss,eval_top1\n0,3,10\n1,2,20\n')
    write_rows(results, rows)
    tables.plot_groups(results)
    tables.plot_epochs(results)
    for name in ('cifar_short_groups.png', 'cifar_short_epochs.png'):
        assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'


def test_dry_run_prints_the_commands_of_a_section(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [
        'cifar_tables.py', 'long', '--only', 'tied', '--dry-run', '--data-dir', 'DATA', '--results',
        str(tmp_path / 'none.csv')])
    tables.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all('--model finet_small_g8_tied' in line for line in lines)
