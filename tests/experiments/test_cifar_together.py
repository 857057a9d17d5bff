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
from scripts.paper.cifar_plan import PAPER
from scripts.paper.cifar_together import Training, build, images, train, train_args
from scripts.report import RESULTS, read_rows
from scripts.runs import run_args
from timm_finet.commands import run as launch

CPU = torch.device('cpu')
TINY = ('--model-kwargs', 'small_input=True', 'channels=(8,8,8)', 'depths=(1,1,1)', 'num_features=16')
SETTINGS = [setting._replace(args=(*setting.args, *TINY)) for setting in PAPER]


@pytest.fixture
def root(tmp_path):
    generator = np.random.default_rng(0)
    train, test = (generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (1300, 40))
    np.savez(tmp_path / 'cifar100.npz', train=train, train_labels=np.arange(1300) % 100, test=test,
             test_labels=np.arange(40) % 100)
    return tmp_path


def losses(training, batches):
    found = []
    for x, target in batches:
        training.loss.zero_()
        with training.its_own():
            training.step(x, target)
        found.append(training.loss.item())
    return found


@pytest.mark.parametrize('setting', SETTINGS, ids=['G = 1', 'G = 8'])
def test_steps_are_those_of_timms_task_optimizer_and_schedule(setting):
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(100, (16,))) for _ in range(10)]
    args = train_args(setting)
    random_seed(3, 0)
    model = build(args).to(memory_format=torch.channels_last).train()
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss())
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=5)
    expected = []
    for i, (x, target) in enumerate(batches):
        loss = task(x.contiguous(memory_format=torch.channels_last), target)['loss']
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
        if i == 4:
            scheduler.step(120)
    training = Training((setting, 3), 5, CPU)
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
def test_ten_steps_have_the_losses_of_train_py(root, tmp_path, monkeypatch):
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
    assert losses(Training((setting, 3), 10, CPU), list(zip(*batches))) == pytest.approx(expected, rel=1e-6)


def weights(trainings):
    return [[tensor.clone() for tensor in training.tensors()] for training in trainings]


def test_networks_do_not_disturb_each_other_and_resuming_repeats_an_unbroken_run(root):
    args = train_args(SETTINGS[0])
    data, test = (images(args, str(root), split) for split in ('train', 'validation'))
    runs = [(SETTINGS[0], 0), (SETTINGS[1], 0), (SETTINGS[1], 1)]

    def make(runs, epochs):
        trainings = [Training(run, 2, CPU) for run in runs]
        for training in trainings:
            training.args.batch_size, training.epochs = 16, epochs
        return trainings
    unbroken = make(runs, 3)
    train(unbroken, data, test, 9, lambda: None)
    alone = make(runs[2:], 3)
    train(alone, data, test, 9, lambda: None)
    torch.testing.assert_close(weights(alone), weights(unbroken[2:]), rtol=0, atol=0)
    first = make(runs, 2)
    train(first, data, test, 9, lambda: None)
    second = make(runs, 3)
    for old, new in zip(first, second):
        new.load(old.state())
    train(second, data, test, 9, lambda: None)
    torch.testing.assert_close(weights(second), weights(unbroken), rtol=0, atol=0)
    assert [row['epoch'] for row in second[0].rows] == [1, 2] and [row['epoch'] for row in unbroken[0].rows] == [2]
    assert len({tuple(map(float, training.tensors()[0].flatten()[:9])) for training in unbroken}) == 3


def start(monkeypatch, root, *options):
    monkeypatch.setattr(cifar_together, 'PAPER', SETTINGS)
    monkeypatch.setattr(sys, 'argv', [
        'cifar_together.py', '--seeds', '0', '--data-dir', str(root), '--output', str(root / 'out'),
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


def test_finished_runs_are_lines_of_the_results_and_not_trained_again(root, monkeypatch):
    args = [train_args(setting) for setting in SETTINGS]
    monkeypatch.setattr(cifar_together, 'train_args', lambda setting: Namespace(
        **vars(args[SETTINGS.index(setting)]) | dict(epochs=1)))
    start(monkeypatch, root)
    rows = read_rows(root / 'results.csv')
    assert [*rows[0]] == [*read_rows(RESULTS / 'cifar_short.csv')[0]]
    assert [(row['setting'], row['seed'], row['jobs'], row['commit']) for row in rows] == [
        ('cifar100 finet_large', '0', '2', 'abc'), ('cifar100 finet_large_g8', '0', '2', 'abc')]
    for row in rows:
        epoch, = read_rows(root / 'results' / f"{row['setting'].replace(' ', '-')}-seed0.csv")
        assert round(float(epoch['eval_top1']), 3) == float(row['top1_last']) and row['epochs'] == '1'
    with pytest.raises(SystemExit, match='holds all of these runs'):
        start(monkeypatch, root)


def test_the_best_epoch_is_recorded_beside_the_last():
    training = Training((SETTINGS[1], 2), 2, CPU)
    training.rows = [dict(epoch=4, eval_top1=50.), dict(epoch=199, eval_top1=40.)]
    args = Namespace(amp_dtype=None, commit='abc', data_dir='D', output='O')
    found = cifar_together.line(training, args, 3)
    assert (found['top1_last'], found['top1_best'], found['best_epoch'], found['jobs']) == (40., 50., 5, 3)
