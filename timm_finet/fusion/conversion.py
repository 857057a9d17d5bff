"""Replaces convolutions and their norms with FBN layers."""
from typing import List, Tuple

import torch
import torch.nn as nn

from ..fbn import FBNConv2d
from .folding import after_norm, disable_own_folding, replace

__all__ = ['convert_named', 'fits_fbn']


def fits_fbn(conv: nn.Module, norm: nn.Module, fbn_groups: int) -> bool:
    """Whether an FBN layer with `fbn_groups` groups can do what `conv` and `norm` do."""
    return (
        type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str) and conv.in_channels % fbn_groups == 0
        and isinstance(norm, nn.BatchNorm2d))


def convert_named(
        model: nn.Module, pairs: List[Tuple[str, str]], fbn_groups: int, affine: bool,
        save_memory: bool = False) -> None:
    """Replace each pair `(convolution, norm)`, given by name, with an FBN layer."""
    new = {}
    for conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        new[conv], new[norm] = _to_fbn(conv, norm, fbn_groups, affine, save_memory), after_norm(norm)
    disable_own_folding(model, set(new))
    replace(model, new)


@torch.no_grad()
def _to_fbn(conv: nn.Conv2d, norm: nn.BatchNorm2d, fbn_groups: int, affine: bool, save_memory: bool) -> FBNConv2d:
    layer = FBNConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, fbn_groups,
        affine and norm.affine, norm.eps, norm.momentum, save_memory, device='meta', dtype=norm.running_mean.dtype)
    layer.weight = conv.weight
    bn = layer.bn.to_empty(device=conv.weight.device)
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    bn.running_mean.copy_((mean / fbn_groups).repeat(fbn_groups))
    bn.running_var.copy_(norm.running_var.repeat(fbn_groups))
    bn.track_running_stats = norm.track_running_stats
    if norm.num_batches_tracked is None:
        bn.num_batches_tracked = None
    else:
        bn.num_batches_tracked.copy_(norm.num_batches_tracked)
    if bn.affine:
        bn.weight.copy_(norm.weight.repeat(fbn_groups)).requires_grad_(norm.weight.requires_grad)
        if norm.bias is None:
            bn.bias.zero_().requires_grad_(False)
        else:
            bn.bias.copy_((norm.bias / fbn_groups).repeat(fbn_groups)).requires_grad_(norm.bias.requires_grad)
    layer.train(conv.training).bn.train(norm.training)
    return layer
