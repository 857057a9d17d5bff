"""Rewrites of whole networks: `fuse_fbn` folds normalisation away for inference, `convert_fbn` brings FBN in.

Both find (convolution, BatchNorm) and (linear, BatchNorm) pairs in the traced graph and replace modules in the network
itself, so that its class, its other methods and the prefixes of its state dict stay.
"""
import logging
from copy import deepcopy
from typing import Dict, Iterator, Tuple

import torch
import torch.nn as nn
from torch.fx import Tracer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from timm.layers import Conv2dSame, Linear, get_notrace_functions, get_notrace_modules
from timm.models._input import update_model_args

from .fbn import FBNConv2d

__all__ = ['fuse_fbn', 'convert_fbn']

_logger = logging.getLogger(__name__)

# Exact types: a subclass may make its weight in forward (weight standardisation, parametrisations).
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)
_LINEARS = (nn.Linear, Linear)


class _LeafTracer(Tracer):
    def __init__(self):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = tuple(get_notrace_modules())

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, qualified_name)


def _norm_pairs(model: nn.Module) -> Iterator[Tuple[str, nn.Module, str, nn.Module]]:
    """Names and modules of each BatchNorm and of the convolution or linear layer that feeds it and nothing else."""
    modules = dict(model.named_modules(remove_duplicate=False))
    graph = _LeafTracer().trace(model)
    calls = [modules[node.target] for node in graph.nodes if node.op == 'call_module']

    def is_shared(module: nn.Module) -> bool:
        return calls.count(module) > 1 or list(modules.values()).count(module) > 1

    for node in graph.nodes:
        source = node.args[0] if node.op == 'call_module' and node.args else None
        if not isinstance(source, torch.fx.Node) or source.op != 'call_module' or len(source.users) > 1:
            continue
        layer, norm = modules[source.target], modules[node.target]
        if (
                type(layer) in _CONVS + _LINEARS and isinstance(norm, _BatchNorm)
                and not layer._forward_pre_hooks  # torch's older weight norm writes the weight in one
                and not is_shared(layer) and not is_shared(norm)
        ):
            yield source.target, layer, node.target, norm


def _after_norm(norm: nn.Module) -> nn.Module:
    """What remains of a norm layer without its normalisation: timm's BatchNormAct2d carries an activation."""
    rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    return rest[0] if len(rest) == 1 else nn.Sequential(*rest) if rest else nn.Identity()


def _fuse_pair(layer: nn.Module, norm: nn.Module) -> nn.Module:
    dtype = layer.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)
    fuse = fuse_linear_bn_eval if type(layer) in _LINEARS else fuse_conv_bn_eval
    # .eval(), as torch insists on it; a network in train mode whose norms alone are frozen may be fused
    fused = fuse(deepcopy(layer).to(wide).eval(), deepcopy(norm).to(wide)).to(dtype)
    fused.bias.requires_grad_(layer.weight.requires_grad)
    return fused.train(layer.training)


def fuse_fbn(model: nn.Module, inplace: bool = False) -> nn.Module:
    """Fold every FBN layer, and every BatchNorm behind a convolution or linear layer, into a plain one with bias.

    Outputs stay, up to rounding; so do class, methods, device, dtype, memory format and `requires_grad`. Idempotent. Where
    `torch.fx` cannot trace the network, FBN layers alone are fused and a warning says so.

    Args:
        model: Any network, in eval mode; an `FBNConv2d` itself comes back as `nn.Conv2d`.
        inplace: Change `model`, else a deep copy.

    Raises:
        RuntimeError: A normalisation layer is in train mode.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, _BatchNorm):
            raise RuntimeError(f'Cannot fuse {name or type(model).__name__} in train mode: call .eval() on the model first.')
    if isinstance(model, FBNConv2d):
        return model.fuse()
    if not inplace:
        original, model = model, deepcopy(model)
        for module, source in zip(model.modules(), original.modules()):
            module.training = source.training  # torchvision's traced feature extractors forget theirs in a copy

    fused: Dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, FBNConv2d):
            if module not in fused:
                fused[module] = module.fuse()
            model.set_submodule(name, fused[module])
    try:
        pairs = list(_norm_pairs(model))
    except Exception as error:  # whatever a forward may raise when it is handed proxies
        _logger.warning(f'torch.fx cannot trace {type(model).__name__}, only its {len(fused)} FBN layers are fused: {error}')
        pairs = []
    for layer_name, layer, norm_name, norm in pairs:
        if norm.running_mean is not None:
            model.set_submodule(layer_name, _fuse_pair(layer, norm))
            model.set_submodule(norm_name, _after_norm(norm))
    if 'fused' in getattr(model, '_model_args', {}):
        update_model_args(model, fused=True)  # what timm's save_for_hf writes, and so what loads again
    return model


def convert_fbn(model: nn.Module, fbn_groups: int = 4, affine: bool = True, inplace: bool = False) -> nn.Module:
    """Replace every convolution + BatchNorm pair by an `FBNConv2d`.

    The weights, and in eval mode the outputs, stay at any G: the pair's statistics and affine terms are split evenly over
    the groups, until training estimates each group's own. Depthwise and grouped convolutions, and those whose input
    channels G does not divide (a stem, mostly), keep their BatchNorm.

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
        model = deepcopy(model)
    try:
        pairs = [
            (layer_name, conv, norm_name, norm) for layer_name, conv, norm_name, norm in _norm_pairs(model)
            if type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == 'zeros'
            and not isinstance(conv.padding, str) and conv.in_channels % fbn_groups == 0
            and norm.running_mean is not None and not isinstance(norm, nn.SyncBatchNorm)
        ]
    except Exception as error:
        raise ValueError(f'model={type(model).__name__} cannot be traced by torch.fx: {error}') from error
    if not pairs:
        raise ValueError(f'model={type(model).__name__} has no convolution + BatchNorm pair that fbn_groups={fbn_groups} fits.')
    for layer_name, conv, norm_name, norm in pairs:
        model.set_submodule(layer_name, _to_fbn(conv, norm, fbn_groups, affine))
        model.set_submodule(norm_name, _after_norm(norm))
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
    given, own = (any(key.endswith('running_var') for key in keys) for keys in (state_dict, model.state_dict()))
    if given and not own:
        raise RuntimeError(
            f'The checkpoint is in train form, this {type(model).__name__} is fused: load it into one built without '
            f'fused=True, then call fuse_fbn(model.eval()).')
    if own and not given:
        raise RuntimeError(
            f'The checkpoint is fused, this {type(model).__name__} is in train form: build it with fused=True. '
            f'A fused checkpoint cannot be trained further with batch statistics.')
