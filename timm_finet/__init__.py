"""Finet and Fine-grained Batch Normalization for timm. Importing this package registers its models and data sets."""
import sys

from . import data, finet, resnet_fbn  # noqa: F401 (their import registers)
from .fbn import FBNConv2d
from .flops import count_flops
from .ops import moment_form, sync
from .rewrite import convert_fbn, fuse_fbn

__version__ = '0.1.0'
__all__ = ['FBNConv2d', 'convert_fbn', 'count_flops', 'fuse_fbn']

# Where these two stood before there was a folder for the arithmetic.
sys.modules.update({f'{__name__}.moment_form': moment_form, f'{__name__}.sync': sync})
