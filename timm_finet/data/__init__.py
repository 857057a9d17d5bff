"""Data sets, among them CIFAR with the paper's augmentation. Importing this package registers them with timm."""
from .cifar import (
    CIFAR10First1000, CIFAR10Pad2, CIFAR10Sample, CIFAR100First100, CIFAR100Pad2, Photographs)
from .cifar_gpu import CIFAR10First1000GPU, CIFAR10GPU, CIFAR100First100GPU, CIFAR100GPU

__all__ = [
    'CIFAR10First1000', 'CIFAR10First1000GPU', 'CIFAR10GPU', 'CIFAR10Pad2', 'CIFAR10Sample', 'CIFAR100First100',
    'CIFAR100First100GPU', 'CIFAR100GPU', 'CIFAR100Pad2', 'Photographs']
