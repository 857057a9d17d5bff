"""Train the embedded weights for photographs: recipe:photos at growing sizes, with soft labels, one run per size.

    python -m scripts.weights.photos SOURCE PACK
    python -m scripts.weights.soft_labels PACK
    python -m scripts.weights.train_photos finet_large_se_g4 --data-dir PACK --output OUTPUT --processes 2
    python -m scripts.weights.embed_weights OUTPUT/photos-finet_large_se_g4-128px_again-seed0/last.pth.tar \\
        finet_large_se_g4.tiny_in200 --data-dir PACK

The learning rate falls linearly over the three sizes and then, from a quarter of its first value, over a second run at
the last size. Each phase starts from the averaged weights of the previous one. Interrupted runs continue when started
again. All runs are recorded in results/train_photos.csv and the folder beside it.
"""
import matplotlib.pyplot as plt

from scripts.report import RESULTS, read_rows
from scripts.runs import Setting, arguments, curve_file, folder, train

CSV = RESULTS / 'train_photos.csv'
PHASES = {  # size in pixels, epochs, learning rate from and to
    '64px': (64, 5, 0.4, 0.288889),
    '96px': (96, 6, 0.288889, 0.155556),
    '128px': (128, 7, 0.155556, 0),
    '128px_again': (128, 7, 0.1, 0),
}
BATCH = 256


def phases(model, processes=1):
    """The settings of a network's phases, by phase."""
    settings, first = {}, ('--warmup-epochs', '1', '--warmup-lr', '0.02')
    for phase, (size, epochs, start, end) in PHASES.items():
        setting = settings[phase] = Setting(f'photos {model} {phase}', (
            '--config', 'recipe:photos', '--model', model, '--dataset', 'torch/soft_labelled',
            '--device-modules', 'timm_finet', 'scripts.weights.soft_labels',
            '--train-split', 'train', '--val-split', 'validation', '--no-prefetcher', '--smoothing', '0',
            '--input-size', '3', str(size), str(size), '--epochs', str(epochs),
            '--lr', f'{start:.6f}', '--min-lr', f'{end:.6f}', '--batch-size', str(BATCH // processes), *first),
            'scripts.weights.soft_labels', processes)
        first = '--initial-checkpoint', str(folder('OUTPUT', (setting, 'SEED')) / 'last.pth.tar')
    return settings


def plot(results):
    """Plot the accuracy of seed 0 against the epochs of all phases, with one color per network."""
    done = [row['setting'] for row in read_rows(results) if row['seed'] == '0']
    fig, ax = plt.subplots(figsize=(7, 4.5), layout='constrained')
    for i, model in enumerate(dict.fromkeys(setting.split()[1] for setting in done)):
        color, epochs = f'C{i}', 0
        for phase, setting in phases(model).items():
            if setting.name not in done:
                break
            top1 = [float(epoch['eval_top1']) for epoch in read_rows(curve_file(results, (setting, 0)))]
            ax.plot(range(epochs + 1, epochs + 1 + len(top1)), top1, '.-', color=color, label=None if epochs else model)
            ax.annotate(f'{PHASES[phase][0]} px, {top1[-1]:.1f}', (epochs + len(top1), top1[-1]), (3, -18), size=8,
                        color=color, textcoords='offset points')
            epochs += len(top1)
    ax.set(xlabel='epoch', ylabel='top-1 in % (EMA, at the size trained at)', title='Tiny-ImageNet-200, seed 0',
           xlim=(0, 30), ylim=0)
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(results.with_suffix('.png'), dpi=150, facecolor='white')


def main():
    parser = arguments(__doc__)
    parser.set_defaults(results=CSV)
    parser.add_argument(
        '--processes', type=int, default=1,
        help='processes of a run, by torchrun; on a CPU, one per core is fastest (default: 1)')
    parser.add_argument('models', nargs='+', metavar='MODEL')
    args = parser.parse_args()
    train([(setting, 0) for model in args.models for setting in phases(model, args.processes).values()], args)


if __name__ == '__main__':
    main()
