"""Do weights of photographs transfer? Fine-tuned on CIFAR-10's first 5,000 training images against from scratch.

    python -m scripts.weights.transfer --models finet_large_se_g4.tiny_in200 --data-dir DATA --seeds 0 1 2

DATA as for torch/cifar10_pad2. All runs use recipe:finetune at the image size of the weights, for the same number of
steps; those from scratch leave out its `pretrained` alone, and run a second time at a learning rate five times as high.
Validation is CIFAR-10's whole test set. Runs go on, and are recorded in results/transfer.csv, as in table2_photos.py.
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
from timm_finet.data import PAD, CIFAR10Pad2
from timm_finet.finet import CIFAR10_CLASSES
from timm_finet.launch import find_recipe

CSV = RESULTS / 'transfer.csv'
TRAIN = 5000
RATES = {'fine-tuned': 0.02, 'from scratch': 0.02, 'from scratch, higher rate': 0.1}


class Setting(NamedTuple):
    model: str
    start: str
    module = ''
    processes = 1

    def __str__(self):
        return f'cifar10_{TRAIN} {self.model} {self.start}'

    def args(self, seed):
        config = ['--config', 'recipe:finetune'] if self.start == 'fine-tuned' else without_pretrained('finetune')
        return [
            *config, '--model', self.model, '--train-split', 'train.tar', '--val-split', 'validation.tar',
            '--num-classes', '10', '--lr', str(RATES[self.start]), '--seed', str(seed)]


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
            f'{label}_{CIFAR10_CLASSES[label]}/{i:05}.png': i for i, label in zip(range(len(images)), data.targets)}

        def read(index):
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(images[index])).save(file, 'PNG')
            return file.getvalue()

        photos.pack(places, read, folder / f'{split}.tar')


def table(rows):
    if not rows:
        return ''
    cells = []
    for name in dict.fromkeys(row['setting'] for row in rows):
        mine = [row for row in rows if row['setting'] == name]
        _, model, start = name.split(' ', 2)
        cells.append([
            f'`{model}`', start, pm(*mean_deviation(top1(mine))), pm(*mean_deviation(top1(mine, 'top1_best'))),
            ', '.join(row['seed'] for row in mine)])
    return markdown(['', '', 'top-1, last epoch', 'best epoch', 'seeds'], cells)


def main():
    parser = arguments(__doc__.splitlines()[0], CSV)
    parser.add_argument('--models', nargs='+', default=[], metavar='MODEL.TAG')
    args = parse(parser, CSV)
    if args.data_dir:
        folder = Path(args.output, 'data')
        pack_cifar(args.data_dir, folder)
        args.data_dir = str(folder)
        run([Setting(model, start) for model in args.models for start in RATES], args, parser)
    text = table(rows_of(args.results))
    if args.results == CSV:
        write_block('transfer', text)
    else:
        print(text)


if __name__ == '__main__':
    main()
