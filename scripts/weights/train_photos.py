"""The embedded weights of photographs: recipe:photos at growing sizes, with soft labels, each size by train.py.

    python -m scripts.weights.photos SOURCE PACK
    python -m scripts.weights.soft_labels PACK
    python -m scripts.weights.train_photos finet_large_se_g4 --data-dir PACK --output OUTPUT --processes 2
    python -m scripts.weights.embed_weights OUTPUT/photos-finet_large_se_g4-128px-seed0/last.pth.tar \\
        finet_large_se_g4.tiny_in200 --data-dir PACK

The learning rate falls in one straight line over all sizes; each starts from the averaged weights of the one before.
Runs go on, and are recorded in results/train_photos.csv and the folder beside it, as in table2_photos.py.
"""
from typing import NamedTuple

from scripts.cifar_runs import folder
from scripts.paper.table2_photos import arguments, parse, run
from scripts.report import RESULTS

CSV = RESULTS / 'train_photos.csv'
PHASES = {64: 5, 96: 6, 128: 7}  # epochs by size in pixels
LR, BATCH = 0.4, 256


class Phase(NamedTuple):
    """What cifar_runs.train asks of a run."""
    model: str
    size: int
    processes: int
    module = 'scripts.weights.soft_labels'

    def __str__(self):
        return f'photos {self.model} {self.size}px'

    def args(self, seed):
        sizes = list(PHASES)
        i = sizes.index(self.size)
        start, end = (LR * (1 - sum(list(PHASES.values())[:k]) / sum(PHASES.values())) for k in (i, i + 1))
        args = [
            '--config', 'recipe:photos', '--model', self.model, '--dataset', 'torch/soft_labelled',
            '--train-split', 'train', '--val-split', 'validation', '--no-prefetcher', '--smoothing', '0',
            '--input-size', '3', str(self.size), str(self.size), '--epochs', str(PHASES[self.size]),
            '--lr', f'{start:.6f}', '--min-lr', f'{end:.6f}', '--batch-size', str(BATCH // self.processes),
            '--seed', str(seed)]
        if i:
            before = folder('OUTPUT', (self._replace(size=sizes[i - 1]), seed))
            args += ['--initial-checkpoint', str(before / 'last.pth.tar')]
        else:
            args += ['--warmup-epochs', '1', '--warmup-lr', '0.02']
        return args


def main():
    parser = arguments(__doc__.splitlines()[0], CSV)
    parser.add_argument(
        '--processes', type=int, default=1, help='of a run, by torchrun: on a CPU one a core is fastest (default: 1)')
    parser.add_argument('models', nargs='+', metavar='MODEL')
    args = parse(parser, CSV)
    run([Phase(model, size, args.processes) for model in args.models for size in PHASES], args, parser)


if __name__ == '__main__':
    main()
