"""Do the weights for photographs transfer? Fine-tuning on a few images of other classes against training from scratch.

    python -m scripts.weights.transfer --models finet_small_se_g4.tiny_in200 --data-dir DATA --imagenette SOURCE \\
        --seeds 0 1 2

There are two data sets. One is CIFAR-10's first 5,000 training images, validated on its whole test set. The other is
the first 100 training images of each of Imagenette's ten classes, none of which is among Tiny-ImageNet's 200, validated
on all of its validation images. DATA is as for torch/cifar10_pad2, and SOURCE as for photos.py, e.g. a clone of
github.com/thunderInfy/imagenette.

All runs use recipe:finetune at the image size of the weights, in bfloat16, for the same number of steps. Those from
scratch differ only in leaving out `pretrained`, and are repeated at a learning rate five times as high. Interrupted
runs continue when started again. All runs are recorded in results/transfer.csv.
"""
import io
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from scripts.report import RESULTS, markdown, pm
from scripts.runs import Setting, arguments, train
from scripts.weights import photos
from timm_finet.commands.run import find_recipe
from timm_finet.data import datasets
from timm_finet.data.cifar import PAD, CIFAR10Pad2

TRAIN, PER_CLASS = 5000, 100
CIFAR10, IMAGENETTE = f'cifar10_{TRAIN}', f'imagenette_{10 * PER_CLASS}'
RATES = {'fine-tuned': 0.02, 'from scratch': 0.02, 'from scratch, higher rate': 0.1}


def setting(data, model, start):
    config = ['--config', 'recipe:finetune'] if start == 'fine-tuned' else without_pretrained('finetune')
    return Setting(f'{data} {model} {start}', (
        *config, '--model', model, '--train-split', f'{data}/train.tar', '--val-split', f'{data}/validation.tar',
        '--num-classes', '10', '--lr', str(RATES[start]), '--amp', '--amp-dtype', 'bfloat16', '--channels-last'))


def without_pretrained(name):
    """A recipe as options, as train.py has no option that undoes `pretrained: true`."""
    args = []
    for key, value in yaml.safe_load(Path(find_recipe(f'recipe:{name}')).read_text()).items():
        if key != 'pretrained':
            values = [] if value is True else value if isinstance(value, list) else [value]
            args += [f"--{key.replace('_', '-')}", *map(str, values)]
    return args


def pack_cifar(root, folder, train=TRAIN):
    """Pack CIFAR-10's first `train` training images and all of its test images, as photos.py packs images."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ('train', 'validation'):
        data = CIFAR10Pad2(root, train=split == 'train')
        images = data.data[:train, PAD:-PAD, PAD:-PAD] if split == 'train' else data.data
        places = {
            f'{label}_{datasets.CIFAR10.classes[label]}/{i:05}.png': i
            for i, label in zip(range(len(images)), data.targets)}

        def read(index):
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(images[index])).save(file, 'PNG')
            return file.getvalue()

        photos.pack(places, read, folder / f'{split}.tar')


def pack_imagenette(source, folder, per_class=PER_CLASS):
    """Pack Imagenette's first `per_class` training images of each class and all of its validation images."""
    found = photos.find_images(source)
    if not all(found.values()):
        raise ValueError(f'--imagenette={source} must hold folders `train` and `val`, each with a folder per class.')
    folder.mkdir(parents=True, exist_ok=True)
    by_class = {}
    for place in found['train']:
        by_class.setdefault(place.split('/')[0], []).append(place)
    first = [place for places in by_class.values() for place in places[:per_class]]
    photos.pack({place: found['train'][place] for place in first}, Path.read_bytes, folder / 'train.tar')
    photos.pack(found['validation'], Path.read_bytes, folder / 'validation.tar')


def table(rows):
    cells = []
    for name in sorted({row['setting']: None for row in rows}, key=lambda name: name.split()[:2]):
        mine = [row for row in rows if row['setting'] == name]
        data, model, start = name.split(' ', 2)
        last, best = (pm([float(row[f'top1_{which}']) for row in mine]) for which in ('last', 'best'))
        cells.append([data, f'`{model}`', start, last, best, ', '.join(row['seed'] for row in mine)])
    return markdown(['images', '', '', 'top-1, last epoch', 'best epoch', 'seeds'], cells)


def main():
    parser = arguments(__doc__)
    parser.set_defaults(results=RESULTS / 'transfer.csv')
    parser.add_argument('--models', nargs='+', required=True, metavar='MODEL.TAG')
    parser.add_argument('--imagenette', type=Path, required=True, metavar='SOURCE')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    args = parser.parse_args()
    folder = Path(args.output, 'data')
    pack_cifar(args.data_dir, folder / CIFAR10)
    pack_imagenette(args.imagenette, folder / IMAGENETTE)
    args.data_dir = str(folder)
    train([(setting(data, model, start), seed)
           for seed in args.seeds for data in (CIFAR10, IMAGENETTE) for model in args.models for start in RATES], args)


if __name__ == '__main__':
    main()
