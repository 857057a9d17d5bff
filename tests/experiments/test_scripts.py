"""timm's train.py and validate.py themselves on the smoke recipe: `pytest -m scripts`, with them in TIMM_SCRIPTS."""
import csv
import json
import os
import random
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.scripts,
    pytest.mark.skipif('"scripts" not in config.getoption("-m")', reason='takes minutes: pytest -m scripts'),
]
ENV = {**os.environ, 'OMP_NUM_THREADS': '1'}
FINET = [sys.executable, '-m', 'timm_finet', 'run']
TORCHRUN = [
    sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'timm_finet', 'run']
SEVERAL_CPUS = ('--device-modules', 'timm_finet', 'scripts.several_cpus')


def command(folder, name, *args):
    return [
        'train', '--config', 'recipe:smoke', '--output', str(folder), '--experiment', name, '--log-interval', '1',
        *args]


def run(args, start=FINET, status=0):
    done = subprocess.run([*start, *args], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == status, done.stdout[-4000:]
    return done.stdout


def checkpoint(folder, name):
    return torch.load(folder / name / 'last.pth.tar', weights_only=False)


def summary(folder, name):
    with (folder / name / 'summary.csv').open(newline='') as file:
        return {row['epoch']: row for row in csv.DictReader(file)}


def test_smoke_recipe_to_a_checkpoint_that_validates_the_same_fused(tmp_path):
    run(command(tmp_path, 'smoke', '--epochs', '2'))
    results = []
    for form in ([], ['--reparam']):
        run(['validate', '--model', 'finet_small_g4.cifar10', '--checkpoint', str(tmp_path / 'smoke' / 'last.pth.tar'),
             '--dataset', 'torch/cifar10_sample', '--device', 'cpu', '--workers', '0', '--results-format', 'json',
             '--results-file', str(tmp_path / 'results.json'), *form])
        results.append(json.loads((tmp_path / 'results.json').read_text()))
    assert results[0]['top1'] == results[1]['top1'] == float(summary(tmp_path, 'smoke')['1']['eval_top1'])
    assert results[0]['top5'] == results[1]['top5'] and results[1]['param_count'] < results[0]['param_count']


@pytest.mark.parametrize('switches', [(), ('--workers', '2', '--model-ema')])
def test_killed_run_resumes_on_the_trajectory_of_an_unbroken_one(switches, tmp_path):
    switches = ('--epochs', '3', *switches)
    run(command(tmp_path, 'unbroken', *switches))
    update = random.randrange(15)
    with subprocess.Popen([*FINET, *command(tmp_path, 'killed', *switches)], env=ENV, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert any(f'Train: 1 [{update:>4d}/15' in line for line in process.stdout)
        os.killpg(process.pid, 9)
    assert checkpoint(tmp_path, 'killed')['epoch'] == 0
    run(command(tmp_path, 'killed', *switches, '--resume', str(tmp_path / 'killed' / 'last.pth.tar')))
    unbroken, resumed = (checkpoint(tmp_path, name) for name in ('unbroken', 'killed'))
    ema = ['state_dict_ema'] if '--model-ema' in switches else []
    for key in ('epoch', 'metric', 'state_dict', 'optimizer', *ema):
        torch.testing.assert_close(
            resumed[key], unbroken[key], rtol=0, atol=0, msg=lambda m: f'{key}, killed at {update}: {m}')
    assert summary(tmp_path, 'unbroken')['2'] == summary(tmp_path, 'killed')['2']


def test_two_processes_take_the_step_of_one(tmp_path):
    same = ('--train-split', 'validation', '--no-aug', '--drop', '0', '--epochs', '1')
    run(command(tmp_path, 'one', *same, '--batch-size', '100'))
    run(command(tmp_path, 'two', *same, '--batch-size', '50', '--sync-bn', *SEVERAL_CPUS), TORCHRUN)
    for column in ('train_loss', 'eval_loss'):
        one, two = (float(summary(tmp_path, name)['0'][column]) for name in ('one', 'two'))
        assert two == pytest.approx(one, rel=1e-5)
