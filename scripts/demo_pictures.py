"""Make the pictures of `timm-finet demo`: the first 40 of each class of CIFAR-10's test set, a lossless sprite, class by class.

    python scripts/demo_pictures.py cifar10.npz
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

with np.load(sys.argv[1]) as arrays:
    pictures = np.concatenate([arrays['test'][arrays['test_labels'] == c][:40] for c in range(10)])
sprite = pictures.reshape(20, 20, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(640, 640, 3)
target = Path(__file__).parents[1] / 'timm_finet' / 'weights' / 'cifar10_test.webp'
Image.fromarray(sprite).save(target, lossless=True, quality=100, method=6)
