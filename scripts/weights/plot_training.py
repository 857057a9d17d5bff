"""Plot validation accuracy against epochs, as in the paper's Figure 4, from one or more of timm's summary.csv files.

    python -m scripts.weights.plot_training output/train/*/summary.csv
    python -m scripts.weights.plot_training G=1:a/summary.csv G=8:b/summary.csv --output figure4.png

A curve's name is the text before the colon, or else the run's folder. This needs matplotlib (the extra `plots`).
"""
from pathlib import Path

import matplotlib.pyplot as plt

from scripts.report import command_line
from scripts.runs import epochs_of


def plot(runs, output):
    fig, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for run in runs:
        name, _, file = run.rpartition(':')
        rows = epochs_of(Path(file))
        if not rows or 'eval_top1' not in rows[0]:
            raise ValueError(f"{file} has no column 'eval_top1': give a summary.csv of timm.")
        top1 = [float(row['eval_top1']) for row in rows]
        label = f'{name or Path(file).absolute().parent.name} ({top1[-1]:.2f})'
        ax.plot([int(row['epoch']) + 1 for row in rows], top1, label=label)
    ax.set(xlabel='epoch', ylabel='validation accuracy (%)')
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend(title='last epoch in brackets', title_fontsize=8, fontsize=9)
    fig.savefig(output, dpi=150, facecolor='white')


def main():
    parser = command_line(__doc__)
    parser.add_argument('runs', nargs='+', metavar='[NAME:]SUMMARY.CSV')
    parser.add_argument('--output', default='training.png')
    args = parser.parse_args()
    try:
        plot(args.runs, args.output)
    except ValueError as error:
        parser.exit(2, f'plot_training.py: {error}\n')
    print(f'wrote {args.output}')


if __name__ == '__main__':
    main()
