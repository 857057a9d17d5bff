"""The runs of the paper's Tables 5, 6 and 7 on CIFAR, each by timm's train.py: what they are, run, resume, collect.

For cifar_tables.py, which is the command.
"""
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from statistics import median
from typing import NamedTuple, Tuple

import yaml

from report import read_rows, write_rows

SCRIPTS = Path(__file__).parent
ACT_PLACES = ('depthwise', 'pointwise', 'output')
ACT_PLACE = 'depthwise'  # of every network but those of `placement`, which are to decide it
GROUPS = {1: 'finet_large', 2: 'finet_large_g2', 4: 'finet_large_g4', 6: 'finet_large_g6', 8: 'finet_large_g8'}
SIZES = (20, 50, 100)
SEEDS = (0, 1, 2)
COST_EPOCHS = 5
SPEED = ('--channels-last',)  # of every run: what a trial has shown to give most runs an hour belongs here
DATASETS = {  # what the recipes for CIFAR-10 need to become those for CIFAR-100
    'cifar10': (),
    'cifar100': ('--dataset', 'torch/cifar100_pad2', '--num-classes', '100', '--mean', '0.5071', '0.4865', '0.4409',
                 '--std', '0.2673', '0.2564', '0.2762'),
}
ORDER = {
    'cifar10': ('placement', 'g1_g8', 'g2_g4', 'se', 'affine', 'resnet18', 'group_size', 'g6', 'resnet50', 'affine_rest',
                'modern', 'loader', 'cost'),
    'cifar100': ('g1_g8', 'g2_g4', 'affine', 'resnet18', 'group_size', 'resnet50', 'g6', 'affine_rest', 'modern', 'cost'),
}


class Setting(NamedTuple):
    """What a row of a table is the mean of: everything about a run but its seed."""
    dataset: str
    recipe: str
    model: str
    kwargs: Tuple[str, ...] = ()
    loader: str = 'timm'
    form: str = ''
    epochs: int = 0

    def __str__(self):
        recipe = self.recipe if self.recipe != self.dataset else ''
        loader = 'gpu_loader' if self.loader == 'gpu' else ''
        epochs = f'{self.epochs}_epochs' if self.epochs else ''
        return ' '.join(filter(None, (self.dataset, recipe, self.model, *self.kwargs, self.form, loader, epochs)))

    def args(self, seed):
        """The arguments of train.py that make the experiment."""
        args = ['--config', f'recipe:{self.recipe}', '--model', self.model, '--model-kwargs', 'small_input=True', *self.kwargs]
        if self.recipe != self.dataset:
            args += DATASETS[self.dataset]
        if self.loader == 'gpu':
            args += ['--dataset', f'torch/{self.dataset}_gpu', '--no-prefetcher', '--workers', '0']
        if self.form:
            args += ['--device-modules', 'timm_finet', self.form]
        if self.epochs:
            args += ['--epochs', str(self.epochs)]
        return [*args, *SPEED, '--seed', str(seed)]


def finet(dataset, model, *kwargs, place=ACT_PLACE, **options):
    return Setting(dataset, dataset, model, (*kwargs, f'act_place={place}'), **options)


def resnet(dataset, name, groups, **options):
    return Setting(dataset, 'resnet_cifar', f'{name}_fbn', (f'fbn_groups={groups}',), **options)


def modern(dataset, model):
    return Setting(dataset, 'modern', model, (f'act_place={ACT_PLACE}',))


def sections(dataset, loader='timm'):
    """Settings and seeds by what they are for."""
    def of(settings, seeds=SEEDS):  # seed by seed, so that rows to compare grow together
        return [(setting, seed) for seed in seeds for setting in settings]

    def finets(groups, *kwargs):
        return [finet(dataset, GROUPS[g], *kwargs, loader=loader) for g in groups]

    def resnets(name):
        return [resnet(dataset, name, g, loader=loader) for g in (1, 2, 4)]

    return {
        'placement': of([
            finet(dataset, GROUPS[g], place=place, loader=loader) for place in ACT_PLACES for g in (1, 8)], SEEDS[:2]),
        'g1_g8': of(finets((1, 8))),
        'g2_g4': of(finets((2, 4))),
        'se': of([finet(dataset, 'finet_large_se_g8', loader=loader)], SEEDS[:1]),
        'affine': of(finets((1, 8), 'affine=False')),
        'resnet18': of(resnets('resnet18')),
        'group_size': of([finet(dataset, GROUPS[1], f'fbn_group_size={size}', loader=loader) for size in SIZES], SEEDS[:1]),
        'g6': of(finets((6,)), SEEDS[:1]),
        'resnet50': of(resnets('resnet50'), SEEDS[:1]),
        'affine_rest': of(finets((2, 4, 6), 'affine=False'), SEEDS[:1]),
        'modern': of([modern(dataset, m) for m in ('finet_large_g8', 'finet_large_se_g4', 'finet_small_g4')], SEEDS[:1]),
        'loader': of([finet(dataset, GROUPS[8], loader=which) for which in ('timm', 'gpu')]),
        'cost': of([
            finet(dataset, GROUPS[g], loader=loader, form=form, epochs=COST_EPOCHS)
            for g, form in ((1, ''), (8, ''), (8, 'reference_form'))], SEEDS[:1]),
    }


def missing(datasets, only, loader, rows):
    """The runs, in order, that the results do not hold yet. Those that measure cost must run alone: only if asked for."""
    done = {(row['setting'], row['seed']) for row in rows}
    runs = [
        run for dataset in datasets for name in ORDER[dataset]
        if (name in only if only else name != 'cost') for run in sections(dataset, loader)[name]]
    return [run for run in dict.fromkeys(runs) if (str(run[0]), str(run[1])) not in done]


def folder(output, run):
    return Path(output, re.sub(r'[^\w.=]+', '-', str(run[0])) + f'-seed{run[1]}')


def command(run, args):
    """train.py's command line as it is started, with what does not make the experiment."""
    setting, seed = run
    home = folder(args.output, run)
    line = [sys.executable, '-m', 'timm_finet', 'run', 'train', *setting.args(seed)]
    line += ['--device-modules', *filter(None, ('timm_finet', 'train_facts', setting.form))]
    line += ['--data-dir', args.data_dir, '--output', args.output, '--experiment', home.name, '--checkpoint-hist', '1']
    if setting.loader == 'timm':
        line += ['--workers', str(max(1, os.cpu_count() // args.jobs - 1))]
    if (home / 'last.pth.tar').exists():
        line += ['--resume', str(home / 'last.pth.tar')]
    return line + args.extra


def recorded_command(run, extra):
    """The command that anybody may repeat."""
    setting, seed = run
    return shlex.join(['timm-finet', 'run', 'train', *setting.args(seed), *extra, '--data-dir', 'DATA'])


def start(run, args):
    """One more session of a run: its process, whose log begins with what the results must know of it."""
    home = folder(args.output, run)
    home.mkdir(parents=True, exist_ok=True)
    log = (home / f"log{len(list(home.glob('log*.txt')))}.txt").open('w')
    head = dict(started=time.time(), commit=args.commit, jobs=args.jobs, command=recorded_command(run, args.extra))
    print('session: ' + json.dumps(head), file=log, flush=True)
    path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), os.environ.get('PYTHONPATH', '')])
    return subprocess.Popen(command(run, args), stdout=log, stderr=log, env=os.environ | {'PYTHONPATH': path})


def epochs_of(file):
    """Rows of timm's summary.csv by epoch. A resumed run writes another header, and an epoch again: the later one counts."""
    if not file.exists():
        return []
    rows = {row['epoch']: row for row in read_rows(file) if row['epoch'] != 'epoch'}
    return sorted(rows.values(), key=lambda row: int(row['epoch']))


def collect(run, output, extra=()):
    """The results' line of a run, or None if it has not finished.

    Raises:
        ValueError: The run's folder holds another experiment.
    """
    setting, seed = run
    home = folder(output, run)
    epochs, logs = epochs_of(home / 'summary.csv'), sorted(home.glob('log*.txt'), key=lambda file: int(file.stem[3:]))
    sessions = [dict(re.findall(r'^(session|facts): (.*)', log.read_text(errors='replace'), re.M)) for log in logs]
    heads = [json.loads(session['session']) for session in sessions]
    facts = [json.loads(session['facts']) for session in sessions if 'facts' in session]
    for head in heads:
        if head['command'] != recorded_command(run, extra):
            raise ValueError(f"{home} holds another experiment, {head['command']!r}: name another --output, or delete it.")
    args = yaml.safe_load((home / 'args.yaml').read_text()) if epochs else {}
    if not epochs or len(epochs) < args['epochs'] or 'facts' not in sessions[-1]:
        return None
    rates = {}  # of timm's log, the mean of the epoch so far: its last line stands
    for log in logs:
        for epoch, updates, rate in re.findall(
                r'^Train: (\d+) \[ *\d+/(\d+) .*\([\d.]+s, +([\d.]+)/s\)', log.read_text(errors='replace'), re.M):
            rates[epoch] = int(updates) * args['batch_size'] / float(rate)
    top1 = [float(row['eval_top1']) for row in epochs]
    peaks = [fact['peak_mb'] for fact in facts if fact['peak_mb'] is not None]
    return dict(
        setting=str(setting), seed=seed, epochs=len(epochs), top1_last=round(top1[-1], 3), top1_best=round(max(top1), 3),
        best_epoch=int(epochs[top1.index(max(top1))]['epoch']) + 1,
        seconds=round(sum(log.stat().st_mtime - head['started'] for log, head in zip(logs, heads))),
        seconds_an_epoch=round(median(rates.values()), 2), peak_mb=max(peaks) if peaks else '',
        jobs=max(head['jobs'] for head in heads), sessions=len(logs),
        precision=args['amp_dtype'] if args['amp'] else 'float32', compiled=bool(args['torchcompile']),
        commit=' '.join(dict.fromkeys(head['commit'] for head in heads)),
        **{key: ' '.join(dict.fromkeys(fact[key] for fact in facts)) for key in ('device', 'torch', 'timm')},
        date=date.today(), command=recorded_command(run, extra))


def record(line, run, args):
    """Add a finished run to the results: its line, and its epochs beside them."""
    curves = args.results.with_suffix('')
    curves.mkdir(parents=True, exist_ok=True)
    write_rows(curves / f'{folder(args.output, run).name}.csv', epochs_of(folder(args.output, run) / 'summary.csv'))
    write_rows(args.results, [*(read_rows(args.results) if args.results.exists() else []), line])
    print(f"{line['setting']}, seed {line['seed']}: {line['top1_last']:.2f} (best {line['top1_best']:.2f}), "
          f"{line['seconds']} s", flush=True)


def train(runs, args):
    """Keep `--jobs` runs going until all are done or the time is up. Returns those that failed."""
    end = time.monotonic() + 60 * args.minutes
    waiting, active, failed = list(runs), {}, []
    try:
        while active or waiting and time.monotonic() < end:
            while waiting and len(active) < args.jobs and time.monotonic() < end:
                run = waiting.pop(0)
                line = collect(run, args.output, args.extra)
                if line:  # it had finished before it could be recorded
                    record(line, run, args)
                else:
                    active[run] = start(run, args)
            time.sleep(0.5)
            for run, process in list(active.items()):
                if process.poll() is None:
                    if time.monotonic() > end:
                        process.terminate()
                    continue
                del active[run]
                line = collect(run, args.output, args.extra)
                if line:
                    record(line, run, args)
                elif process.returncode == -signal.SIGTERM:
                    print(f'{folder(args.output, run)}: the time is up; it goes on from its last epoch', flush=True)
                else:
                    failed.append(run)
                    print(f'{folder(args.output, run)} failed with status {process.returncode}: see its last log', flush=True)
    finally:
        for process in active.values():
            process.terminate()
    return failed
