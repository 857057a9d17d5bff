"""The runs of the CIFAR tables, each by timm's train.py: what they are, run, resume, collect.

For cifar_tables.py, which is the command.
"""
import ctypes
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
from typing import Dict, NamedTuple, Tuple

import yaml

from scripts.report import read_rows, write_rows

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
FIVE = tuple(range(5))
RATES = (0.1, 0.05)  # tried on plain BN; all else of recipe:cifar_short takes the first
SMALL, LARGE = 'channels=(32,64,120)', 'channels=(104,200,400)'  # the widths at G = 8, which divide at every G
QUARTER = 'channels=(16,32,64,128)'
FACTS = {  # for a recipe that is not named after its data set
    'cifar10': ('--num-classes', '10', '--mean', '0.4914', '0.4822', '0.4465', '--std', '0.2470', '0.2435', '0.2616'),
    'cifar100': ('--num-classes', '100', '--mean', '0.5071', '0.4865', '0.4409', '--std', '0.2673', '0.2564', '0.2762'),
}
PARTS = {'cifar10': 'torch/cifar10_first1000', 'cifar100': 'torch/cifar100_first100'}  # of recipe:cifar_long


def dataset_args(dataset, recipe):
    name = PARTS[dataset] if recipe == 'cifar_long' else f'torch/{dataset}_pad2'
    return ['--dataset', name, *FACTS[dataset]]


class Setting(NamedTuple):
    """What a row of a table is the mean of: everything about a run but its seed."""
    dataset: str
    recipe: str
    model: str
    kwargs: Tuple[str, ...] = ()
    options: Tuple[str, ...] = ()
    module: str = ''  # that makes the network known
    processes: int = 1  # that train it together

    def __str__(self):
        recipe = self.recipe if self.recipe != self.dataset else ''
        return ' '.join(filter(None, (self.dataset, recipe, self.model, *self.kwargs, *self.options)))

    def args(self, seed):
        """The arguments of train.py that make the experiment."""
        args = ['--config', f'recipe:{self.recipe}', '--model', self.model]
        args += ['--model-kwargs', 'small_input=True', *self.kwargs]
        if self.recipe != self.dataset:
            args += dataset_args(self.dataset, self.recipe)
        if self.module:
            args += ['--device-modules', 'timm_finet', self.module]
        return [*args, '--channels-last', *self.options, '--seed', str(seed)]


class Section(NamedTuple):
    """Rows of the table `title`, trained together. A row named `G = 1` is the plain BN that the others compare with."""
    name: str
    title: str
    rows: Dict[str, Setting]
    seeds: Tuple[int, ...] = SEEDS

    @property
    def runs(self):  # seed by seed, so that rows to compare grow together
        return [(setting, seed) for seed in self.seeds for setting in self.rows.values()]


def finet(size, g):
    return f'finet_{size}' + (f'_g{g}' if g > 1 else '')


def paper(dataset):
    """Tables 5, 6 and 7 at the paper's 200 epochs, for a GPU, in order of worth."""
    def large(groups, *kwargs):
        return {f'G = {g}': Setting(dataset, dataset, finet('large', g), kwargs) for g in groups}

    def resnet(name):
        return {f'G = {g}': Setting(dataset, 'resnet_cifar', f'{name}_fbn', (f'fbn_groups={g}',)) for g in (1, 2, 4)}

    sizes = {f'C/G = {n}': Setting(dataset, dataset, 'finet_large', (f'fbn_group_size={n}',)) for n in (20, 50, 100)}
    return [
        Section('g1_g8', 'finet_large', large((1, 8))),
        Section('g2_g4', 'finet_large', large((2, 4))),
        Section('affine', 'finet_large without affine', large((1, 8), 'affine=False')),
        Section('resnet18', 'resnet18', resnet('resnet18')),
        Section('group_size', 'finet_large', sizes, SEEDS[:1]),
        Section('g6', 'finet_large', large((6,)), SEEDS[:1]),
        Section('resnet50', 'resnet50', resnet('resnet50'), SEEDS[:1]),
        Section('affine_rest', 'finet_large without affine', large((2, 4, 6), 'affine=False'), SEEDS[:1]),
        Section('se', 'finet_large', {'G = 8, with SE': Setting(dataset, dataset, 'finet_large_se_g8')}, SEEDS[:1]),
        Section('modern', 'recipe:modern', {
            model: Setting(dataset, 'modern', model)
            for model in ('finet_large_g8', 'finet_large_se_g4', 'finet_small_g4')}, SEEDS[:1]),
    ]


def short(model, *kwargs, dataset='cifar100', options=(), rate=RATES[0], module=''):
    return Setting(dataset, 'cifar_short', model, kwargs, (*options, '--lr', str(rate)), module)


def small(groups, *kwargs, **more):
    return {f'G = {g}': short(finet('small', g), SMALL, *kwargs, **more) for g in groups}


def long(model, *kwargs, dataset='cifar100', options=(), module=''):
    return Setting(dataset, 'cifar_long', model, kwargs, options, module)


def small_long(groups, *kwargs, **more):
    return {f'G = {g}': long(finet('small', g), SMALL, *kwargs, **more) for g in groups}


def weights(model, dataset, epochs, batch_size, rate, *options, **more):
    """With label smoothing and random erasing, as nothing is compared."""
    options = (
        '--epochs', str(epochs), '--batch-size', str(batch_size), '--smoothing', '0.1', '--reprob', '0.25', *options)
    rows = {model: short(model, dataset=dataset, options=options, rate=rate)._replace(**more)}
    return Section(f'{model}.{dataset}', f'{epochs} epochs', rows, SEEDS[:1])


ON_GPU = ('--warmup-epochs', '5', '--device', 'cuda')


PROTOCOLS = {
    'cifar10': paper('cifar10'),
    'cifar100': paper('cifar100'),
    'placement': [  # of a block's second ReLU, 10 epochs
        Section(place, 'finet_small_g4 by act_place, 10 epochs', {
            place: short('finet_small_g4', f'act_place={place}', options=('--epochs', '10'))}, SEEDS[:2])
        for place in ('depthwise', 'pointwise', 'output')],
    'evidence': [  # does FBN beat BN at equal widths? 15 epochs, in order of worth
        Section('rate', 'finet_small, G = 1, by learning rate', {
            f'lr {rate}': short('finet_small', SMALL, rate=rate) for rate in RATES}, SEEDS[:1]),
        Section('small', 'finet_small', small((1, 8, 4, 2))),
        Section('affine', 'finet_small without affine', small((1, 8), 'affine=False')),
        Section('tied', 'finet_small', {
            'G = 8, tied affine': short('finet_small_g8_tied', SMALL, module='scripts.paper.tied_affine')}),
        Section('large', 'finet_large', {f'G = {g}': short(finet('large', g), LARGE) for g in (1, 8)}),
        Section('resnet18', 'resnet18, a quarter as wide', {
            f'G = {g}': short('resnet18_fbn', f'fbn_groups={g}', QUARTER) for g in (1, 2)}),
        Section('cifar10', 'finet_small', small((1, 8), dataset='cifar10')),
    ],
    'long': [  # the same once the network fits its training set: 100 images a class, 50 epochs, in order of worth
        Section('deviation', 'finet_small', small_long((1,)), FIVE),  # how many seeds the rest needs
        Section('small', 'finet_small', small_long((1, 8)), tuple(range(10))),
        Section('groups', 'finet_small', small_long((2, 4)), FIVE),
        Section('quiet', 'finet_small', {
            'G = 8, gamma from 1/sqrt(G)': long('finet_small_g8_quiet', SMALL, module='scripts.paper.quiet_branches')},
            FIVE),
        Section('tied', 'finet_small', {
            'G = 8, tied affine': long('finet_small_g8_tied', SMALL, module='scripts.paper.tied_affine')}, FIVE),
        Section('affine', 'finet_small without affine', small_long((1, 8), 'affine=False'), FIVE),
        Section('rate', 'finet_small by learning rate', {
            f'G = {g}, lr {rate}': long(finet('small', g), SMALL, options=('--lr', str(rate)))
            for rate in (0.05, 0.2) for g in (1, 8)}, SEEDS[:1]),
        Section('cifar10', 'finet_small', small_long((1, 8), dataset='cifar10'), FIVE),
        Section('mobilenet', 'mobilenetv2_035 through convert_fbn', {
            f'G = {g}': long('mobilenetv2_035_converted', f'fbn_groups={g}', module='scripts.paper.converted')
            for g in (1, 8)}, FIVE),
    ],
    'weights': [  # that the package embeds
        weights('finet_large_se_g4', 'cifar10', 72, 512, 0.4, '--aa', 'rand-m5-mstd0.5-inc1', *ON_GPU,
                module='timm_finet.cuda_graphs'),
        # in two processes, which take less time than two threads of one
        weights('finet_large_se_g4', 'cifar100', 30, 64, 0.1, processes=2),
        weights('resnet18_fbn', 'cifar10', 50, 256, 0.2, *ON_GPU, module='timm_finet.cuda_graphs'),
    ],
}
FILES = {  # of results
    'cifar': ('cifar10', 'cifar100'), 'cifar_short': ('placement', 'evidence'), 'cifar_long': ('long',),
    'cifar_weights': ('weights',)}


def missing(protocols, only, seeds, rows):
    """The runs, in order, that the results do not hold yet."""
    done = {(row['setting'], row['seed']) for row in rows}
    runs = [
        run for protocol in protocols for section in PROTOCOLS[protocol] if not only or section.name in only
        for run in section._replace(seeds=tuple(seeds) or section.seeds).runs]
    return [run for run in dict.fromkeys(runs) if (str(run[0]), str(run[1])) not in done]


def folder(output, run):
    return Path(output, re.sub(r'[^\w.=]+', '-', str(run[0])) + f'-seed{run[1]}')


def threads(setting, args):
    return max(1, os.cpu_count() // (args.jobs * setting.processes))


def torchrun(setting):
    return ['torch.distributed.run', '--standalone', f'--nproc-per-node={setting.processes}']


def command(run, args):
    """train.py's command line as it is started, with what does not make the experiment."""
    setting, seed = run
    home = folder(args.output, run)
    start = ['-m', *torchrun(setting)] if setting.processes > 1 else []
    line = [sys.executable, *start, '-m', 'timm_finet', 'run', 'train']
    line += [arg.replace('OUTPUT', args.output) for arg in setting.args(seed)]
    on_cpus = 'scripts.several_cpus' if setting.processes > 1 else ''
    line += ['--device-modules', *filter(None, ('timm_finet', 'scripts.train_facts', on_cpus, setting.module))]
    line += ['--data-dir', args.data_dir, '--output', args.output, '--experiment', home.name, '--checkpoint-hist', '1']
    line += ['--workers', str(threads(setting, args) - 1)]
    if (home / 'last.pth.tar').exists():
        line += ['--resume', str(home / 'last.pth.tar')]
    return line + args.extra


def recorded_command(run, extra):
    """The command that anybody may repeat, from the repository's root, where `python -m` finds `setting.module`."""
    setting, seed = run
    start = ['timm-finet']
    if setting.module or setting.processes > 1:
        start = ['python', *(['-m', *torchrun(setting)] if setting.processes > 1 else []), '-m', 'timm_finet']
    return shlex.join([*start, 'run', 'train', *setting.args(seed), *extra, '--data-dir', 'DATA'])


LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None
PR_SET_PDEATHSIG = 1


def die_with_parent():
    """In a child, before it becomes train.py: on Linux not even kill -9 of the runner leaves runs behind."""
    if LIBC:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(run, args):
    """One more session of a run: its process, whose log begins with what the results must know of it."""
    home = folder(args.output, run)
    home.mkdir(parents=True, exist_ok=True)
    log = (home / f"log{len(list(home.glob('log*.txt')))}.txt").open('w')
    head = dict(started=time.time(), commit=args.commit, jobs=args.jobs, command=recorded_command(run, args.extra))
    print('session: ' + json.dumps(head), file=log, flush=True)
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]),
        'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS', str(threads(run[0], args)))}
    return subprocess.Popen(command(run, args), stdout=log, stderr=log, env=environment, preexec_fn=die_with_parent)


def epochs_of(file):
    """Rows of timm's summary.csv by epoch. A resumed run writes a header, and an epoch, again: the later one counts."""
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
            raise ValueError(
                f"{home} holds another experiment, {head['command']!r}: name another --output, or delete it.")
    args = yaml.safe_load((home / 'args.yaml').read_text()) if epochs else {}
    if not epochs or int(epochs[-1]['epoch']) + 1 < args['epochs'] or 'facts' not in sessions[-1]:
        return None
    rates = {}  # of timm's log, the mean of the epoch so far: its last line stands
    for log in logs:
        for epoch, updates, rate in re.findall(
                r'^Train: (\d+) \[ *\d+/(\d+) .*\([\d.]+s, +([\d.]+)/s\)', log.read_text(errors='replace'), re.M):
            rates[epoch] = int(updates) * args['batch_size'] * setting.processes / float(rate)
    top1 = [float(row['eval_top1']) for row in epochs]
    peaks = [fact['peak_mb'] for fact in facts if fact['peak_mb'] is not None]
    return dict(
        setting=str(setting), seed=seed, epochs=args['epochs'],
        top1_last=round(top1[-1], 3), top1_best=round(max(top1), 3),
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
    if run[0].recipe == 'cifar_long':  # whose question is how networks generalise that fit what they are trained on
        from scripts.cifar_fit import fit  # not above: a runner that waits needs no torch
        line = {**line, **fit(run, args)}
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
                    print(f'{folder(args.output, run)} failed with status {process.returncode}: see its last log',
                          flush=True)
    finally:
        for process in active.values():
            process.terminate()
    return failed
