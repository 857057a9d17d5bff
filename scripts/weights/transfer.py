"""Do weights of photographs transfer? Fine-tuned on a few images of other classes against from scratch.

    python -m scripts.weights.transfer --models finet_small_se_g4.tiny_in200 --data-dir DATA --imagenette SOURCE \\
        --seeds 0 1 2

Two sets: CIFAR-10's first 5,000 training images, validated on its whole test set, and Imagenette's first 100 of each of
its ten classes, none of which is among Tiny-ImageNet's 200, validated on all of its own. DATA as for
torch/cifar10_pad2; SOURCE as photos.py takes it, such as a clone of github.com/thunderInfy/imagenette. Without SOURCE
it is CIFAR-10 alone.

All runs use recipe:finetune at the image size of the weights, in bfloat16, for the same number of steps; those from
scratch leave out its `pretrained` alone, and run a second time at a learning rate five times as high. Runs go on, and
are recorded in results/transfer.csv, as in table2_photos.py.
"""
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image

from scripts.paper.cifar_tables import mean_deviation, pm, top1
from scripts.paper.table2_photos import arguments, parse, rows_of, run
from scripts.report import RESULTS, markdown, write_block
from scripts.weights import photos
from timm_finet.commands.run import find_recipe
from timm_finet.data import datasets
from timm_finet.data.cifar import PAD, CIFAR10Pad2

CSV = RESULTS / 'transfer.csv'
TRAIN, PER_CLASS = 5000, 100
CIFAR10, IMAGENETTE = f'cifar10_{TRAIN}', f'imagenette_{10 * PER_CLASS}'
RATES = {'fine-tuned': 0.02, 'from scratch': 0.02, 'from scratch, higher rate': 0.1}


class Setting(NamedTuple):
    data: str
    model: str
    start: str
    module = ''
    processes = 1

    def __str__(self):
        return f'{self.data} {self.model} {self.start}'

    def args(self, seed):
        config = ['--config', 'recipe:finetune'] if self.start == 'fine-tuned' else without_pretrained('finetune')
        return [
            *config, '--model', self.model, '--train-split', f'{self.data}/train.tar',
            '--val-split', f'{self.data}/validation.tar', '--num-classes', '10', '--lr', str(RATES[self.start]),
            '--amp', '--amp-dtype', 'bfloat16', '--channels-last', '--seed', str(seed)]


def without_pretrained(name):
    """A recipe as options, as train.py has none that unsays `pretrained: true`."""
    args = []
    for key, value in yaml.safe_load(Path(find_recipe(f'recipe:{name}')).read_text()).items():
        if key != 'pretrained':
            values = [] if value is True else value if isinstance(value, list) else [value]
            args += [f"--{key.replace('_', '-')}", *map(str, values)]
    return args


def pack_cifar(root, folder, train=TRAIN):
    """CIFAR-10's first `train` training images and all of its test images, as photos.py packs images."""
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
    """Imagenette's first `per_class` training images of each class and all of its validation images."""
    _, paths, read = photos.open_source(source)
    found = photos.find_images(paths, read)
    if not all(found.values()):
        raise ValueError(f'--imagenette={source} must hold folders `train` and `val` with a folder of images a class.')
    folder.mkdir(parents=True, exist_ok=True)
    for split, images in found.items():
        if split == 'train':
            images = photos.limit(images, 10, per_class)
        photos.pack(images, read, folder / f'{split}.tar')


def table(rows):
    if not rows:
        return ''
    cells = []
    settings = sorted(dict.fromkeys(row['setting'] for row in rows), key=lambda name: name.split()[:2])
    for name in settings:
        mine = [row for row in rows if row['setting'] == name]
        data, model, start = name.split(' ', 2)
        cells.append([
            data, f'`{model}`', start, pm(*mean_deviation(top1(mine))), pm(*mean_deviation(top1(mine, 'top1_best'))),
            ', '.join(row['seed'] for row in mine)])
    return markdown(['images', '', '', 'top-1, last epoch', 'best epoch', 'seeds'], cells)


def main():
    parser = arguments(__doc__.splitlines()[0], CSV)
    parser.add_argument('--models', nargs='+', default=[], metavar='MODEL.TAG')
    parser.add_argument('--imagenette', type=Path, metavar='SOURCE')
    args = parse(parser, CSV)
    if args.data_dir:
        folder = Path(args.output, 'data')
        pack_cifar(args.data_dir, folder / CIFAR10)
        sets = [CIFAR10]
        if args.imagenette:
            try:
                pack_imagenette(args.imagenette, folder / IMAGENETTE)
            except ValueError as error:
                parser.error(error)
            sets.append(IMAGENETTE)
        args.data_dir = str(folder)
        run([Setting(data, model, start) for data in sets for model in args.models for start in RATES], args, parser)
    text = table(rows_of(args.results))
    if args.results == CSV:
        write_block('transfer', text)
    else:
        print(text)


if __name__ == '__main__':
    main()
