"""For train.py's --device-modules: finet_small_g8_tied, whose groups share one gamma and one beta per channel.

This is FBN with the statistics of G = 8 and as many affine parameters as G = 1: a control for the effect of the affine
parameters.
"""
import torch.nn as nn
from timm.models import register_model
from torch.nn.utils.parametrize import register_parametrization

from timm_finet import FBNConv2d
from timm_finet.finet import finet_small_g8


class Tie(nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.groups = groups

    def forward(self, shared):
        return shared.repeat(self.groups)

    def right_inverse(self, full):
        return full[:len(full) // self.groups]


@register_model
def finet_small_g8_tied(pretrained=False, **kwargs):
    model = finet_small_g8(pretrained, **kwargs)
    for layer in model.modules():
        if isinstance(layer, FBNConv2d):
            for name in ('weight', 'bias'):
                register_parametrization(layer.bn, name, Tie(layer.fbn_groups))
    return model
