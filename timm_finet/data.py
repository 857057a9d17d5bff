"""CIFAR as the paper augments it (section 5.3): zero-pad to 36 px, crop 32 px at random; timm's loader flips.

Importing this module makes `--dataset torch/cifar10_pad2` and `torch/cifar100_pad2` known to timm.
"""
import os
import random

import numpy as np
from PIL import Image
from timm.data import dataset_factory
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

__all__ = ['CIFAR10Pad2', 'CIFAR100Pad2']

PAD = 2


class _Pad2:
    """torchvision's CIFAR dataset, with the padded crop for training and two more places to read from.

    Args:
        root: A folder that holds torchvision's download; or `<name>.npz` (arrays `train`, `train_labels`, `test`,
            `test_labels`; pictures `(n, 32, 32, 3)` uint8) or such a file itself; or the folders `train` and
            `validation` with one folder of 32 px pictures a class.

    Raises:
        FileNotFoundError: None of the three is there.
    """

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        root = os.fspath(root)
        archive = root if root.endswith('.npz') else os.path.join(root, f'{self.name}.npz')
        folder = os.path.join(root, 'train' if train else 'validation')
        if os.path.isfile(archive):
            split = 'train' if train else 'test'
            with np.load(archive) as arrays:
                self._from_arrays(arrays[split], arrays[f'{split}_labels'], root, train, transform, target_transform)
        elif os.path.isdir(folder):
            files = ImageFolder(folder)
            pictures = np.stack([np.asarray(picture) for picture, _ in files])
            self._from_arrays(pictures, files.targets, root, train, transform, target_transform)
        else:
            try:
                super().__init__(root, train, transform, target_transform, download)
            except RuntimeError as error:
                raise FileNotFoundError(
                    f'root={root!r} holds neither {self.base_folder} (torchvision\'s download, --dataset-download), nor '
                    f'{self.name}.npz, nor the folders train and validation.') from error
        if train:
            self.data = np.pad(self.data, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))

    def _from_arrays(self, data, targets, root, train, transform, target_transform):
        self.root, self.train, self.transform, self.target_transform = root, train, transform, target_transform
        self.data, self.targets = data, [int(target) for target in targets]

    def __getitem__(self, index):
        picture, target = self.data[index], self.targets[index]
        if self.train:
            top, left = random.randint(0, 2 * PAD), random.randint(0, 2 * PAD)
            picture = picture[top:top + 32, left:left + 32]
        picture = Image.fromarray(picture)
        if self.transform is not None:
            picture = self.transform(picture)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return picture, target


class CIFAR10Pad2(_Pad2, CIFAR10):
    name = 'cifar10'


class CIFAR100Pad2(_Pad2, CIFAR100):
    name = 'cifar100'


# A private dict of timm's, pinned by a test: there is no public way to name a new dataset for its scripts.
dataset_factory._TORCH_BASIC_DS.update(cifar10_pad2=CIFAR10Pad2, cifar100_pad2=CIFAR100Pad2)
