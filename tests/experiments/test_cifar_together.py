"""Several networks trained together, on the CPU: each as timm's train.py would train it alone."""
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import random_seed

from scripts.paper import cifar_together
from scripts.paper.cifar_plan import PROTOCOLS
from scripts.paper.cifar_together import Training, build, images, train, train_args
from scripts.report import RESULTS, read_rows
from scripts.runs import run_args
from timm_finet.commands import run as launch

CPU = torch.device('cpu')
TINY = ('--model-kwargs', 'small_input=True', 'channels=(8,8,8)', 'depths=(1,1,1)', 'num_features=16')
(PAPER,) = PROTOCOLS['paper']
SETTINGS = [setting._replace(args=(*setting.args, *TINY)) for setting in PAPER.rows.values()]


@pytest.fixture
def root(tmp_path):
    generator = np.random.default_rng(0)
    train, test = (generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (1300, 40))
    np.savez(tmp_path / 'cifar100.npz', train=train, train_labels=np.arange(1300) % 100, test=test,
             test_labels=np.arange(40) % 100)
    return tmp_path


@pytest.fixture
def sets(root):
    return [images(train_args(SETTINGS[0]), str(root), split) for split in ('train', 'validation')]


def losses(training, batches):
    found = []
    for x, target in batches:
        training.loss.zero_()
        with training.its_own():
            training.step(x, target)
        found.append(training.loss.item())
    return found


@pytest.mark.parametrize('setting', SETTINGS, ids=['G = 1', 'G = 8'])
def test_steps_are_those_of_timms_task_optimizer_and_schedule(setting, sets):
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(100, (16,))) for _ in range(10)]
    args = train_args(setting)
    random_seed(3, 0)
    model = build(args).to(memory_format=torch.channels_last).train()
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss())
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    expected = []
    for i, (x, target) in enumerate(batches):
        loss = task(x.contiguous(memory_format=torch.channels_last), target)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
        if i == 4:
            scheduler.step(120)
    training = Training((setting, 3), *sets, CPU)
    found = losses(training, batches[:5])
    training.scheduler.step(120)
    assert found + losses(training, batches[5:]) == expected


RECORDER = """
import torch
from timm.task import ClassificationTask
forward, seen = ClassificationTask.forward, []
def record(self, x, target):
    result = forward(self, x, target)
    seen.append((x.clone(), target.clone(), result['loss'].item()))
    torch.save(seen, FILE)
    return result
ClassificationTask.forward = record
"""


@pytest.mark.scripts
@pytest.mark.skipif('"scripts" not in config.getoption("-m")', reason="needs timm's own train.py: pytest -m scripts")
def test_ten_steps_have_the_losses_of_train_py(root, sets, tmp_path, monkeypatch):
    launch.find_script('train')
    (tmp_path / 'recorder.py').write_text(RECORDER.replace('FILE', repr(str(tmp_path / 'seen.pt'))))
    setting = SETTINGS[1]
    line = [
        *run_args((setting, 3)), '--device-modules', 'timm_finet', 'recorder', '--epochs', '1', '--drop', '0',
        '--device', 'cpu', '--workers', '0', '--data-dir', str(root), '--output', str(tmp_path / 'out')]
    subprocess.run([sys.executable, '-c', f'import sys; sys.path[:0] = [{str(tmp_path)!r}]; '
                    'from timm_finet_cli import main; sys.exit(main())', 'run', 'train', *line],
                   check=True, cwd=Path(__file__).parents[2])
    *batches, expected = zip(*torch.load(tmp_path / 'seen.pt'))
    assert len(expected) == 10
    args = train_args(setting)
    args.drop = 0  # whose numbers train.py draws from the generator of its crops, and this script from its own
    monkeypatch.setattr(cifar_together, 'train_args', lambda setting: args)
    assert losses(Training((setting, 3), *sets, CPU), list(zip(*batches))) == pytest.approx(expected, rel=1e-6)


def weights(trainings):
    return [[tensor.clone() for tensor in training.tensors()] for training in trainings]


def test_networks_do_not_disturb_each_other_and_resuming_repeats_an_unbroken_run(sets):
    runs = [(SETTINGS[0], 0), (SETTINGS[1], 0), (SETTINGS[1], 1)]

    def make(runs, epochs):
        trainings = [Training(run, *sets, CPU) for run in runs]
        for training in trainings:
            training.args.batch_size, training.updates, training.epochs = 16, 2, epochs
        return trainings
    unbroken = make(runs, 3)
    train(unbroken, float('inf'), lambda: None)
    alone = make(runs[2:], 3)
    train(alone, float('inf'), lambda: None)
    torch.testing.assert_close(weights(alone), weights(unbroken[2:]), rtol=0, atol=0)
    first = make(runs, 2)
    train(first, float('inf'), lambda: None)
    second = make(runs, 3)
    for old, new in zip(first, second):
        new.load(old.state())
    train(second, float('inf'), lambda: None)
    torch.testing.assert_close(weights(second), weights(unbroken), rtol=0, atol=0)
    assert [row['epoch'] for row in second[0].rows] == [1, 2] and [row['epoch'] for row in unbroken[0].rows] == [2]
    assert len({tuple(map(float, training.tensors()[0].flatten()[:9])) for training in unbroken}) == 3


def start(monkeypatch, root, *options):
    rows = dict(zip(PAPER.rows, SETTINGS))
    monkeypatch.setitem(PROTOCOLS, 'paper', [PAPER._replace(rows=rows, seeds=(0,))])
    monkeypatch.setattr(sys, 'argv', [
        'cifar_together.py', 'paper', '--data-dir', str(root), '--output', str(root / 'out'),
        '--results', str(root / 'results.csv'), '--commit', 'abc', *options])
    cifar_together.main()


def test_a_rehearsal_saves_its_networks_goes_on_and_records_nothing(root, monkeypatch, capsys):
    for epochs in ('1', '2'):
        start(monkeypatch, root, '--epochs', epochs, '--amp-dtype', 'bfloat16')
    out = capsys.readouterr().out
    assert 'epoch 2' in out and out.count('epoch 1') == 2 and '2 of 2 networks are done' in out
    assert (root / 'out' / 'together.pt').is_file() and not (root / 'results.csv').exists()


def test_no_epoch_is_started_when_the_time_is_up(root, monkeypatch, capsys):
    start(monkeypatch, root, '--minutes', '0')
    assert capsys.readouterr().out == '0 of 2 networks are done.\n' and not (root / 'results.csv').exists()


@pytest.mark.parametrize('jobs', ['1', '2'])
def test_finished_runs_are_lines_of_the_results_and_not_trained_again(jobs, root, monkeypatch):
    args = [train_args(setting) for setting in SETTINGS]
    monkeypatch.setattr(cifar_together, 'train_args', lambda setting: Namespace(
        **vars(args[SETTINGS.index(setting)]) | dict(epochs=1)))
    start(monkeypatch, root, '--jobs', jobs)
    rows = read_rows(root / 'results.csv')
    assert [*rows[0]] == [*read_rows(RESULTS / 'cifar_long.csv')[0]]
    assert [(row['setting'], row['seed'], row['jobs'], row['commit']) for row in rows] == [

        (f'cifar100 cifar100 {model}', '0', jobs, 'abc') for model in ('finet_large', 'finet_large_g8')]
    for row in rows:
        epoch, = read_rows(root / 'results' / f"{row['setting'].replace(' ', '-')}-seed0.csv")
        assert round(float(epoch['eval_top1']), 3) == float(row['top1_last']) and row['epochs'] == '1'
    with pytest.raises(SystemExit, match='holds all of these runs'):
        start(monkeypatch, root)


def test_how_well_a_network_fits_is_judged_on_the_uncropped_images_it_is_trained_on(sets):
    training = Training((SETTINGS[0], 2), *sets, CPU)
    found = [torch.cat(parts) for parts in zip(*training.uncropped_batches())]
    test = images(train_args(SETTINGS[0]), sets[0].root, 'validation')
    test.data, test.targets = sets[0].data[:, 2:-2, 2:-2], sets[0].targets
    (x, target), = test.__getitems__(list(range(len(test))))
    assert torch.equal(found[0], x) and torch.equal(found[1], target)
    loss, top1, _ = training.judge([found])
    logits = training.model.eval()(x)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-5)
    assert top1 == pytest.approx(100 * (logits.argmax(1) == target).double().mean().item())


@pytest.mark.parametrize('section', PROTOCOLS['long'], ids=lambda section: section.name)
def test_every_network_of_the_long_protocol_can_be_built_for_it(section, root):
    """Its images lie under the name of the recipe's data set and `_gpu`, its numbers are the setting's."""
    np.savez(root / 'cifar10.npz', **np.load(root / 'cifar100.npz'))
    for name, setting in section.rows.items():
        args = train_args(setting)
        data = images(args, str(root), 'train')
        network = cifar_together.build(args)
        assert args.dataset in ('torch/cifar100_first100', 'torch/cifar10_first1000') and len(data) == 1300
        assert network.num_classes == (10 if 'cifar10 ' in setting.name else 100) and args.amp_dtype == 'bfloat16'
        assert args.lr == (float(name.split()[-1]) if 'lr' in name else 0.1)


def test_the_best_epoch_is_recorded_beside_the_last(sets):
    training = Training((SETTINGS[1], 2), *sets, CPU)
    training.rows = [dict(epoch=4, eval_top1=50.), dict(epoch=199, eval_top1=40.)]
    args = Namespace(commit='abc', data_dir='D', output='O')
    found = cifar_together.line(training, args, 3)
    assert (found['top1_last'], found['top1_best'], found['best_epoch'], found['jobs']) == (40., 50., 5, 3)
