"""CIFAR with the paper's augmentation (section 5.3), and folders of photographs, turned as their EXIF data say.

CIFAR's training images are zero-padded to 36 px and cropped to 32 px at random; timm's loader flips them. Importing
this module registers `--dataset torch/cifar10_pad2`, `torch/cifar100_pad2`, `torch/cifar10_first1000`,
`torch/cifar100_first100`, `torch/cifar10_sample` and `torch/photographs` with timm.
"""
import os
import random

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset, dataset_factory
from timm.utils import random_seed
from timm.utils.distributed import is_distributed_env
from torch.utils.data import get_worker_info
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from ..images import read_image, shipped_images

__all__ = ['CIFAR10First1000', 'CIFAR10Pad2', 'CIFAR10Sample', 'CIFAR100First100', 'CIFAR100Pad2', 'Photographs']

PAD = 2


def first_of_each_class(targets, count):
    """Indices of each class's first `count` images, in the order of the data set."""
    targets = np.asarray(targets)
    return np.sort(np.concatenate([np.flatnonzero(targets == label)[:count] for label in np.unique(targets)]))


class _Pad2:
    """torchvision's CIFAR dataset, with the padded crop for training and two more sources of images.

    Args:
        root: One of these:
            - a folder with torchvision's download;
            - a folder with `<name>.npz`, or the path of an .npz file, with the arrays `train`, `train_labels`, `test`
              and `test_labels`; images are `(n, 32, 32, 3)` uint8;
            - a folder with the folders `train` and `validation`, each with one folder of 32 px images per class.

    Raises:
        FileNotFoundError: `root` is none of these.
    """

    images_per_class = None  # training images per class, the first of each; None for all

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        arrays = self._read(root, train)
        if arrays is None:
            try:
                super().__init__(root, train, transform, target_transform, download)
            except RuntimeError as error:
                raise FileNotFoundError(
                    f'root={root!r} holds neither {self.base_folder} (torchvision\'s download, --dataset-download), '
                    f'nor {self.name}.npz, nor the folders train and validation.') from error
        else:
            self.root, self.train, self.transform, self.target_transform = root, train, transform, target_transform
            self.data, self.targets = arrays[0], [int(target) for target in arrays[1]]
        if train:
            if self.images_per_class is not None:
                first = first_of_each_class(self.targets, self.images_per_class)
                self.data, self.targets = self.data[first], [self.targets[i] for i in first]
            self.data = np.pad(self.data, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
            self.seed, self.seeded, self.has_workers = torch.initial_seed(), -1, True
            self.epoch = torch.tensor(-1).share_memory_()  # loader workers live longer than an epoch
            # In several processes train.py has to call the sampler's set_epoch. Up to timm 1.0.28 it does so only if
            # the dataset has none.
            if not is_distributed_env():
                self.set_epoch = self._set_epoch

    def _read(self, root, train):
        """Images and labels, or None if torchvision has to read its own download."""
        root = os.fspath(root or '.')
        archive = root if root.endswith('.npz') else os.path.join(root, f'{self.name}.npz')
        folder = os.path.join(root, 'train' if train else 'validation')
        if os.path.isfile(archive):
            split = 'train' if train else 'test'
            with np.load(archive) as arrays:
                return arrays[split], arrays[f'{split}_labels']
        if os.path.isdir(folder):
            files = ImageFolder(folder)
            return np.stack([np.asarray(image) for image, _ in files]), files.targets

    def _set_epoch(self, epoch):
        """Reseed all random numbers from the seed and the epoch, so that a resumed run repeats an unbroken one.

        timm's train.py calls this before each epoch. Loader workers do the same at their first image of an epoch.
        """
        self._start(epoch, 0)
        if self.epoch >= 0 and self.has_workers:
            torch.empty((), dtype=torch.int64).random_()  # torch's loader makes this draw before its first epoch only
        self.epoch.fill_(epoch)

    def _start(self, epoch, process):
        random_seed(int(np.random.SeedSequence((self.seed, epoch, process)).generate_state(1)[0]))

    def __getitem__(self, index):
        image, target = self.data[index], self.targets[index]
        if self.train:
            worker = get_worker_info()
            if worker is None:
                self.has_workers = False
            elif self.seeded != self.epoch.item():
                self.seeded = self.epoch.item()
                self._start(self.seeded, worker.id + 1)
            top, left = random.randint(0, 2 * PAD), random.randint(0, 2 * PAD)
            image = image[top:top + 32, left:left + 32]
        image = Image.fromarray(image)
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target


class CIFAR10Pad2(_Pad2, CIFAR10):
    name = 'cifar10'


class CIFAR100Pad2(_Pad2, CIFAR100):
    name = 'cifar100'


class CIFAR10First1000(CIFAR10Pad2):
    """The first 1,000 training images of each class, and all test images."""

    images_per_class = 1000


class CIFAR100First100(CIFAR100Pad2):
    """The first 100 training images of each class, and all test images."""

    images_per_class = 100


class CIFAR10Sample(CIFAR10Pad2):
    """The shipped CIFAR-10 images, which need no download: 30 per class for training, 10 for validation."""

    def __init__(self, root=None, *args, **kwargs):
        super().__init__(root, *args, **kwargs)

    def _read(self, root, train):
        images, labels = shipped_images()
        mine = [i for i in range(len(labels)) if (i % 40 < 30) == train]
        return np.stack([np.asarray(images[i]) for i in mine]), [labels[i] for i in mine]


class Photographs(ImageDataset):
    """timm's image folders, one per class under `train` and `validation`, read by `read_image`.

    timm's own class does not turn images as their EXIF data say.

    Raises:
        RuntimeError: The folder holds no images.
        ValueError: An image cannot be read. timm's own class would use the next image instead.
    """

    def __init__(self, root, train=True, download=False):
        super().__init__(root, reader=create_dataset('', root, 'train' if train else 'validation').reader)

    def __getitem__(self, index):
        file, target = self.reader.samples[index]
        image = read_image(file)
        return image if self.transform is None else self.transform(image), target


# A private dict of timm, pinned by a test: timm has no public way to register a dataset for its scripts.
dataset_factory._TORCH_BASIC_DS.update(
    cifar10_pad2=CIFAR10Pad2, cifar100_pad2=CIFAR100Pad2, cifar10_first1000=CIFAR10First1000,
    cifar100_first100=CIFAR100First100, cifar10_sample=CIFAR10Sample, photographs=Photographs)
