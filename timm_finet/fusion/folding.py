"""Folds norms into the layers in front of them, and tells fused state dicts from those in train form."""
import inspect
from functools import partial
from typing import Any, Dict, List, Set, Tuple

import torch
import torch.nn as nn

from ..fbn import fold
from ..ops.depthwise import DepthwiseConv2d
from .layers import TRANSPOSED

__all__ = ['after_norm', 'check_form', 'folded', 'fuse_named', 'replace', 'set_child', 'set_folded']


def fuse_named(model: nn.Module, pairs: List[Tuple[str, str]], fbn: List[str]) -> None:
    """Fold the norm of each pair `(layer, norm)`, and every FBN layer in `fbn`, all by name."""
    new = {layer: layer.fuse() for layer in map(model.get_submodule, fbn)}
    folds = []
    for layer_name, norm_name in pairs:
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        layer = new.get(layer, layer)
        folds.append((layer, norm, *folded(layer, norm)))
    # The network has not changed so far, and nothing fails from here on.
    _disable_own_folding(model, {norm for _, norm, *_ in folds})
    for layer, norm, weight, bias in folds:
        set_folded(layer, weight, bias)
        new[norm] = after_norm(norm)
    replace(model, new)


@torch.no_grad()
def folded(layer: nn.Module, norm: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias with which `layer` does what `norm` behind it did; computed in float32 at least."""
    is_transposed = isinstance(layer, TRANSPOSED)
    weight = _swap_channels(layer.weight, layer.groups) if is_transposed else layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
    if layer.bias is not None:
        mean = mean - layer.bias
    new_weight, bias = fold(weight.flatten(1)[:, :, None, None], mean, var, norm.weight, norm.bias, norm.eps, groups=1)
    new_weight = new_weight.view(weight.shape)
    if is_transposed:
        new_weight = _swap_channels(new_weight, layer.groups)
    return torch.empty_like(layer.weight).copy_(new_weight), bias.to(weight.dtype)


def _swap_channels(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """From a transposed convolution's `(in, out / groups, ...)` to `(out, in / groups, ...)`, and back."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def set_folded(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Both get the `requires_grad` of the old weight."""
    requires_grad = layer.weight.requires_grad
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad), nn.Parameter(bias, requires_grad)
    if type(layer) is DepthwiseConv2d:  # which has no bias
        layer.__class__ = nn.Conv2d


def after_norm(norm: nn.Module) -> nn.Module:
    """What remains of a norm without its normalisation: timm's BatchNormAct2d contains an activation."""
    children = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    if len(children) == 1:
        remaining = children[0]
    else:
        remaining = nn.Sequential(*children) if children else nn.Identity()
        remaining.training = norm.training
    for name in ('num_features', 'eps', 'momentum', 'affine', 'track_running_stats'):  # other modules may read them
        if hasattr(norm, name) and not hasattr(remaining, name):
            setattr(remaining, name, getattr(norm, name))
    return remaining


def _disable_own_folding(model: nn.Module, norms: Set[nn.Module]) -> None:
    """Let the methods by which modules fold their own norms return the module: its norms are folded already."""
    for module in model.modules():
        if norms.isdisjoint(module.modules()):
            continue
        for name in ('fuse', 'reparameterize', 'switch_to_deploy'):  # what timm's reparameterize_model calls
            method = getattr(module, name, None)
            if callable(getattr(type(module), name, None)) and all(  # a fold takes flags at most
                    isinstance(p.default, bool) for p in inspect.signature(method).parameters.values()):
                setattr(module, name, partial(_return_first, module))


def _return_first(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    return module


def replace(model: nn.Module, new: Dict[nn.Module, nn.Module]) -> None:
    """Put new modules in the place of old ones, wherever in the network they stand."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, name = path.rpartition('.')
            set_child(model.get_submodule(parent), name, new[module])


def set_child(parent: nn.Module, name: str, child: nn.Module) -> None:
    parent.register_module(name, child)  # some classes have a `__setattr__` of their own
    if name == '_orig_mod':  # torch.compile has bound what it calls
        parent._initialize()


def check_form(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> None:
    """Check that a state dict is of the model's form, train form or fused: `strict=False` would half load the other.

    Raises:
        RuntimeError: It is not.
    """
    own = model.state_dict()
    has_norm, given_norm = (any(key.endswith('running_var') for key in keys) for keys in (own, state_dict))
    if given_norm and not has_norm:
        raise RuntimeError(
            f'The checkpoint is in train form, this {type(model).__name__} is fused: load it into one built without '
            f'fused=True, then call fuse_fbn(model.eval()).')
    # Fusing gives layers a bias that they did not have.
    biases = [key for key in state_dict if key.endswith('.bias') and key not in own]
    if has_norm and any(key[:-len('bias')] + 'weight' in own for key in biases):
        raise RuntimeError(
            f'The checkpoint is fused, this {type(model).__name__} is in train form: build it with fused=True. '
            f'A fused checkpoint cannot be trained further with batch statistics.')
