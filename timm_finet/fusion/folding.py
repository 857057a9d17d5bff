"""Folds norms into the layers in front of them, and distinguishes fused state dicts from those in train form."""
import inspect
from functools import partial
from typing import Any, Dict, List, Set, Tuple

import torch
import torch.nn as nn

from ..fbn import fold
from ..ops.depthwise import DepthwiseConv2d
from .layers import TRANSPOSED

__all__ = [
    'after_norm', 'check_form', 'disable_own_folding', 'folded', 'fuse_named', 'replace', 'set_child', 'set_folded']


def fuse_named(model: nn.Module, pairs: List[Tuple[str, str]], fbn: List[str]) -> None:
    """Fold the norm of each pair `(layer, norm)` and every FBN layer in `fbn`, all given by name."""
    new = {layer: layer.fuse() for layer in map(model.get_submodule, fbn)}
    folds = []
    for layer_name, norm_name in pairs:
        layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
        layer = new.get(layer, layer)
        folds.append((layer, norm, *folded(layer, norm)))
    # Up to here the network has not changed, and from here on nothing fails.
    disable_own_folding(model, {norm for _, norm, *_ in folds})
    for layer, norm, weight, bias in folds:
        set_folded(layer, weight, bias)
        new[norm] = after_norm(norm)
    replace(model, new)


@torch.no_grad()
def folded(layer: nn.Module, norm: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the weight and bias with which `layer` includes the `norm` behind it.

    They are computed in at least float32 and returned in the dtype of the layer's weight.
    """
    is_transposed = isinstance(layer, TRANSPOSED)
    weight = _swap_channels(layer.weight, layer.groups) if is_transposed else layer.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    mean, var = norm.running_mean.to(weight.device, dtype), norm.running_var.to(weight.device, dtype)
    if layer.bias is not None:
        mean = mean - layer.bias
    new_weight, bias = fold(weight.flatten(1)[:, :, None, None], mean, var, norm.weight, norm.bias, norm.eps, groups=1)
    new_weight = new_weight.view(weight.shape)
    if is_transposed:
        new_weight = _swap_channels(new_weight, layer.groups)
    return torch.empty_like(layer.weight).copy_(new_weight), bias.to(weight.dtype)


def _swap_channels(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Convert a transposed convolution's weight between `(in, out / groups, ...)` and `(out, in / groups, ...)`."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def set_folded(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Set the weight and bias of a layer; both get the `requires_grad` of the old weight."""
    requires_grad = layer.weight.requires_grad
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad), nn.Parameter(bias, requires_grad)
    if type(layer) is DepthwiseConv2d:  # it trains without a bias
        layer.__class__ = nn.Conv2d


def after_norm(norm: nn.Module) -> nn.Module:
    """Return what remains of a norm without its normalisation: timm's BatchNormAct2d contains an activation."""
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


def disable_own_folding(model: nn.Module, norms: Set[nn.Module]) -> None:
    """Make the methods that fold a module's own norms return the module unchanged, because `norms` are replaced."""
    for module in model.modules():
        if norms.isdisjoint(module.modules()):
            continue
        for name in ('fuse', 'reparameterize', 'switch_to_deploy'):  # what timm's reparameterize_model calls
            method = getattr(module, name, None)
            if callable(getattr(type(module), name, None)) and all(  # a fold takes no arguments except flags
                    isinstance(p.default, bool) for p in inspect.signature(method).parameters.values()):
                setattr(module, name, partial(_return_first, module))


def _return_first(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    return module


def replace(model: nn.Module, new: Dict[nn.Module, nn.Module]) -> None:
    """Replace old modules with new ones in every place of the network."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, name = path.rpartition('.')
            set_child(model.get_submodule(parent), name, new[module])


def set_child(parent: nn.Module, name: str, child: nn.Module) -> None:
    parent.register_module(name, child)  # some classes override `__setattr__`
    if name == '_orig_mod':  # torch.compile has to bind the forward of the new child
        parent._initialize()


def check_form(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> None:
    """Check that a state dict and the model are both in train form or both fused.

    (`load_state_dict(strict=False)` would load a part of the other form without an error.)

    Raises:
        RuntimeError: The state dict has the other form.
    """
    own = model.state_dict()
    has_norm, given_norm = (any(key.endswith('running_var') for key in keys) for keys in (own, state_dict))
    if given_norm and not has_norm:
        raise RuntimeError(
            f'The checkpoint is in train form, but this {type(model).__name__} is fused: load the checkpoint into a '
            f'model built without fused=True, then call fuse_fbn(model.eval()).')
    # Fusing gives layers a bias that they did not have.
    biases = [key for key in state_dict if key.endswith('.bias') and key not in own]
    if has_norm and any(key[:-len('bias')] + 'weight' in own for key in biases):
        raise RuntimeError(
            f'The checkpoint is fused, but this {type(model).__name__} is in train form: build the model with '
            f'fused=True. A fused checkpoint cannot be trained further with batch statistics.')
