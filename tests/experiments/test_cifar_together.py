"""Several networks trained together, on the CPU: each as timm's train.py would train it alone."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import random_seed

from scripts.cifar_runs import Setting
from scripts.paper import cifar_together
from scripts.paper.cifar_together import Training, build, images, read_recipe, train
from scripts.report import RESULTS, read_rows
from timm_finet.commands import run as launch

CPU = torch.device('cpu')
TINY = ('channels=(8,8,8)', 'depths=(1,1,1)', 'num_features=16')
SETTINGS = [Setting('cifar10', 'cifar10', name, TINY) for name in ('finet_small', 'finet_small_g8')]


@pytest.fixture
def root(tmp_path):
    generator = np.random.default_rng(0)
    train, test = (generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (1300, 40))
    np.savez(tmp_path / 'cifar10.npz', train=train, train_labels=np.arange(1300) % 10, test=test,
             test_labels=np.arange(40) % 10)
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
    batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(10)]
    recipe = read_recipe(setting)
    random_seed(3, 0)
    model = build(setting, recipe).to(memory_format=torch.channels_last).train()
    task = ClassificationTask(model, torch.nn.CrossEntropyLoss())
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(recipe), **recipe.opt_kwargs)
    scheduler, _ = create_scheduler_v2(optimizer, **scheduler_kwargs(recipe), updates_per_epoch=5)
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
    line = setting.args(3)
    line += ['--device-modules', 'timm_finet', 'recorder', '--epochs', '1', '--drop', '0', '--device', 'cpu',
             '--workers', '0', '--data-dir', str(root), '--output', str(tmp_path / 'out')]
    subprocess.run([sys.executable, '-c', f'import sys; sys.path[:0] = [{str(tmp_path)!r}]; '
                    'from timm_finet_cli import main; sys.exit(main())', 'run', 'train', *line],
                   check=True, cwd=Path(__file__).parents[2])
    *batches, expected = zip(*torch.load(tmp_path / 'seen.pt'))
    assert len(expected) == 10
    recipe = read_recipe(setting)
    recipe.drop = 0  # whose numbers train.py draws from the generator of its crops, and this script from its own
    monkeypatch.setattr(cifar_together, 'read_recipe', lambda setting: recipe)
    assert losses(Training((setting, 3), 10, CPU), list(zip(*batches))) == pytest.approx(expected, rel=1e-6)


def weights(trainings):
    return [[tensor.clone() for tensor in training.tensors()] for training in trainings]


def test_networks_do_not_disturb_each_other_and_resuming_repeats_an_unbroken_run(root):
    recipe = read_recipe(SETTINGS[0])
    recipe.batch_size = 16
    data, test = (images(SETTINGS[0], recipe, str(root), split, 16) for split in ('train', 'validation'))
    runs = [(SETTINGS[0], 0), (SETTINGS[1], 0), (SETTINGS[1], 1)]

    def make(runs, epochs):
        trainings = [Training(run, 2, CPU) for run in runs]
        for training in trainings:
            training.recipe.batch_size, training.epochs = 16, epochs
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


def test_a_rehearsal_saves_its_networks_and_goes_on(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cifar_together, 'missing', lambda *_: [(setting, 0) for setting in SETTINGS])
    line = ['cifar_together.py', 'cifar10', '--only', 'g1_g8', '--data-dir', str(root), '--output', str(tmp_path)]
    for epochs in ('1', '2'):
        monkeypatch.setattr(sys, 'argv', [*line, '--epochs', epochs, '--amp-dtype', 'bfloat16'])
        cifar_together.main()
    out = capsys.readouterr().out
    assert 'epoch 2' in out and out.count('epoch 1') == 2 and '2 of 2 networks are done' in out
    assert (tmp_path / 'together.pt').is_file()


def test_a_finished_run_is_a_line_of_the_results(root, monkeypatch):
    training = Training((SETTINGS[1], 2), 2, CPU)
    training.rows = [dict(epoch=4, eval_top1=50.), dict(epoch=199, eval_top1=40.)]
    args = cifar_together.Namespace(amp_dtype=None, commit='abc', data_dir='D', output='O')
    found = cifar_together.line(training, args, 3)
    assert [*found] == [*read_rows(RESULTS / 'cifar_short.csv')[0]]
    assert (found['top1_last'], found['top1_best'], found['best_epoch'], found['jobs']) == (40., 50., 5, 3)


def test_recipes_that_need_more_are_refused():
    with pytest.raises(ValueError, match='recipe:modern'):
        read_recipe(Setting('cifar10', 'modern', 'finet_small'))
