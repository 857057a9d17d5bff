"""Rewrites of whole networks: `fuse_fbn` folds normalisation away for inference, `convert_fbn` brings FBN in.

Both find (convolution, BatchNorm) and (linear, BatchNorm) pairs in the traced graph and replace modules in the network
itself, so that its class, its other methods and the prefixes of its state dict stay.
"""
import logging
from copy import deepcopy
from typing import Dict

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from timm.models._input import update_model_args

from .depthwise import DepthwiseConv2d
from .fbn import FBNConv2d
from .pairs import copy_model, find_pairs, is_watched

__all__ = ['fuse_fbn', 'convert_fbn']

_logger = logging.getLogger(__name__)


def _after_norm(norm: nn.Module) -> nn.Module:
    """What remains of a norm layer without its normalisation: timm's BatchNormAct2d carries an activation."""
    rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()


def _replace(model: nn.Module, new: Dict[nn.Module, nn.Module]) -> None:
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            model.set_submodule(name, new[module])


def _fuse_pair(layer: nn.Module, norm: nn.Module) -> nn.Module:
    dtype = layer.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    # .eval(), as torch insists on it; a network in train mode whose norms alone are frozen may be fused
    fused = fuse(deepcopy(layer).to(wide).eval(), deepcopy(norm).to(wide)).to(dtype)
    fused.bias.requires_grad_(layer.weight.requires_grad)
    if isinstance(fused, DepthwiseConv2d):
        fused.__class__ = nn.Conv2d
    return fused.train(layer.training)


def fuse_fbn(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Fold every FBN layer, and every BatchNorm behind a convolution or linear layer, into a plain one with bias.

    Outputs on batches stay, up to rounding; so do class, methods, device, dtype, memory format and `requires_grad`.
    Idempotent. Layers that have hooks stay, and so do those whose tensors the network's forward reads by itself, and
    linear layers whose input the graph does not prove to be `(N, C)`. A warning names what stays for hooks, for such a
    forward, or because `torch.fx` cannot trace what is around it; of a network that it cannot trace at all, FBN layers
    alone are fused.

    Args:
        model: Any network, in eval mode; an `FBNConv2d` itself comes back as `nn.Conv2d`.
        inplace: Change `model`, else a deep copy.

    Raises:
        RuntimeError: A normalisation layer is in train mode.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, _BatchNorm):
            raise RuntimeError(
                f'Cannot fuse {name or type(model).__name__} in train mode: call .eval() on the model first.')
    if isinstance(model, FBNConv2d) and not is_watched(model, set()):
        return model.fuse()
    if not inplace:
        model = copy_model(model)
    layers = [module for module in model.modules() if isinstance(module, FBNConv2d)]
    try:
        pairs, read = find_pairs(model)
    except Exception as error:
        pairs, read = [], set()
        _logger.warning(f'torch.fx cannot trace {type(model).__name__}, only its FBN layers are fused: {error}')
    fused: Dict[nn.Module, nn.Module] = {
        layer: layer.fuse() for layer in layers if not is_watched(layer, read) and not layer._why_called()}
    for layer, norm in pairs:
        fused.update({layer: _fuse_pair(fused.get(layer, layer), norm), norm: _after_norm(norm)})
    _replace(model, fused)
    stayed = [name for name, module in model.named_modules() if isinstance(module, FBNConv2d)]
    if stayed:
        _logger.warning(
            f'{len(stayed)} FBN layers of {type(model).__name__} stay, as hooks or its forward look into them or their '
            f"norm has to be called: {', '.join(stayed)}")
    if 'fused' in getattr(model, '_model_args', {}):
        update_model_args(model, fused=True)  # what timm's save_for_hf writes, and so what loads again
    return model


def convert_fbn(model: nn.Module, fbn_groups: int = 4, affine: bool = True, inplace: bool = False) -> nn.Module:
    """Replace every convolution + BatchNorm pair by an `FBNConv2d`.

    The weights, and in eval mode the outputs, stay at any G: the pair's statistics and affine terms are split evenly
    over the groups, until training estimates each group's own. Depthwise and grouped convolutions, those whose input
    channels G does not divide (a stem, mostly), and those that `fuse_fbn` would leave keep their BatchNorm. How many of
    how many convolutions were converted is logged.

    Args:
        model: Any network that `torch.fx` can trace.
        fbn_groups: G, the FBN groups of each layer.
        affine: False drops the learned gammas and betas (Table 5), and with them their effect on the outputs.
        inplace: Change `model`, else a deep copy.

    Raises:
        ValueError: `fbn_groups` is below 1, `torch.fx` cannot trace the network, or no pair fits.
    """
    if fbn_groups < 1:
        raise ValueError(f'fbn_groups={fbn_groups} must be at least 1.')
    if not inplace:
        model = copy_model(model)
    try:
        pairs, _ = find_pairs(model)
    except Exception as error:
        raise ValueError(f'model={type(model).__name__} cannot be traced by torch.fx: {error}') from error
    pairs = [
        (conv, norm) for conv, norm in pairs
        if type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str) and conv.in_channels % fbn_groups == 0
        and not isinstance(norm, nn.SyncBatchNorm)
    ]
    if not pairs:
        raise ValueError(
            f'model={type(model).__name__} has no convolution + BatchNorm pair that fbn_groups={fbn_groups} fits.')
    count = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    _logger.info(f'{len(pairs)} of the {count} convolutions of {type(model).__name__} converted to FBN.')
    converted: Dict[nn.Module, nn.Module] = {}
    for conv, norm in pairs:
        converted.update({conv: _to_fbn(conv, norm, fbn_groups, affine), norm: _after_norm(norm)})
    _replace(model, converted)
    return model


@torch.no_grad()
def _to_fbn(conv: nn.Conv2d, norm: _BatchNorm, fbn_groups: int, affine: bool) -> FBNConv2d:
    layer = FBNConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, fbn_groups,
        affine and norm.affine, norm.eps, norm.momentum, device=conv.weight.device, dtype=conv.weight.dtype)
    layer.weight = conv.weight
    layer.bn.to(norm.running_mean.dtype)
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    layer.bn.running_mean.copy_((mean / fbn_groups).repeat(fbn_groups))
    layer.bn.running_var.copy_(norm.running_var.repeat(fbn_groups))
    layer.bn.num_batches_tracked.copy_(norm.num_batches_tracked)
    if layer.bn.affine:
        layer.bn.weight.copy_(norm.weight.repeat(fbn_groups)).requires_grad_(norm.weight.requires_grad)
        layer.bn.bias.copy_((norm.bias / fbn_groups).repeat(fbn_groups)).requires_grad_(norm.bias.requires_grad)
    layer.train(conv.training).bn.train(norm.training)
    return layer


def check_form(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> None:
    """Refuse a train-form state dict for a fused model and the reverse, which `strict=False` would half load."""
    own = model.state_dict()
    has_norm, given_norm = (any(key.endswith('running_var') for key in keys) for keys in (own, state_dict))
    if given_norm and not has_norm:
        raise RuntimeError(
            f'The checkpoint is in train form, this {type(model).__name__} is fused: load it into one built without '
            f'fused=True, then call fuse_fbn(model.eval()).')
    # fusing gives layers a bias that they have not had
    biases = [key for key in state_dict if key.endswith('.bias') and key not in own]
    if has_norm and any(key[:-len('bias')] + 'weight' in own for key in biases):
        raise RuntimeError(
            f'The checkpoint is fused, this {type(model).__name__} is in train form: build it with fused=True. '
            f'A fused checkpoint cannot be trained further with batch statistics.')
