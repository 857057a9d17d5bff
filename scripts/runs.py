"""Start, resume and record runs of timm's train.py.

A run is a setting and a seed. It has its own folder, where each session writes a log that begins with facts for the
results. The scripts that define settings are commands, which get their options from `arguments()`.
"""
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import NamedTuple, Tuple

import yaml

from scripts.report import ROOT, command_line, rows_so_far, write_rows


class Setting(NamedTuple):
    """Everything about a run except its seed; a row of a table is the mean over the seeds of a setting.

    Args:
        name: Its name in the results.
        args: Arguments of train.py, in which OUTPUT stands for the folder of all runs, and SEED for the seed.
        module: Module that registers its network or data set.
        processes: Number of processes that train it together.
    """
    name: str
    args: Tuple[str, ...]
    module: str = ''
    processes: int = 1


def arguments(description):
    parser = command_line(description)
    parser.add_argument('--data-dir', required=True)
    parser.add_argument(
        '--output', default='output/runs', help='folder for checkpoints and logs, to be kept until all runs are done')
    parser.add_argument('--jobs', type=int, default=1, help='number of runs that share the cores (default: 1)')
    parser.add_argument('--results', type=Path, help='results file (default: that of the documents)')
    return parser


def missing(runs, results):
    """The runs, in order, that the results do not hold yet."""
    done = {(row['setting'], row['seed']) for row in rows_so_far(results)}
    return [run for run in dict.fromkeys(runs) if (run[0].name, str(run[1])) not in done]


def folder(output, run):
    return Path(output, re.sub(r'[^\w.=]+', '-', run[0].name) + f'-seed{run[1]}')


def curve_file(results, run):
    """The file with the epochs of a recorded run."""
    return results.with_suffix('') / f"{folder('', run).name}.csv"


def run_args(run):
    setting, seed = run
    return [*(arg.replace('SEED', str(seed)) for arg in setting.args), '--seed', str(seed)]


def torchrun(setting):
    line = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={setting.processes}']
    return line if setting.processes > 1 else []


def recorded_command(run):
    """The command that repeats a run from the repository's root, where `python -m` finds `setting.module`."""
    setting = run[0]
    by_module = setting.module or setting.processes > 1
    start = ['python', *torchrun(setting), '-m', 'timm_finet'] if by_module else ['timm-finet']
    return shlex.join([*start, 'run', 'train', *run_args(run), '--data-dir', 'DATA'])


def threads(setting, jobs):
    return max(1, os.cpu_count() // (jobs * setting.processes))


def command(run, args):
    """The command line that is executed, with options that are not part of the experiment."""
    setting, home = run[0], folder(args.output, run)
    line = [sys.executable, *torchrun(setting), '-m', 'timm_finet', 'run', 'train']
    line += [arg.replace('OUTPUT', args.output) for arg in run_args(run)]
    on_cpus = 'scripts.several_cpus' if setting.processes > 1 else ''
    line += ['--device-modules', *filter(None, ('timm_finet', 'scripts.train_facts', on_cpus, setting.module))]
    line += ['--data-dir', args.data_dir, '--output', args.output, '--experiment', home.name, '--checkpoint-hist', '1']
    line += ['--workers', str(threads(setting, args.jobs) - 1)]
    if (home / 'last.pth.tar').exists():
        line += ['--resume', str(home / 'last.pth.tar')]
    return line


def commit():
    """The commit of the package that trains, or '' without a git history."""
    def git(*args):
        return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True)

    if not shutil.which('git') or git('rev-parse', 'HEAD').returncode:
        return ''
    changed = git('diff', '--quiet', 'HEAD', '--', 'timm_finet').returncode
    return git('rev-parse', '--short=12', 'HEAD').stdout.strip() + ('-changed' if changed else '')


def die_with_parent():
    """Called in a child before it becomes train.py: on Linux, kill -9 of the runner then ends its runs too."""
    if sys.platform == 'linux':
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def start(run, args):
    """Start another session of a run and return its process."""
    home = folder(args.output, run)
    home.mkdir(parents=True, exist_ok=True)
    log = (home / f"log{len(list(home.glob('log*.txt')))}.txt").open('w')
    head = dict(started=time.time(), commit=commit(), jobs=args.jobs, command=recorded_command(run))
    print('session: ' + json.dumps(head), file=log, flush=True)
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', str(threads(run[0], args.jobs)))}
    return subprocess.Popen(command(run, args), stdout=log, stderr=log, env=environment, preexec_fn=die_with_parent)


def epochs_of(file):
    """Rows of timm's summary.csv by epoch.

    A resumed run writes the header again, and may repeat an epoch, of which the later row counts.
    """
    rows = {row['epoch']: row for row in rows_so_far(file) if row['epoch'] != 'epoch'}
    return sorted(rows.values(), key=lambda row: int(row['epoch']))


def collect(run, output):
    """The row of a run for the results, or None if it has not finished.

    Raises:
        ValueError: The run's folder holds another experiment.
    """
    setting, seed = run
    home = folder(output, run)
    epochs = epochs_of(home / 'summary.csv')
    files = sorted(home.glob('log*.txt'), key=lambda file: int(file.stem.removeprefix('log')))
    logs = [file.read_text(errors='replace') for file in files]
    sessions = [dict(re.findall(r'^(session|facts): (.*)', log, re.M)) for log in logs]
    heads = [json.loads(session['session']) for session in sessions]
    facts = [json.loads(session['facts']) for session in sessions if 'facts' in session]
    for head in heads:
        if head['command'] != recorded_command(run):
            raise ValueError(
                f"{home} holds another experiment, {head['command']!r}: name another --output, or delete it.")
    args = yaml.safe_load((home / 'args.yaml').read_text()) if epochs else {}
    if not epochs or int(epochs[-1]['epoch']) + 1 < args['epochs'] or 'facts' not in sessions[-1]:
        return None
    rates = {}  # timm's log gives the mean of the epoch so far, so an epoch's last line counts
    for log in logs:
        for epoch, updates, rate in re.findall(r'^Train: (\d+) \[ *\d+/(\d+) .*\([\d.]+s, +([\d.]+)/s\)', log, re.M):
            rates[epoch] = int(updates) * args['batch_size'] * setting.processes / float(rate)
    top1 = [float(row['eval_top1']) for row in epochs]
    return dict(
        setting=setting.name, seed=seed, epochs=args['epochs'],
        top1_last=round(top1[-1], 3), top1_best=round(max(top1), 3),
        best_epoch=int(epochs[top1.index(max(top1))]['epoch']) + 1,
        seconds=round(sum(file.stat().st_mtime - head['started'] for file, head in zip(files, heads))),
        seconds_an_epoch=round(median(rates.values()), 2), peak_mb=max(fact['peak_mb'] for fact in facts),
        jobs=max(head['jobs'] for head in heads), sessions=len(logs),
        precision=args['amp_dtype'] if args['amp'] else 'float32', compiled=bool(args['torchcompile']),
        commit=' '.join(dict.fromkeys(head['commit'] for head in heads)),
        **{key: ' '.join(dict.fromkeys(fact[key] for fact in facts)) for key in ('device', 'torch', 'timm')},
        date=date.today(), command=recorded_command(run))


def add_run(results, run, line, epochs):
    """Add a run's row to a results file, and write the rows of its epochs to a file beside it."""
    curve = curve_file(results, run)
    curve.parent.mkdir(parents=True, exist_ok=True)
    write_rows(curve, epochs)
    write_rows(results, [*rows_so_far(results), line])


def record(run, args, more=None):
    """Add a run to the results if it has finished, and return whether it has.

    Args:
        more: A function of `run` and `args` that returns further columns.
    """
    line = collect(run, args.output)
    if line is None:
        return False
    if more:
        line |= more(run, args)
    add_run(args.results, run, line, epochs_of(folder(args.output, run) / 'summary.csv'))
    print(f"{line['setting']}, seed {line['seed']}: {line['top1_last']:.2f} (best {line['top1_best']:.2f}), "
          f"{line['seconds']} s", flush=True)
    return True


def train(runs, args, more=None):
    """Run all that the results lack, `args.jobs` at a time; exit with the number of those that failed, if any."""
    waiting, active, failed = missing(runs, args.results), {}, 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped; start it again to continue'))
    try:
        while active or waiting:
            while waiting and len(active) < args.jobs:
                run = waiting.pop(0)
                if not record(run, args, more):  # else an earlier call ended before it could record it
                    active[run] = start(run, args)
            time.sleep(0.5)
            for run, process in list(active.items()):
                if process.poll() is None:
                    continue
                del active[run]
                if not record(run, args, more):
                    failed += 1
                    print(f'{folder(args.output, run)} failed with status {process.returncode}: see its last log',
                          flush=True)
    finally:
        for process in active.values():
            process.terminate()
    if failed:
        sys.exit(f'{failed} runs failed.')
