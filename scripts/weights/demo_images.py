"""Make the shipped images, as lossless sprites in order of class.

They are the first 40 images of each class of CIFAR-10's test set, on which `timm-finet demo` and `export` check
networks, and the first 10 of each class of its training set, on which `export --int8` calibrates.

    python -m scripts.weights.demo_images cifar10.npz
"""
from math import isqrt
from pathlib import Path

import numpy as np
from PIL import Image

from scripts.report import command_line

WEIGHTS = Path(__file__).parents[2] / 'timm_finet' / 'weights'


def main():
    parser = command_line(__doc__)
    parser.add_argument('data', metavar='cifar10.npz')
    args = parser.parse_args()
    with np.load(args.data) as arrays:
        for split, each in (('test', 40), ('train', 10)):
            images = np.concatenate([arrays[split][arrays[f'{split}_labels'] == c][:each] for c in range(10)])
            side = isqrt(len(images))
            sprite = images.reshape(side, side, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(side * 32, side * 32, 3)
            Image.fromarray(sprite).save(WEIGHTS / f'cifar10_{split}.webp', lossless=True, quality=100, method=6)


if __name__ == '__main__':
    main()
