"""Validation accuracy against epochs, the paper's Figure 4, from any number of timm's summary.csv files.

    python -m scripts.weights.plot_training output/train/*/summary.csv
    python -m scripts.weights.plot_training G=1:a/summary.csv G=8:b/summary.csv --output figure4.png --title Finet

A curve is named by what stands before the colon, else by the run's folder. Needs matplotlib (the extra `plots`).
"""
import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402


def read(file, column):
    """Epochs and values. A resumed run writes another header, and its epochs again: the later ones count."""
    with open(file, newline='') as lines:
        rows = list(csv.DictReader(lines))
    if not rows or column not in rows[0]:
        raise ValueError(f'{file} has no column {column!r}: give a summary.csv of timm, and one of its columns.')
    points = {int(row['epoch']): float(row[column]) for row in rows if row['epoch'] != 'epoch'}
    return zip(*sorted(points.items()))


def plot(runs, output, column='eval_top1', title=''):
    fig, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for run in runs:
        name, _, file = run.rpartition(':')
        epochs, values = read(file, column)
        name = name or Path(file).absolute().parent.name
        ax.plot([epoch + 1 for epoch in epochs], values, label=f'{name} ({values[-1]:.2f})')
    ax.set(xlabel='epoch', ylabel={'eval_top1': 'validation accuracy (%)'}.get(column, column), title=title)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend(title='last epoch in brackets', title_fontsize=8, fontsize=9)
    fig.savefig(output, dpi=150, facecolor='white')
    plt.close(fig)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', metavar='[NAME:]SUMMARY.CSV')
    parser.add_argument('--output', default='training.png')
    parser.add_argument('--column', default='eval_top1')
    parser.add_argument('--title', default='')
    args = parser.parse_args()
    try:
        plot(args.runs, args.output, args.column, args.title)
    except (OSError, ValueError) as error:
        parser.exit(2, f'plot_training.py: {error}\n')
    print(f'wrote {args.output}')


if __name__ == '__main__':
    main()
