"""Rewrites of whole networks: `fuse_fbn` folds normalisation away for inference, `convert_fbn` brings FBN in.

Both watch the network run on an example, replace modules in a copy of its structure, run that too, and only then
change the network itself: its class, its other methods and the prefixes of its state dict stay.
"""
import logging
import math
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from timm.layers import Conv2dSame
from timm.models._input import update_model_args
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3

from .depthwise import DepthwiseConv2d
from .fbn import FBNConv2d
from .trial import Example, copy_model, copy_to_run, distance, example_for, run, undisturbed
from .watch import NO_LAYER, Watch, layers_and_norms, neighbours, why_untouchable

__all__ = ['fuse_fbn', 'convert_fbn']

_logger = logging.getLogger(__name__)

# Whose forward is known to be linear in the weight and the bias. Of others a probe decides.
_KNOWN_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    Conv2dSame, DepthwiseConv2d)


@dataclass
class _Found:
    """What may be rewritten, by names, as the copies that are run have other modules."""
    pairs: List[Tuple[str, str]] = field(default_factory=list)  # a layer and the norm behind it
    fbn: List[str] = field(default_factory=list)
    stays: Dict[str, str] = field(default_factory=dict)  # FBN layers and norms: why
    by_keyword: Set[str] = field(default_factory=set)  # layers that take their input so
    example: Optional[Example] = None
    outputs: Any = None  # of the example, before; None without a run
    rounding: float = 0.
    unknown: int = 0  # norms that nothing is known of without a run


@torch.no_grad()
def _fold(layer: nn.Module, norm: nn.Module) -> None:
    """Give `layer` the weight and the bias with which it does what `norm` behind it did; computed in float32 at least.

    Device, dtype, memory format and `requires_grad` of the weight stay; the bias has those of the weight.
    """
    weight = layer.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(wide) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(wide)
    mean = norm.running_mean.to(wide)
    bias = -mean * scale if layer.bias is None else (layer.bias.to(wide) - mean) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.to(wide)
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...)
        factors = scale.unflatten(0, (layer.groups, 1, -1)).expand(-1, weight.shape[0] // layer.groups, -1)
        factors = factors.flatten(0, 1)
    else:
        factors = scale[:, None]
    factors = factors[(..., *[None] * (weight.dim() - 2))]
    layer.weight = nn.Parameter(torch.empty_like(weight).copy_(weight.to(wide) * factors), weight.requires_grad)
    layer.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)
    if type(layer) is DepthwiseConv2d:
        layer.__class__ = nn.Conv2d


def _is_folded_right(layer: nn.Module, norm: nn.Module, x: Optional[torch.Tensor]) -> bool:
    """Whether a layer of a class that is not known does with a folded weight what it should, on an input as `x`."""
    if x is None or layer.weight.is_meta:
        return False
    try:
        with undisturbed():
            layer, norm = deepcopy(layer).double(), deepcopy(norm).double()
            x = torch.randn(x.shape, dtype=torch.float64, device=layer.weight.device)
            expected = norm(layer(x))
            _fold(layer, norm)
            return distance(expected, _after_norm(norm)(layer(x))) < 1e-9
    except Exception:  # whatever such a class may raise
        return False


def _after_norm(norm: nn.Module) -> nn.Module:
    """What remains of a norm layer without its normalisation: timm's BatchNormAct2d carries an activation."""
    rest = [m for m in norm.children() if not isinstance(m, nn.Identity)]
    if len(rest) == 1:
        left = rest[0]
    else:
        left = nn.Sequential(*rest) if rest else nn.Identity()
        left.training = norm.training
    for name in ('num_features', 'eps', 'momentum', 'affine', 'track_running_stats'):  # others' forwards ask for them
        if hasattr(norm, name) and not hasattr(left, name):
            setattr(left, name, getattr(norm, name))
    return left


def _replace(model: nn.Module, new: Dict[nn.Module, nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in new:
                module._modules[name] = new[child]


class _AlreadyFolded:
    """In the place of a method that would fold a module's norms: they are."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.module


def fuse_named(model: nn.Module, pairs: List[Tuple[str, str]], fbn: List[str]) -> None:
    """Fold the norm of each pair `(layer, norm)`, and every FBN layer in `fbn`, all by name."""
    new: Dict[nn.Module, nn.Module] = {}
    for name in fbn:
        layer = model.get_submodule(name)
        new[layer] = layer.fuse()
    norms = [model.get_submodule(name) for _, name in pairs]
    for module in model.modules():
        if not set(module.modules()).isdisjoint(norms):
            for name in ('fuse', 'reparameterize', 'switch_to_deploy'):  # what reparameterize_model calls
                if callable(getattr(type(module), name, None)):
                    setattr(module, name, _AlreadyFolded(module))
    for (name, _), norm in zip(pairs, norms):
        layer = model.get_submodule(name)
        _fold(new.get(layer, layer), norm)
        new[norm] = _after_norm(norm)
    _replace(model, new)


def convert_named(model: nn.Module, pairs: List[Tuple[str, str]], fbn_groups: int, affine: bool) -> None:
    """Put an FBN layer in the place of each pair `(convolution, norm)`, by name."""
    new: Dict[nn.Module, nn.Module] = {}
    for names in pairs:
        conv, norm = map(model.get_submodule, names)
        new[conv], new[norm] = _to_fbn(conv, norm, fbn_groups, affine), _after_norm(norm)
    _replace(model, new)


def fits_fbn(conv: nn.Module, norm: nn.Module, fbn_groups: int) -> bool:
    """Whether an FBN layer with so many groups can do what the two do."""
    return (
        type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str) and conv.in_channels % fbn_groups == 0
        and isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm))


def _find(model: nn.Module, example_inputs: Any, fuse: bool) -> _Found:
    """Judge each norm, and if `fuse`, each FBN layer; without a run as they stand."""
    found = _Found()
    example = example_for(model, example_inputs)
    layers, norms = layers_and_norms(model)
    fbn = {name: layer for name, layer in layers.items() if fuse and isinstance(layer, FBNConv2d)}
    watch = Watch(model if example is None else copy_to_run(model))
    if example is not None and (norms or fbn):
        try:
            found.outputs = run(watch.model, example, watch.run)
            found.example, found.rounding = example, watch.rounding
        except Exception as error:
            if example_inputs is not None:
                raise
            _logger.warning(f'{type(model).__name__} does not run on images as its pretrained_cfg says: {error!r}')

    for name, layer in fbn.items():
        reason = watch.reasons.get(watch.layers[name])
        try:
            reason or layer.fuse()
        except RuntimeError as error:
            reason = str(error)
        if reason:
            found.stays[name] = reason
        else:
            found.fbn.append(name)
    if found.outputs is None:
        found.pairs = list(neighbours(model))
        found.unknown = len(norms) - len(found.pairs)
        return found

    names = {layer: name for name, layer in watch.layers.items()}
    found.by_keyword = {names.get(layer) for layer in watch.by_keyword}
    for name, norm in watch.norms.items():
        layer, reason = watch.layer_of(norm)
        if names.get(layer) in found.stays:
            reason = 'behind an FBN layer that stays'
        elif layer is not None and type(layer) not in _KNOWN_LAYERS and not isinstance(layer, FBNConv2d):
            if not _is_folded_right(layer, norm, watch.inputs.get(layer)):
                reason = f'behind a {type(layer).__name__}, which does otherwise with a folded weight'
        if reason:
            found.stays[name] = reason
        else:
            found.pairs.append((names[layer], name))
    return found


def _say_what_stays(model: nn.Module, found: _Found) -> None:
    kind = type(model).__name__
    by_reason = defaultdict(list)
    for name, reason in found.stays.items():
        by_reason[reason].append(name or kind)
    plain = by_reason.pop(NO_LAYER, [])
    if plain:
        _logger.info(f"{len(plain)} BatchNorm layers of {kind} stay, {NO_LAYER}: {', '.join(plain)}")
    if by_reason:
        count = sum(map(len, by_reason.values()))
        reasons = '; '.join(f"{reason}: {', '.join(names)}" for reason, names in by_reason.items())
        _logger.warning(f'{count} FBN and BatchNorm layers of {kind} stay. {reasons}')
    if found.unknown:
        _logger.warning(
            f'{found.unknown} BatchNorm layers of {kind} stay, as without a run only neighbours in nn.Sequential are '
            f'known: give example_inputs.')
    elif found.stays and not found.pairs and not found.fbn:
        _logger.warning(f'Nothing of {kind} can be folded: {len(found.stays)} BatchNorm and FBN layers stay.')


def _rewrite(
        model: nn.Module, found: _Found, inplace: bool, change: Callable, are_equal: bool = True) -> nn.Module:
    if found.outputs is not None and (found.pairs or found.fbn):
        _prove(model, found, change, are_equal)
    _say_what_stays(model, found)
    model = model if inplace else copy_model(model)
    change(model)
    return model


def _prove(model: nn.Module, found: _Found, change: Callable, are_equal: bool) -> None:
    """Raise a RuntimeError if a copy of `model` gives something else on the example after `change`."""
    trial = copy_to_run(model)
    change(trial)
    try:
        outputs = run(trial, found.example)
    except Exception as error:
        raise RuntimeError(
            f'{type(model).__name__} does not run once rewritten, so it is left unchanged: {error!r}') from error
    difference = distance(found.outputs, outputs)
    if not are_equal or difference <= 100 * found.rounding:
        return
    # A network may multiply what rounding does to its weights. How much so, is measured.
    noisy = copy_to_run(model)
    with undisturbed():
        for name in (*found.fbn, *(name for name, _ in found.pairs)):
            layer = noisy.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight * (1 + found.rounding * torch.randn_like(layer.weight)))
    expected = distance(found.outputs, run(noisy, found.example))
    if math.isinf(expected):  # as of a detector that then finds other things
        _logger.warning(f'Nothing is proven: rounding alone gives {type(model).__name__} outputs of another structure.')
    if difference > 100 * expected:
        what = f'values that differ by {difference:.1e} of the largest'
        raise RuntimeError(
            f"{type(model).__name__} gives {'another structure' if math.isinf(difference) else what} once rewritten, "
            f'so it is left unchanged: rounding explains {max(found.rounding, expected):.1e}.')


def fuse_fbn(model: nn.Module, example_inputs: Any = None, inplace: bool = False) -> nn.Module:
    """Fold every FBN layer, and every BatchNorm behind a convolution or linear layer, into a plain one with bias.

    The network runs on the example, in eval mode and in copies, so that no buffer or random state changes: once to see
    which norm alone takes a layer's output, and once rewritten. Outputs, and those of timm's `forward_intermediates`,
    stay up to the dtype's rounding; so do class, methods, device, dtype, memory format and `requires_grad`. Idempotent.

    What stays is named in a warning, with the reason: layers with hooks, a patched forward, more than one call or
    another reader, and those whose tensors somebody else reads. What the example does not show is not known: another
    way that the network takes with other inputs or in train mode. On the meta device it shows who reads what and all
    shapes, but no values.

    Args:
        model: Any network, its norms in eval mode. An `FBNConv2d` itself comes back as `nn.Conv2d`. In
            DistributedDataParallel, DataParallel, torch.compile or timm's ModelEma, what they wrap is rewritten.
        example_inputs: A tensor, or a tuple or dict of arguments, as for torch.export. Without it a network of timm
            takes random images as its `pretrained_cfg` says. Of other networks, only FBN layers and neighbours in an
            `nn.Sequential` are then folded, as they stand: nothing runs, and nothing is proven.
        inplace: Change `model`, else a deep copy.

    Raises:
        RuntimeError: A normalisation layer is in train mode; or the outputs differ, in place too before any change.
        TypeError: `example_inputs` is something else.
    """
    wrapped = _wrapped(model)
    if wrapped:
        model = model if inplace else deepcopy(model)
        setattr(model, wrapped, fuse_fbn(getattr(model, wrapped), example_inputs, inplace=True))
        return model
    for name, module in model.named_modules():
        if module.training and isinstance(module, _BatchNorm):
            raise RuntimeError(
                f'Cannot fuse {name or type(model).__name__} in train mode: call .eval() on the model first.')
    if isinstance(model, FBNConv2d) and not why_untouchable(model):
        return model.fuse()
    found = _find(model, example_inputs, fuse=True)
    model = _rewrite(model, found, inplace, lambda network: fuse_named(network, found.pairs, found.fbn))
    if 'fused' in getattr(model, '_model_args', {}):
        update_model_args(model, fused=True)  # what timm's save_for_hf writes, and so what loads again
    return model


def _wrapped(model: Any) -> str:
    """The attribute of a wrapper that holds the network, or ''."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, ModelEmaV2, ModelEmaV3)):
        return 'module'
    if isinstance(model, ModelEma):
        return 'ema'
    return '_orig_mod' if '_orig_mod' in model._modules else ''


def convert_fbn(
        model: nn.Module, fbn_groups: int = 4, affine: bool = True, example_inputs: Any = None,
        inplace: bool = False) -> nn.Module:
    """Replace every convolution + BatchNorm pair by an `FBNConv2d`.

    The weights, and in eval mode the outputs, stay at any G: the pair's statistics and affine terms are split evenly
    over the groups, until training estimates each group's own. Pairs are found and the outputs proven as by `fuse_fbn`.
    Depthwise and grouped convolutions, those whose input channels G does not divide (a stem, mostly), and those that
    `fuse_fbn` would leave keep their BatchNorm. How many of how many convolutions were converted is logged.

    Args:
        model: Any network, in train or eval mode, or in one of the wrappers that `fuse_fbn` knows.
        fbn_groups: G, the FBN groups of each layer.
        affine: False drops the learned gammas and betas (Table 5), and with them their effect on the outputs.
        example_inputs: As for `fuse_fbn`.
        inplace: Change `model`, else a deep copy.

    Raises:
        ValueError: `fbn_groups` is below 1, or no pair fits.
        RuntimeError, TypeError: As from `fuse_fbn`.
    """
    if fbn_groups < 1:
        raise ValueError(f'fbn_groups={fbn_groups} must be at least 1.')
    wrapped = _wrapped(model)
    if wrapped:
        model = model if inplace else deepcopy(model)
        convert_fbn(getattr(model, wrapped), fbn_groups, affine, example_inputs, inplace=True)
        return model
    found = _find(model, example_inputs, fuse=False)
    found.pairs = [
        names for names in found.pairs
        if names[0] not in found.by_keyword and fits_fbn(*map(model.get_submodule, names), fbn_groups)]
    if not found.pairs:
        raise ValueError(
            f'model={type(model).__name__} has no convolution + BatchNorm pair that fbn_groups={fbn_groups} fits'
            f"{'.' if found.outputs is not None else ', as far as is known without example_inputs.'}")

    model = _rewrite(
        model, found, inplace, lambda network: convert_named(network, found.pairs, fbn_groups, affine),
        are_equal=affine)
    count = sum(isinstance(module, (nn.Conv2d, FBNConv2d)) for module in model.modules())
    _logger.info(f'{len(found.pairs)} of the {count} convolutions of {type(model).__name__} converted to FBN.')
    return model


@torch.no_grad()
def _to_fbn(conv: nn.Conv2d, norm: _BatchNorm, fbn_groups: int, affine: bool) -> FBNConv2d:
    layer = FBNConv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, fbn_groups,
        affine and norm.affine, norm.eps, norm.momentum, device='meta', dtype=norm.running_mean.dtype)
    layer.weight = conv.weight
    layer.bn.to_empty(device=conv.weight.device)
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    layer.bn.running_mean.copy_((mean / fbn_groups).repeat(fbn_groups))
    layer.bn.running_var.copy_(norm.running_var.repeat(fbn_groups))
    layer.bn.num_batches_tracked.copy_(norm.num_batches_tracked)
    if layer.bn.affine:
        layer.bn.weight.copy_(norm.weight.repeat(fbn_groups)).requires_grad_(norm.weight.requires_grad)
        if norm.bias is None:
            layer.bn.bias.zero_().requires_grad_(False)
        else:
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
