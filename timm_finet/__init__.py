"""Finet and Fine-grained Batch Normalization for timm. Importing this package registers its models and data sets."""
from . import data, data_gpu, finet, resnet_fbn  # noqa: F401 (their import registers)
from .fbn import FBNConv2d
from .flops import count_flops
from .rewrite import convert_fbn, fuse_fbn

__all__ = ['FBNConv2d', 'convert_fbn', 'count_flops', 'fuse_fbn']
