"""The embedded weights of photographs: recipe:photos at growing sizes, with soft labels, each size by train.py.

    python -m scripts.weights.photos SOURCE PACK
    python -m scripts.weights.soft_labels PACK
    python -m scripts.weights.train_photos finet_large_se_g4 --data-dir PACK --output OUTPUT --processes 2
    python -m scripts.weights.embed_weights OUTPUT/photos-finet_large_se_g4-128px_again-seed0/last.pth.tar \\
        finet_large_se_g4.tiny_in200 --data-dir PACK

The learning rate falls in one straight line over the three sizes, and once more, from a quarter of its start, over the
last size again; each phase starts from the averaged weights of the one before.
Runs go on, and are recorded in results/train_photos.csv and the folder beside it, as in table2_photos.py, and plotted
(matplotlib, the extra `plots`); without `--data-dir` they are plotted alone.
"""
from typing import NamedTuple

from scripts.cifar_runs import folder
from scripts.paper.table2_photos import arguments, parse, rows_of, run
from scripts.report import RESULTS, read_rows

CSV = RESULTS / 'train_photos.csv'
PHASES = {  # size in pixels, epochs, learning rate from and to
    '64px': (64, 5, 0.4, 0.288889),
    '96px': (96, 6, 0.288889, 0.155556),
    '128px': (128, 7, 0.155556, 0),
    '128px_again': (128, 7, 0.1, 0),
}
BATCH = 256


class Phase(NamedTuple):
    """What cifar_runs.train asks of a run."""
    model: str
    phase: str
    processes: int
    module = 'scripts.weights.soft_labels'

    def __str__(self):
        return f'photos {self.model} {self.phase}'

    def args(self, seed):
        phases = list(PHASES)
        i = phases.index(self.phase)
        size, epochs, start, end = PHASES[self.phase]
        args = [
            '--config', 'recipe:photos', '--model', self.model, '--dataset', 'torch/soft_labelled',
            '--train-split', 'train', '--val-split', 'validation', '--no-prefetcher', '--smoothing', '0',
            '--input-size', '3', str(size), str(size), '--epochs', str(epochs),
            '--lr', f'{start:.6f}', '--min-lr', f'{end:.6f}', '--batch-size', str(BATCH // self.processes),
            '--seed', str(seed)]
        if i:
            before = folder('OUTPUT', (self._replace(phase=phases[i - 1]), seed))
            args += ['--initial-checkpoint', str(before / 'last.pth.tar')]
        else:
            args += ['--warmup-epochs', '1', '--warmup-lr', '0.02']
        return args


def plot(rows, results):
    """Accuracy of seed 0 against the epochs of all phases, a color a network."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    done = dict.fromkeys(row['setting'] for row in rows if row['seed'] == '0')
    fig, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for i, model in enumerate(dict.fromkeys(setting.split()[1] for setting in done)):
        color, epochs = f'C{i}', 0
        for phase, (size, *_) in PHASES.items():
            setting = Phase(model, phase, 1)
            if str(setting) not in done:
                break
            curve = read_rows(results.with_suffix('') / f"{folder('', (setting, 0)).name}.csv")
            top1 = [float(epoch['eval_top1']) for epoch in curve]
            ax.plot(range(epochs + 1, epochs + 1 + len(top1)), top1, '.-', color=color, label=None if epochs else model)
            ax.annotate(f'{size} px, {top1[-1]:.1f}', (epochs + len(top1), top1[-1]), (3, -18), size=8, color=color,
                        textcoords='offset points')
            epochs += len(top1)
    ax.set(xlabel='epoch', ylabel='top-1 in % (EMA, at the size trained at)', title='Tiny-ImageNet-200, seed 0',
           xlim=(0, 30), ylim=0)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(results.with_suffix('.png'), dpi=150, facecolor='white')
    plt.close(fig)


def main():
    parser = arguments(__doc__.splitlines()[0], CSV)
    parser.add_argument(
        '--processes', type=int, default=1, help='of a run, by torchrun: on a CPU one a core is fastest (default: 1)')
    parser.add_argument('models', nargs='*', metavar='MODEL')
    args = parse(parser, CSV)
    if args.data_dir:
        run([Phase(model, phase, args.processes) for model in args.models for phase in PHASES], args, parser)
    plot(rows_of(args.results), args.results)


if __name__ == '__main__':
    main()
