"""Tables 5, 6 and 7 of the paper again: train every row on CIFAR by timm's train.py, collect, compare.

    python scripts/cifar_tables.py cifar10 cifar100 --data-dir DATA --output OUT --jobs 4 --minutes 50
    python scripts/cifar_tables.py cifar10 --data-dir DATA --output OUT --only cost     # seconds and memory, run alone
    python scripts/cifar_tables.py --tables --plot

DATA holds cifar10.npz or cifar100.npz, or torchvision's download. The first command starts the runs that the results lack,
in order of worth, `--jobs` at a time on one GPU; cut off, by `--minutes` or otherwise, it goes on when started again with the
same OUT. Every finished run adds a line to results/cifar.csv and its epochs to results/cifar/. `--dry-run` prints the
commands. `--tables` writes the README's tables, `--plot` the pictures. What stands after `--` is handed on to train.py; as
that makes another experiment, it needs a `--results` of its own:

    python scripts/cifar_tables.py cifar10 ... --only g1_g8 --results probe.csv -- --epochs 3 --amp --amp-dtype bfloat16
"""
import argparse
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
from statistics import mean, median, stdev
from typing import NamedTuple, Tuple

import yaml

from report import RESULTS, markdown, read_rows, write_readme_block, write_rows

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
PAPER = {  # top-1 of Tables 5, 6 and 7
    'cifar10': {
        'with affine': (92.584, 93.082, 93.532, 93.286, 93.674), 'without affine': (91.958, 93.162, 92.478, 92.564, 93.430),
        'group size': (93.470, 93.606, 93.122),
        'resnet18': (94.512, 95.012, 94.962), 'resnet50': (94.644, 95.040, None)},
    'cifar100': {
        'with affine': (75.624, 76.752, 76.856, 76.716, 77.202), 'without affine': (74.216, 74.382, 74.486, 74.772, 74.734),
        'group size': (76.926, 76.850, 75.674),
        'resnet18': (76.866, 77.754, 77.726), 'resnet50': (77.796, 78.122, None)},
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped; it goes on when started again'))
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


def rows_of(dataset):
    """Tables as (title, [(name, setting without its loader, the paper's figure)])."""
    paper = PAPER[dataset]

    def finets(*kwargs, figures=(None,) * 5):
        return [(f'G = {g}', finet(dataset, GROUPS[g], *kwargs), figure) for g, figure in zip(GROUPS, figures)]

    se = [('G = 8, with SE', finet(dataset, 'finet_large_se_g8'), None)] if dataset == 'cifar10' else []
    yield 'Table 5, with affine', finets(figures=paper['with affine']) + se
    yield 'Table 5, without affine', finets('affine=False', figures=paper['without affine'])
    yield 'Table 6', [(f'C/G = {size}', finet(dataset, GROUPS[1], f'fbn_group_size={size}'), figure)
                      for size, figure in zip(SIZES, paper['group size'])]
    yield 'Table 7', [(f'ResNet-{name[6:]}, G = {g}', resnet(dataset, name, g), figure)
                      for name in ('resnet18', 'resnet50') for g, figure in zip((1, 2, 4), paper[name])]
    if dataset == 'cifar10':
        yield 'Where the second ReLU stands', [
            (f'{place}, G = {g}', finet(dataset, GROUPS[g], place=place), paper['with affine'][0 if g == 1 else 4])
            for place in ACT_PLACES for g in (1, 8)]
    yield 'recipe:modern', [(model, modern(dataset, model), None)
                            for model in ('finet_large_g8', 'finet_large_se_g4', 'finet_small_g4')]


def measured(rows, setting):
    """Lines of a setting by loader."""
    found = {}
    for loader in ('timm', 'gpu'):
        lines = [row for row in rows if row['setting'] == str(setting._replace(loader=loader))]
        if lines:
            found[loader] = lines
    return found


def mean_deviation(values):
    """Mean and deviation of a sample; of a single value there is no deviation."""
    return mean(values), stdev(values) if len(values) > 1 else None


def title_of(dataset):
    return dataset.replace('cifar', 'CIFAR-')


def pm(middle, deviation):
    return f'{middle:.2f}' + ('' if deviation is None else f' ± {deviation:.2f}')


def difference(ours, theirs):
    """Difference of two samples' means and its standard error, which needs two values of each."""
    spread = None
    if len(ours) > 1 and len(theirs) > 1:
        spread = (stdev(ours) ** 2 / len(ours) + stdev(theirs) ** 2 / len(theirs)) ** 0.5
    return mean(ours) - mean(theirs), spread


def top1(lines, column='top1_last'):
    return [float(line[column]) for line in lines]


def tables(rows):
    """All tables as Markdown."""
    if not rows:
        return 'Not measured yet.'
    parts = []
    for dataset in DATASETS:
        if not any(row['setting'].split()[0] == dataset for row in rows):
            continue
        parts += [f'**{title_of(dataset)}**, top-1 in %, mean ± deviation over the seeds']
        cells = []
        for title, settings in rows_of(dataset):
            for name, setting, figure in settings:
                for loader, lines in (measured(rows, setting) or {'timm': []}).items():
                    cells.append([
                        title, name + (', loader on the GPU' if loader == 'gpu' else ''),
                        pm(*mean_deviation(top1(lines))) if lines else 'not measured',
                        pm(*mean_deviation(top1(lines, 'top1_best'))) if lines else '',
                        ', '.join(line['seed'] for line in lines), '' if figure is None else f'{figure:.3f}'])
        parts += [markdown(['', '', 'last epoch', 'best epoch', 'seeds', 'paper'], cells, left=2)]
        parts += [answers(dataset, rows), cost(dataset, rows)]
    return '\n\n'.join(filter(None, parts))


def answers(dataset, rows):
    """Does FBN beat BN, by how much, and how sure is that?"""
    cells = []
    families = {
        'finet_large': {g: finet(dataset, name) for g, name in GROUPS.items()},
        'finet_large without affine': {g: finet(dataset, name, 'affine=False') for g, name in GROUPS.items()},
        **{name: {g: resnet(dataset, name, g) for g in (1, 2, 4)} for name in ('resnet18', 'resnet50')}}
    for name, settings in families.items():
        by_loader = {g: measured(rows, setting) for g, setting in settings.items()}
        for g in list(settings)[1:]:
            for loader in by_loader[g].keys() & by_loader[1].keys():
                ours, theirs = by_loader[g][loader], by_loader[1][loader]
                cells.append([name, f'G = {g}', pm(*difference(top1(ours), top1(theirs))), f'{len(ours)} and {len(theirs)}'])
    return cells and markdown(['', '', 'FBN minus BN, points ± standard error', 'seeds'], cells, left=2)


def cost(dataset, rows):
    """Time and memory of the runs that ran alone, against plain BN. At G = 8 stage 2 is widened from 100 to 104 channels."""
    cells = []
    for loader in ('timm', 'gpu'):
        def line(g, form=''):
            setting = finet(dataset, GROUPS[g], loader=loader, form=form, epochs=COST_EPOCHS)
            return next((row for row in rows if row['setting'] == str(setting)), None)
        bn = line(1)
        for name, row in (('plain BN', bn), ('FBN, G = 8', line(8)), ('FBN, G = 8, reference form', line(8, 'reference_form'))):
            if row:
                cells.append([name, row['device'], row['seconds_an_epoch'], row['peak_mb'], ratio(row, bn, 'seconds_an_epoch'),
                              ratio(row, bn, 'peak_mb')])
    return cells and markdown(['finet_large, one run on the GPU', 'device', 'seconds an epoch', 'peak MB', 'time vs BN',
                               'memory vs BN'], cells, left=2)


def ratio(row, bn, column):
    return f'{float(row[column]) / float(bn[column]):.2f}' if bn and row[column] and bn[column] else ''


def plot(rows, results):
    """Accuracy against G beside the paper's, and against epochs for BN and FBN."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    from plot_training import plot as plot_epochs

    datasets = [d for d in DATASETS if any(row['setting'].split()[0] == d for row in rows)]
    fig, axes = plt.subplots(2, len(datasets), figsize=(5 * len(datasets), 8.5), squeeze=False, layout='constrained')
    for dataset, column in zip(datasets, axes.T):
        finets = {
            affine: {g: finet(dataset, name, *kwargs) for g, name in GROUPS.items()}
            for affine, kwargs in (('with affine', ()), ('without affine', ('affine=False',)))}
        resnets = {name: {g: resnet(dataset, name, g) for g in (1, 2, 4)} for name in ('resnet18', 'resnet50')}
        for ax, family, curves in zip(column, ('finet_large', 'ResNets'), (finets, resnets)):
            for (name, settings), color in zip(curves.items(), ('#1b7fbd', '#d95f02')):
                ax.plot(*zip(*((g, y) for g, y in zip(settings, PAPER[dataset][name]) if y)), color=color, marker='o',
                        mfc='white', ls=':', label=f'{name}, paper')
                for loader, marker in (('timm', 'o'), ('gpu', 'D')):
                    points = [
                        (g, *mean_deviation(top1(found[loader]))) for g, setting in settings.items()
                        if loader in (found := measured(rows, setting))]
                    if points:
                        x, y, deviations = zip(*points)
                        ax.errorbar(x, y, [d or 0 for d in deviations], color=color, marker=marker, capsize=3,
                                    label=f'{name}, measured' + (', loader on the GPU' if loader == 'gpu' else ''))
            ax.set(title=f'{family} on {title_of(dataset)}', xlabel='FBN groups G (1 is plain BN)',
                   ylabel='last epoch\'s top-1 in %, mean and deviation', xticks=list(settings))
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8, ncols=2, loc='upper center', bbox_to_anchor=(0.5, -0.14))
    fig.savefig(results.with_name(f'{results.stem}_groups.png'), dpi=150, facecolor='white')
    plt.close(fig)
    for dataset in datasets:
        curves = []
        for name, g in (('plain BN', 1), ('FBN, G = 8', 8)):
            setting = finet(dataset, GROUPS[g])
            for loader, lines in list(measured(rows, setting).items())[:1]:
                run = setting._replace(loader=loader), lines[0]['seed']
                curves.append(f"{name}:{folder(results.with_suffix(''), run)}.csv")
        if curves:
            plot_epochs(curves, results.with_name(f'{results.stem}_epochs_{dataset}.png'), title=f'finet_large on {title_of(dataset)}')


def commit():
    """What the package is that trains, or nothing where there is no history of it."""
    def git(*args):
        return subprocess.run(['git', *args], cwd=SCRIPTS.parent, capture_output=True, text=True)

    if not shutil.which('git') or git('rev-parse', 'HEAD').returncode:
        return ''
    changed = git('diff', '--quiet', 'HEAD', '--', 'timm_finet').returncode
    return git('rev-parse', '--short=12', 'HEAD').stdout.strip() + ('-changed' if changed else '')


def main():
    own, extra = sys.argv[1:], []
    if '--' in own:
        own, extra = own[:own.index('--')], own[own.index('--') + 1:]
    names = sorted({name for order in ORDER.values() for name in order})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('datasets', nargs='*', metavar='DATASET', help='cifar10, cifar100')
    parser.add_argument('--data-dir')
    parser.add_argument('--output', help='folder for checkpoints and logs, kept until all is done')
    parser.add_argument('--jobs', type=int, default=1, help='runs at once (default: %(default)s)')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='time after which runs are cut (default: none)')
    parser.add_argument('--only', nargs='+', choices=names, metavar='SECTION', default=[], help=', '.join(names))
    parser.add_argument('--gpu-loader', action='store_true', help='the pictures on the GPU, for all but recipe:modern')
    parser.add_argument('--commit', default=commit(), help='for a copy of the repository that has no history')
    parser.add_argument('--results', type=Path, default=RESULTS / 'cifar.csv')
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--tables', action='store_true')
    parser.add_argument('--plot', action='store_true')
    args = parser.parse_args(own)
    args.extra = extra
    if extra and args.results == RESULTS / 'cifar.csv':
        parser.error(f'{shlex.join(extra)!r} for train.py makes another experiment: name a file for it by --results.')
    for name in args.datasets:
        if name not in DATASETS:
            parser.error(f"{name!r} is unknown: use {' or '.join(DATASETS)}.")
    if args.datasets:
        for name in ('data_dir', 'output', 'commit'):
            if not getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} is missing.")
        if 'cost' in args.only and (args.jobs > 1 or len(args.only) > 1):
            parser.error('--only cost must run alone: no other section and --jobs 1.')
    elif not args.tables and not args.plot:
        parser.error('name a dataset to train on, or --tables, or --plot.')

    def rows():
        return read_rows(args.results) if args.results.exists() else []

    runs = missing(args.datasets, args.only, 'gpu' if args.gpu_loader else 'timm', rows())
    if args.dry_run:
        print('\n'.join(shlex.join(command(run, args)) for run in runs))
        return
    try:
        failed = train(runs, args) if runs else []
    except ValueError as error:
        parser.error(error)
    if args.tables:
        print(tables(rows()))
        if args.results == RESULTS / 'cifar.csv':
            write_readme_block('cifar', tables(rows()))
    if args.plot:
        if not rows():
            parser.error(f'--plot: {args.results} holds no run yet.')
        plot(rows(), args.results)
    if failed:
        sys.exit(f'{len(failed)} of {len(runs)} runs failed.')


if __name__ == '__main__':
    main()
