"""Runs of train.py: how they are started, resumed and recorded."""
import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import timm

from scripts import runs
from scripts.paper.cifar_plan import SMALL, short
from scripts.report import ROOT, read_rows

FAKE = '''
import os, sys
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
            raise SystemExit(3)
print('facts: {"peak_mb": 900, "device": "none", "torch": "1", "timm": "2"}')
'''
SETTING = short('finet_small_g8', SMALL)
RUNS = [(SETTING, seed) for seed in (0, 1)]


@pytest.fixture
def args(tmp_path):
    return Namespace(data_dir='DATA', output=str(tmp_path / 'out'), results=tmp_path / 'cifar.csv', jobs=2)


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
    monkeypatch.setattr(runs, 'commit', lambda: 'abc')


def test_a_finished_run_becomes_a_line_and_is_not_repeated(fake_train, args, tmp_path):
    runs.train(RUNS, args)
    first, second = sorted(read_rows(args.results), key=lambda row: row['seed'])
    assert (first['seed'], second['seed']) == ('0', '1')
    measured = {key: first[key] for key in (
        'setting', 'epochs', 'top1_last', 'top1_best', 'best_epoch', 'seconds_an_epoch', 'peak_mb', 'jobs', 'sessions',
        'precision', 'compiled', 'commit', 'timm')}
    assert measured == dict(
        setting='cifar100 cifar_short finet_small_g8 channels=(32,64,120) --lr 0.1', epochs='4', top1_last='20.0',
        top1_best='30.0', best_epoch='2', seconds_an_epoch='2.5', peak_mb='900', jobs='2', sessions='1',
        precision='bfloat16', compiled='False', commit='abc', timm='2')
    assert 0 <= int(first['seconds']) < 60 and str(tmp_path) not in ''.join(first.values())
    curve = read_rows(runs.curve_file(args.results, RUNS[0]))
    assert [row['eval_top1'] for row in curve] == ['10', '30', '25.5', '20']
    assert runs.missing(RUNS, args.results) == []
    args.results.unlink()  # finished, but not recorded: nothing is trained again
    runs.train(RUNS, args)
    assert [row['sessions'] for row in read_rows(args.results)] == ['1', '1']


def test_a_failed_run_is_told_and_goes_on_from_its_checkpoint(fake_train, args, monkeypatch, capsys):
    monkeypatch.setenv('CUT', 'yes')
    with pytest.raises(SystemExit, match='1 runs failed'):
        runs.train(RUNS[:1], args)
    assert 'failed with status 3' in capsys.readouterr().out and not args.results.exists()
    assert '--resume' in runs.command(RUNS[0], args)
    with pytest.raises(ValueError, match='seed0 holds another experiment'):
        runs.train([(SETTING._replace(args=(*SETTING.args, '--lr', '1')), 0)], args)
    runs.train(RUNS[:1], args)
    (row,) = read_rows(args.results)
    assert (row['epochs'], row['sessions'], row['top1_best'], row['top1_last']) == ('4', '2', '30.0', '20.0')
    assert [row['epoch'] for row in read_rows(runs.curve_file(args.results, RUNS[0]))] == ['0', '1', '2', '3']


def test_further_columns_stand_in_the_line(fake_train, args):
    runs.train(RUNS[:1], args, more=lambda run, args: dict(fit_top1=run[1] + 7))
    assert read_rows(args.results)[0]['fit_top1'] == '7'


RUNNER = """
import sys
from argparse import Namespace
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from scripts import runs
train = 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'
runs.command = lambda run, args: [sys.executable, '-c', train]
runs.train([(runs.Setting('a', ()), 0)], Namespace(output=sys.argv[2], jobs=1, results=Path(sys.argv[2], 'r.csv')))
"""


@pytest.mark.skipif(sys.platform != 'linux', reason='Linux alone lets a child die with its parent')
def test_runs_die_with_a_runner_that_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, '-c', RUNNER, ROOT, tmp_path]) as runner:
        child = wait_for(lambda: [
            pid for log in tmp_path.glob('*/log0.txt') for pid in re.findall(r'^\d+$', log.read_text(), re.M)])
        runner.kill()
    assert wait_for(lambda: gone(int(child[0])))


def wait_for(condition):
    for _ in range(600):
        if condition():
            return condition()
        time.sleep(0.1)


def gone(pid):
    """No such process, or dead where nobody has reaped it."""
    stat = Path(f'/proc/{pid}/stat')
    return not stat.exists() or stat.read_text().split()[2] == 'Z'


@pytest.mark.slow
def test_facts_are_printed_at_the_end(tmp_path):
    (tmp_path / 'train.py').write_text('import scripts.train_facts')
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    result = subprocess.run([sys.executable, tmp_path / 'train.py'], capture_output=True, text=True, env=environment)
    facts = json.loads(result.stdout.removeprefix('facts: '))
    assert facts['timm'] == timm.__version__ and facts['peak_mb'] > 10
