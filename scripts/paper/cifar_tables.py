"""FBN against BN on CIFAR: train the rows of the tables by timm's train.py, collect, compare.

    python -m scripts.paper.cifar_tables evidence --data-dir DATA --output OUT --jobs 2
    python -m scripts.paper.cifar_tables evidence             # tables and plots alone

`cifar10` and `cifar100` are Tables 5, 6 and 7 of the paper, 200 epochs, for a GPU. `placement` and `evidence` are
shorter, for a CPU: where a block's second ReLU stands, and whether FBN beats BN at equal widths. `long` asks the latter
of networks that fit the few images they are trained on. `weights` are to be embedded. Results go to results/cifar.csv,
cifar_short.csv, cifar_long.csv and cifar_weights.csv, the epochs and plots beside them, the tables to docs/cifar.md and
docs/weights.md.

DATA holds cifar10.npz and cifar100.npz, or torchvision's downloads. The runs that the results lack are started, in
order of worth, `--jobs` at a time; cut off, by `--minutes` or otherwise, it goes on from each run's last epoch when
started again with the same OUT. `--dry-run` prints the commands. What stands after `--` is handed on to train.py; as
that makes another experiment, it needs a `--results` of its own, and its tables are printed:

    python -m scripts.paper.cifar_tables cifar10 --only g1_g8 --data-dir DATA --output OUT --results p.csv -- --epochs 3
"""
import argparse
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

from timm.utils.misc import natural_key

from scripts.cifar_runs import FILES, PROTOCOLS, ROOT, command, folder, missing, train
from scripts.report import RESULTS, markdown, read_rows, write_block

PAPER = {  # top-1 of Tables 5, 6 and 7, of 200 epochs
    'cifar10': {
        'finet_large': {'G = 1': 92.584, 'G = 2': 93.082, 'G = 4': 93.532, 'G = 6': 93.286, 'G = 8': 93.674,
                        'C/G = 20': 93.470, 'C/G = 50': 93.606, 'C/G = 100': 93.122},
        'finet_large without affine': {
            'G = 1': 91.958, 'G = 2': 93.162, 'G = 4': 92.478, 'G = 6': 92.564, 'G = 8': 93.430},
        'resnet18': {'G = 1': 94.512, 'G = 2': 95.012, 'G = 4': 94.962},
        'resnet50': {'G = 1': 94.644, 'G = 2': 95.040}},
    'cifar100': {
        'finet_large': {'G = 1': 75.624, 'G = 2': 76.752, 'G = 4': 76.856, 'G = 6': 76.716, 'G = 8': 77.202,
                        'C/G = 20': 76.926, 'C/G = 50': 76.850, 'C/G = 100': 75.674},
        'finet_large without affine': {
            'G = 1': 74.216, 'G = 2': 74.382, 'G = 4': 74.486, 'G = 6': 74.772, 'G = 8': 74.734},
        'resnet18': {'G = 1': 76.866, 'G = 2': 77.754, 'G = 4': 77.726},
        'resnet50': {'G = 1': 77.796, 'G = 2': 78.122}},
}
BN = 'G = 1'
FIT = {'fit_loss': 'loss on the training images', 'fit_top1': 'top-1 on them'}


def tables_of(protocols):
    """The settings of every table by data set and title, then by the row's name."""
    found = {}
    for protocol in protocols:
        for section in PROTOCOLS[protocol]:
            dataset = next(iter(section.rows.values())).dataset
            found.setdefault((dataset, section.title), {}).update(section.rows)
    return {key: dict(sorted(rows.items(), key=lambda row: natural_key(row[0]))) for key, rows in found.items()}


def paper_of(dataset, title):
    """The paper's figures beside a table: where it has none for the network, those of finet_large or the full width."""
    title = title.replace('small', 'large').split(', a quarter')[0]
    return PAPER[dataset].get(title, {})


def of(rows, setting):
    """Lines of a setting, by seed."""
    found = {int(row['seed']): row for row in rows if row['setting'] == str(setting)}
    return dict(sorted(found.items()))


def mean_deviation(values):
    """Mean and deviation of a sample; of a single value there is no deviation."""
    return mean(values), stdev(values) if len(values) > 1 else None


def title_of(dataset):
    return dataset.replace('cifar', 'CIFAR-')


def pm(middle, deviation):
    return f'{middle:.2f}' + ('' if deviation is None else f' ± {deviation:.2f}')


def top1(lines, column='top1_last'):
    return [float(line[column]) for line in lines]


def paired(differences):
    """Mean of the differences by seed, its standard error and p of Student's paired t; a single one has neither."""
    n = len(differences)
    if n < 2:
        return mean(differences), None, None
    error = stdev(differences) / n ** 0.5
    return mean(differences), error, student(mean(differences) / error, n - 1) if error else None


def student(t, freedom):
    """Probability that Student's t with so many degrees of freedom is further from 0 than `t`: its closed form."""
    angle = math.atan(abs(t) / freedom ** 0.5)
    cosines = term = 1 if freedom % 2 == 0 else math.cos(angle)
    for k in range(2 if freedom % 2 == 0 else 3, freedom, 2):
        term *= math.cos(angle) ** 2 * (k - 1) / k
        cosines += term
    if freedom == 1:
        return 1 - 2 * angle / math.pi
    inside = math.sin(angle) * cosines
    return 1 - (inside if freedom % 2 == 0 else 2 / math.pi * (angle + inside))


def against_bn(lines, baseline):
    """A row's difference to BN over the seeds that both have, as cells: difference, p, seeds."""
    shared = sorted(lines.keys() & baseline.keys())
    if not shared or lines == baseline:
        return ['', '']
    difference, error, p = paired([float(lines[s]['top1_last']) - float(baseline[s]['top1_last']) for s in shared])
    spread = '' if error is None else f' ± {error:.2f}'
    return [f'{difference:+.2f}{spread}', '' if p is None else f'{p:.3f} (n = {len(shared)})']


def tables(rows, protocols):
    """All tables as Markdown."""
    parts = []
    fit = FIT if rows and 'fit_top1' in rows[0] else {}
    for (dataset, title), settings in tables_of(protocols).items():
        lines = {name: of(rows, setting) for name, setting in settings.items()}
        if not any(lines.values()):
            continue
        paper = paper_of(dataset, title)
        cells = []
        for name, mine in lines.items():
            if not mine:
                continue
            figure = paper.get(name)
            gain = f' ({figure - paper[BN]:+.2f})' if figure and name != BN else ''
            cells.append([
                name, pm(*mean_deviation(top1(mine.values()))),
                ', '.join(f'{value:.2f}' for value in top1(mine.values())),
                *against_bn(mine, lines.get(BN, {})), f'{figure:.2f}{gain}' if figure else '',
                *(pm(*mean_deviation(top1(mine.values(), column))) for column in fit),
                middle(mine.values(), 'seconds_an_epoch', 1), middle(mine.values(), 'peak_mb', 0)])
        parts += [f'**{title}, {title_of(dataset)}**', markdown(
            ['', 'top-1, mean ± deviation', 'every seed', 'minus BN ± standard error', 'p, paired by seed',
             'paper (minus BN)', *fit.values(), 'seconds an epoch', 'peak MB'], cells)]
    return '\n\n'.join(parts)


def middle(lines, column, digits):
    values = [float(line[column]) for line in lines if line[column]]
    return f'{mean(values):.{digits}f}' if values else ''


def groups_of(settings, found):
    """G and what was found for it, of the rows that a plot against G shows."""
    return [(int(name[4:]), found[name]) for name in settings if re.fullmatch(r'G = \d+', name) and found.get(name)]


def plot(rows, protocols, results):
    """Accuracy against G beside the paper's, and against epochs, where BN and FBN of one table are there."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    families = []
    for (dataset, title), settings in tables_of(protocols).items():
        points = groups_of(settings, {name: of(rows, setting) for name, setting in settings.items()})
        if len(points) > 1:
            families.append((dataset, title, settings, points))
    if not families:
        return
    figure_of_epochs, (curves, losses) = plt.subplots(
        2, len(families), figsize=(5 * len(families), 7.5), squeeze=False, sharex='col', layout='constrained')
    figure_of_groups, bars = plt.subplots(
        1, len(families), figsize=(5 * len(families), 4.2), squeeze=False, layout='constrained')
    for curve, loss, bar, (dataset, title, settings, points) in zip(curves, losses, bars[0], families):
        samples = [(g, *mean_deviation(top1(lines.values()))) for g, lines in points]
        x, y, deviations = zip(*samples)
        bar.errorbar(x, y, [d or 0 for d in deviations], color='#1b7fbd', marker='o', capsize=3, label='measured')
        for g, lines in points:
            bar.plot([g] * len(lines), top1(lines.values()), '.', color='#1b7fbd', alpha=0.4)
        paper = groups_of(settings, paper_of(dataset, title))
        if paper and 1 in x:  # its accuracies are of longer runs, mostly of wider networks: shift them onto our BN
            shifted = [(g, y[x.index(1)] + figure - dict(paper)[1]) for g, figure in paper]
            bar.plot(*zip(*shifted), color='#777777', marker='o', mfc='white', ls=':', label="BN and the paper's gain")
        bar.set(title=f'{title}, {title_of(dataset)}', xlabel='FBN groups G (1 is plain BN)', xticks=x,
                ylabel='top-1 in %, not from 0: mean, deviation, seeds')
        for color, (g, lines) in zip(('#777777', '#1b7fbd', '#0b4a73', '#d95f02', '#8c510a'), points):
            epochs = [
                read_rows(results.with_suffix('') / f"{folder('', (settings[f'G = {g}'], seed)).name}.csv")
                for seed in lines]
            x = [int(row['epoch']) + 1 for row in epochs[0]]
            for ax, key in ((curve, 'eval_top1'), (loss, 'train_loss')):
                seeds = [[float(row[key]) for row in rows] for rows in epochs]
                for y in seeds:
                    ax.plot(x, y, color=color, lw=0.5, alpha=0.4)
                ax.plot(x, [mean(values) for values in zip(*seeds)], color=color, lw=2, label=f'G = {g}')
        curve.set(title=f'{title}, {title_of(dataset)}', ylabel='top-1 in %: every seed, mean')
        loss.set(xlabel='epoch', ylabel='training loss, with crops and dropout')
        for ax in (bar, curve, loss):
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
    for name, figure in (('groups', figure_of_groups), ('epochs', figure_of_epochs)):
        figure.savefig(results.with_name(f'{results.stem}_{name}.png'), dpi=130, facecolor='white')
        plt.close(figure)


def commit():
    """What the package is that trains, or nothing where there is no history of it."""
    def git(*args):
        return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True)

    if not shutil.which('git') or git('rev-parse', 'HEAD').returncode:
        return ''
    changed = git('diff', '--quiet', 'HEAD', '--', 'timm_finet').returncode
    return git('rev-parse', '--short=12', 'HEAD').stdout.strip() + ('-changed' if changed else '')


def main():
    own, extra = sys.argv[1:], []
    if '--' in own:
        own, extra = own[:own.index('--')], own[own.index('--') + 1:]
    names = list(dict.fromkeys(section.name for sections in PROTOCOLS.values() for section in sections))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('protocols', nargs='+', choices=list(PROTOCOLS), metavar='PROTOCOL', help=', '.join(PROTOCOLS))
    parser.add_argument('--data-dir', help='without it tables and plots alone are made')
    parser.add_argument('--output', help='folder for checkpoints and logs, kept until all is done')
    parser.add_argument('--jobs', type=int, default=1, help='runs at once, which share the cores (default: 1)')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='after which runs are cut (default: none)')
    parser.add_argument('--only', nargs='+', choices=names, metavar='SECTION', default=[], help=', '.join(names))
    parser.add_argument('--seeds', nargs='+', type=int, default=[], help="instead of the sections' own")
    parser.add_argument('--commit', default=commit(), help='for a copy of the repository that has no history')
    parser.add_argument('--results', type=Path, help='(default: as above)')
    parser.add_argument('--dry-run', action='store_true')
    args = parser.parse_args(own)
    args.extra = extra
    stems = [stem for stem, protocols in FILES.items() if {*args.protocols} & {*protocols}]
    if len(stems) > 1:
        parser.error(f"{' '.join(args.protocols)}: their results are different files: name one protocol at a time.")
    if args.results is None:
        if extra:
            parser.error(
                f'{shlex.join(extra)!r} for train.py makes another experiment: name a file for it by --results.')
        args.results = RESULTS / f'{stems[0]}.csv'

    def rows():
        return read_rows(args.results) if args.results.exists() else []

    failed, runs = [], missing(args.protocols, args.only, args.seeds, rows())
    if args.data_dir or args.dry_run:
        for name in ('data_dir', 'output', 'commit'):
            if not getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} is missing.")
        if args.dry_run:
            print('\n'.join(shlex.join(command(run, args)) for run in runs))
            return
        signal.signal(signal.SIGTERM, lambda *_: sys.exit('stopped; it goes on when started again'))
        try:
            failed = train(runs, args)
        except ValueError as error:
            parser.error(error)
    text = tables(rows(), FILES[stems[0]])
    if args.results == RESULTS / f'{stems[0]}.csv':
        write_block(stems[0], text)
    else:
        print(text)
    plot(rows(), FILES[stems[0]], args.results)
    if failed:
        sys.exit(f'{len(failed)} of {len(runs)} runs failed.')


if __name__ == '__main__':
    main()
