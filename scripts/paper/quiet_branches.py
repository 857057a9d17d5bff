"""For train.py's --device-modules: finet_small_g8_quiet, whose gammas start at 1 / sqrt(G).

A sum of G normalised terms is sqrt(G) times as large as one term. In this control, each block's branch starts at the
same scale as with BN.
"""
import torch.nn as nn
from timm.models import register_model

from timm_finet import FBNConv2d
from timm_finet.finet import finet_small_g8


@register_model
def finet_small_g8_quiet(pretrained=False, **kwargs):
    model = finet_small_g8(pretrained, **kwargs)
    for layer in model.modules():
        if isinstance(layer, FBNConv2d):
            nn.init.constant_(layer.bn.weight, layer.fbn_groups ** -0.5)
    return model
