"""Compare FBN with BN on CIFAR: train the rows of the tables with timm's train.py, and collect the results.

    python -m scripts.paper.cifar_tables evidence --data-dir DATA --output OUT --jobs 2

`placement` and `evidence` are short, for a CPU. They ask where a block's second ReLU goes, and whether FBN beats BN at
equal widths. `long` asks the second question of networks that fit the few images they are trained on. `paper` is Table
5's own protocol on CIFAR-100. `weights` trains the CIFAR weights that the package embeds.

Results go to results/cifar_short.csv, cifar_long.csv, cifar_paper.csv and cifar_weights.csv, with epochs in folders
beside them.

DATA holds cifar10.npz and cifar100.npz, or torchvision's downloads. The runs that the results lack are started `--jobs`
at a time, the most important first. After an interruption, the same command continues from each run's last epoch.
"""
import importlib
import math
import re
import shlex
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import yaml
from timm.data import create_dataset
from timm.utils.misc import natural_key

from scripts.paper.cifar_plan import PROTOCOLS, RESULTS_OF
from scripts.report import RESULTS, markdown, pm, read_rows
from scripts.runs import arguments, command, curve_file, folder, missing, train
from timm_finet.data.cifar import PAD
from timm_finet.hub.checkpoint import load_checkpoint

PAPER = {  # top-1 of finet_large in Table 5, after 200 epochs
    ('cifar10', 'finet_small'): {'G = 1': 92.584, 'G = 2': 93.082, 'G = 4': 93.532, 'G = 6': 93.286, 'G = 8': 93.674},
    ('cifar100', 'finet_small'): {'G = 1': 75.624, 'G = 2': 76.752, 'G = 4': 76.856, 'G = 6': 76.716, 'G = 8': 77.202},
    ('cifar100', 'finet_small without affine'): {
        'G = 1': 74.216, 'G = 2': 74.382, 'G = 4': 74.486, 'G = 6': 74.772, 'G = 8': 74.734},
}
PAPER['cifar100', 'finet_large'] = PAPER['cifar100', 'finet_small']
BN = 'G = 1'
COLORS = {'G = 1': '#777777', 'G = 2': '#1b7fbd', 'G = 4': '#0b4a73', 'G = 6': '#8c510a',
          'G = 8': '#d95f02'}
FIT = {'fit_loss': 'loss on the training images', 'fit_top1': 'top-1 on the training images'}


@torch.no_grad()
def fit(run, args):
    """Columns that tell how well a finished run fits its training images.

    These are loss and top-1 in per cent on the uncropped images, in eval mode and float32.
    """
    home = folder(args.output, run)
    trained = yaml.safe_load((home / 'args.yaml').read_text())
    if run[0].module:
        importlib.import_module(run[0].module)
    model, _ = load_checkpoint(str(home / 'last.pth.tar'), trained['model'])
    data = create_dataset(trained['dataset'], root=args.data_dir, split='train')
    images, labels = torch.from_numpy(data.data[:, PAD:-PAD, PAD:-PAD]).permute(0, 3, 1, 2), torch.tensor(data.targets)
    mean, std = (torch.tensor(trained[key]).view(3, 1, 1) for key in ('mean', 'std'))
    logits = torch.cat([model((part / 255 - mean) / std) for part in images.split(500)])
    return dict(
        fit_loss=round(F.cross_entropy(logits, labels).item(), 4),
        fit_top1=round(100 * (logits.argmax(1) == labels).double().mean().item(), 3))


def tables_of(stem):
    """The settings of every table of a results file, by data set and title, then by the row's name."""
    found = {}
    for protocol in RESULTS_OF[stem]:
        for section in PROTOCOLS[protocol]:
            found.setdefault((section.dataset, section.title), {}).update(section.rows)
    return {key: dict(sorted(rows.items(), key=lambda row: natural_key(row[0]))) for key, rows in found.items()}


def of(rows, setting):
    """Rows of a setting, by seed."""
    found = {int(row['seed']): row for row in rows if row['setting'] == setting.name}
    return dict(sorted(found.items()))


def top1(lines, column='top1_last'):
    return [float(line[column]) for line in lines]


def paired(differences):
    """Mean of the differences, its standard error and p of Student's paired t; a single one gives only a mean."""
    n = len(differences)
    if n < 2:
        return mean(differences), None, None
    error = stdev(differences) / n ** 0.5
    return mean(differences), error, student(mean(differences) / error, n - 1) if error else None


def student(t, freedom):
    """Probability, in closed form, that Student's t with `freedom` degrees of freedom is further from 0 than `t`."""
    odd, angle = freedom % 2, math.atan(abs(t) / freedom ** 0.5)
    cosines, term = 0, math.cos(angle) if odd else 1
    for k in range(2 + odd, freedom + 2, 2):
        cosines += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    inside = math.sin(angle) * cosines
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def against_bn(lines, baseline):
    """Two cells for a table row: its difference from BN over the seeds that both have, and p with their number."""
    shared = sorted(lines.keys() & baseline.keys())
    if not shared or lines == baseline:
        return ['', '']
    difference, error, p = paired([float(lines[s]['top1_last']) - float(baseline[s]['top1_last']) for s in shared])
    spread = '' if error is None else f' ± {error:.2f}'
    return [f'{difference:+.2f}{spread}', '' if p is None else f'{p:.3f} (n = {len(shared)})']


def average(lines, column, digits):
    values = [float(line[column]) for line in lines if line[column]]
    return f'{mean(values):.{digits}f}' if values else ''


def heading(dataset, title):
    return f"{title}, {dataset.replace('cifar', 'CIFAR-')}"


def table(rows, stem):
    """All tables of a results file."""
    parts = []
    fit = FIT if rows and 'fit_top1' in rows[0] else {}
    for (dataset, title), settings in tables_of(stem).items():
        found = {name: of(rows, setting) for name, setting in settings.items()}
        paper = PAPER.get((dataset, title), {})
        cells = []
        for name, lines in found.items():
            if not lines:
                continue
            mine, figure = lines.values(), paper.get(name)
            gain = f' ({figure - paper[BN]:+.2f})' if figure and name != BN else ''
            cells.append([
                name, pm(top1(mine)), ', '.join(f'{value:.2f}' for value in top1(mine)),
                *against_bn(lines, found.get(BN, {})), f'{figure:.2f}{gain}' if figure else '',
                *(pm(top1(mine, column)) for column in fit),
                average(mine, 'seconds_an_epoch', 1), average(mine, 'peak_mb', 0)])
        if cells:
            parts += [f'**{heading(dataset, title)}**', markdown(
                ['', 'top-1, mean ± deviation', 'every seed', 'minus BN ± standard error', 'p, paired by seed',
                 'paper (minus BN)', *fit.values(), 'seconds per epoch', 'peak MB'], cells)]
    return '\n\n'.join(parts)


def families(results):
    """Tables with rows for several G: by data set and title, the results for each `G = ...` by seed."""
    rows, found = read_rows(results), {}
    for key, settings in tables_of(results.stem).items():
        points = {name: lines for name, setting in settings.items()
                  if re.fullmatch(r'G = \d', name) and (lines := of(rows, setting))}
        if len(points) > 1:
            found[key] = points
    return found


def plot_groups(results):
    """Plot accuracy against G, beside the paper's."""
    found = families(results)
    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4.2), squeeze=False, layout='constrained')
    for ax, (key, points) in zip(axes[0], found.items()):
        x = [int(name.removeprefix('G = ')) for name in points]
        seeds = [top1(lines.values()) for lines in points.values()]
        means = [mean(values) for values in seeds]
        deviations = [stdev(values) if len(values) > 1 else 0 for values in seeds]
        ax.errorbar(x, means, deviations, color='#1b7fbd', marker='o', capsize=3, label='measured')
        for g, values in zip(x, seeds):
            ax.plot([g] * len(values), values, '.', color='#1b7fbd', alpha=0.4)
        # The paper's runs are longer, its networks mostly wider: shift its accuracies onto our BN.
        bn, paper = mean(top1(points[BN].values())), PAPER[key]
        shifted = [bn + paper[name] - paper[BN] for name in points]
        ax.plot(x, shifted, color='#777777', marker='o', mfc='white', ls=':', label="BN and the paper's gain")
        ax.set(title=heading(*key), xlabel='FBN groups G (1 is plain BN)', xticks=x,
               ylabel='top-1 in %, not from 0: mean, deviation, seeds')
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    figure.savefig(results.with_name(f'{results.stem}_groups.png'), dpi=130, facecolor='white')


def plot_epochs(results):
    """Plot accuracy and training loss against epochs, by G."""
    found = families(results)
    figure, axes = plt.subplots(
        2, len(found), figsize=(5 * len(found), 7.5), squeeze=False, sharex='col', layout='constrained')
    for (curve, loss), (key, points) in zip(axes.T, found.items()):
        settings = tables_of(results.stem)[key]
        for name, lines in points.items():
            color = COLORS[name]
            epochs = [read_rows(curve_file(results, (settings[name], seed))) for seed in lines]
            x = [int(row['epoch']) + 1 for row in epochs[0]]
            for ax, column in ((curve, 'eval_top1'), (loss, 'train_loss')):
                seeds = [top1(rows, column) for rows in epochs]
                for y in seeds:
                    ax.plot(x, y, color=color, lw=0.5, alpha=0.4)
                ax.plot(x, [mean(values) for values in zip(*seeds)], color=color, lw=2, label=name)
        curve.set(title=heading(*key), ylabel='top-1 in %: every seed, mean')
        loss.set(xlabel='epoch', ylabel='training loss, with crops and dropout')
        for ax in (curve, loss):
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
    figure.savefig(results.with_name(f'{results.stem}_epochs.png'), dpi=130, facecolor='white')


def main():
    parser = arguments(__doc__)
    names = list(dict.fromkeys(section.name for sections in PROTOCOLS.values() for section in sections))
    parser.add_argument('protocol', choices=list(PROTOCOLS), help=', '.join(PROTOCOLS))
    parser.add_argument('--only', nargs='+', choices=names, metavar='SECTION', default=names, help=', '.join(names))
    parser.add_argument('--dry-run', action='store_true', help="print train.py's commands")
    args = parser.parse_args()
    stem = next(stem for stem, protocols in RESULTS_OF.items() if args.protocol in protocols)
    args.results = args.results or RESULTS / f'{stem}.csv'
    runs = [run for section in PROTOCOLS[args.protocol] if section.name in args.only for run in section.runs]
    if args.dry_run:
        print('\n'.join(shlex.join(command(run, args)) for run in missing(runs, args.results)))
    else:
        train(runs, args, more=fit if stem == 'cifar_long' else None)


if __name__ == '__main__':
    main()
