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
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from cifar_runs import (
    ACT_PLACES, COST_EPOCHS, DATASETS, GROUPS, ORDER, SCRIPTS, SIZES, command, finet, folder, missing, modern, resnet, train)
from report import RESULTS, markdown, read_rows, write_readme_block

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
        parts += [markdown(['', '', 'last epoch', 'best epoch', 'seeds', 'paper'], cells)]
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
    return cells and markdown(['', '', 'FBN minus BN, points ± standard error', 'seeds'], cells)


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
                               'memory vs BN'], cells)


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
        failed = []
        if runs:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped; it goes on when started again'))
            failed = train(runs, args)
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
