"""Rewrites of whole networks: `fuse_fbn` folds normalisation away for inference, `convert_fbn` brings FBN in.

Both watch the network run on an example, replace modules in a copy of its structure, run that too, and only then
change the network itself: its class, its other methods and the prefixes of its state dict stay.
"""
import inspect
import itertools
import logging
from collections import Counter, defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.parameter import is_lazy

from timm.models._input import update_model_args
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3

from .fbn import FBNConv2d
from .fusion.trial import Example, copy_model, copy_to_run, distance, example_for, judge, run, undisturbed
from .fusion.watch import KNOWN_LAYERS, NO_LAYER, Watch, layers_and_norms, neighbours, why_untouchable
from .ops.depthwise import DepthwiseConv2d

__all__ = ['fuse_fbn', 'convert_fbn']

_logger = logging.getLogger(__name__)


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
def _folded(layer: nn.Module, norm: nn.Module) -> Tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias with which `layer` does what `norm` behind it did; computed in float32 at least."""
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
    return torch.empty_like(weight).copy_(weight.to(wide) * factors), bias.to(weight.dtype)


def _give(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Both get the `requires_grad` of the old weight."""
    requires_grad = layer.weight.requires_grad
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad), nn.Parameter(bias, requires_grad)
    if type(layer) is DepthwiseConv2d:
        layer.__class__ = nn.Conv2d


def _is_folded_right(layer: nn.Module, norm: nn.Module, x: Optional[torch.Tensor]) -> bool:
    """Whether a layer of a class that is not known does with a folded weight what it should, on inputs as `x`."""
    if x is None or layer.weight.is_meta:
        return False
    try:
        with undisturbed():
            layer, norm = deepcopy(layer).double(), deepcopy(norm).double()
            folded = deepcopy(layer)
            _give(folded, *_folded(layer, norm))
            x = torch.randn(x.shape, dtype=torch.float64, device=layer.weight.device)
            # A layer may treat large values or empty positions in its own way.
            holes, half = torch.randint_like(x[:, :1], 2), torch.arange(x.shape[-1], device=x.device) < x.shape[-1] // 2
            return all(
                distance(norm(layer(probe)), _after_norm(norm)(folded(probe))) < 1e-9
                for probe in (x, 1e4 * x, holes * x, half * x, 0 * x))
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
                if name == '_orig_mod':  # torch.compile binds what it calls
                    module._initialize()


class _AlreadyFolded:
    """In the place of a method that would fold a module's norms: they are."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.module


def _folds_itself(module: nn.Module, name: str) -> bool:
    """Whether the method `name` may be what timm's `reparameterize_model` calls: it takes flags at most."""
    method = getattr(module, name, None)
    return callable(getattr(type(module), name, None)) and all(
        isinstance(p.default, bool) for p in inspect.signature(method).parameters.values())


def fuse_named(model: nn.Module, pairs: List[Tuple[str, str]], fbn: List[str]) -> None:
    """Fold the norm of each pair `(layer, norm)`, and every FBN layer in `fbn`, all by name."""
    new: Dict[nn.Module, nn.Module] = {}
    for name in fbn:
        layer = model.get_submodule(name)
        new[layer] = layer.fuse()
    modules = [tuple(map(model.get_submodule, names)) for names in pairs]
    folds = [(new.get(layer, layer), *_folded(new.get(layer, layer), norm)) for layer, norm in modules]

    # What may fail is done.
    norms = {norm for _, norm in modules}
    for module in model.modules():
        if not norms.isdisjoint(module.modules()):
            for name in ('fuse', 'reparameterize', 'switch_to_deploy'):
                if _folds_itself(module, name):
                    setattr(module, name, _AlreadyFolded(module))
    for layer, weight, bias in folds:
        _give(layer, weight, bias)
    for norm in norms:
        new[norm] = _after_norm(norm)
    _replace(model, new)


def convert_named(
        model: nn.Module, pairs: List[Tuple[str, str]], fbn_groups: int, affine: bool,
        save_memory: bool = False) -> None:
    """Put an FBN layer in the place of each pair `(convolution, norm)`, by name."""
    new: Dict[nn.Module, nn.Module] = {}
    for names in pairs:
        conv, norm = map(model.get_submodule, names)
        new[conv], new[norm] = _to_fbn(conv, norm, fbn_groups, affine, save_memory), _after_norm(norm)
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
    watch = Watch(model if example is None else copy_to_run(model), model)
    if example is not None and (norms or fbn):
        try:
            found.outputs = run(watch.model, example, watch.run)
            found.example, found.rounding = example, watch.rounding
        except Exception as error:
            if example_inputs is not None or watch.reached:
                raise
            _logger.warning(f'{type(model).__name__} does not run on images as its pretrained_cfg says: {error!r}')

    if watch.reached:  # where the network has caught the error
        raise RuntimeError(f'A copy of {type(model).__name__} computes with {watch.reached} of the network itself.')

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
        elif layer is not None and type(layer) not in KNOWN_LAYERS and not isinstance(layer, FBNConv2d):
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


def _prove(model: nn.Module, found: _Found, change: Callable, are_equal: bool = True) -> None:
    """Take out of `found` what a copy of `model`, changed, shows to be called where no replacement reaches.

    Raises:
        RuntimeError: The copy gives something else on the example, though it should not.
    """
    while found.outputs is not None and (found.pairs or found.fbn):
        called = _try(model, found, change, are_equal)
        if not called:
            return
        found.stays.update(dict.fromkeys(called, 'called where no replacement reaches'))
        found.fbn = [name for name in found.fbn if name not in called]
        found.pairs = [names for names in found.pairs if called.isdisjoint(names)]


def _try(model: nn.Module, found: _Found, change: Callable, are_equal: bool) -> Set[str]:
    """As `_prove`, once. Returns names of replaced modules that run all the same, as the network holds them twice."""
    trial = copy_to_run(model)
    old = {name: trial.get_submodule(name) for name in itertools.chain(found.fbn, *found.pairs)}
    change(trial)
    left = set(trial.modules())
    called: Set[str] = set()
    for name, module in old.items():
        if module not in left:
            module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    try:
        outputs = run(trial, found.example)
    except Exception as error:
        if not called:
            raise RuntimeError(
                f'{type(model).__name__} does not run once rewritten, so it is left unchanged: {error!r}') from error
    if called or not are_equal:
        return called

    # A network may multiply what rounding does to its numbers. How much so, is measured: more than once where the
    # first time finds too little, as of outputs that are whole numbers.
    noisy = []
    for seed in range(5):
        noisy.append(run(_with_noise(model, found, seed), found.example))
        complaint, blind, total = judge(found.outputs, outputs, noisy, found.rounding)
        if not complaint:
            break
    if complaint:
        raise RuntimeError(f'{type(model).__name__} gives {complaint} once rewritten, so it is left unchanged.')
    if blind or not total:
        hint = ' Fuse in float32, then cast.' if found.rounding > 1e-3 else ''
        _logger.warning(
            f'{blind} of the {total} outputs of {type(model).__name__} prove nothing: rounding or chance alone changes '
            f'them, they hold no finite number, or they are of a kind that cannot be compared.{hint}')
    return called


def _with_noise(model: nn.Module, found: _Found, seed: int) -> nn.Module:
    """A copy in which all numbers that folding computes with are changed by as much as rounding may be."""
    noisy = copy_to_run(model)
    with undisturbed():
        torch.manual_seed(seed)
        for name in itertools.chain(found.fbn, *found.pairs):
            module = noisy.get_submodule(name)
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1 + found.rounding * torch.randn_like(tensor))
    return noisy


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
    _check_model(model, 'fuse')
    wrapped = _wrapped(model)
    if wrapped:
        network = getattr(model, wrapped)
        return _rewrap(model, wrapped, fuse_fbn(network, example_inputs, inplace), inplace)
    for name, module in model.named_modules():
        if module.training and isinstance(module, _BatchNorm):
            raise RuntimeError(
                f'Cannot fuse {name or type(model).__name__} in train mode: call .eval() on the model first.')
    if isinstance(model, FBNConv2d) and not why_untouchable(model):
        return model.fuse()
    found = _find(model, example_inputs, fuse=True)

    def fuse(network: nn.Module) -> None:
        fuse_named(network, found.pairs, found.fbn)

    _prove(model, found, fuse)
    _say_what_stays(model, found)
    model = model if inplace else copy_model(model)
    fuse(model)
    if 'fused' in getattr(model, '_model_args', {}):
        update_model_args(model, fused=True)  # what timm's save_for_hf writes, and so what loads again
    return model


def _check_model(model: Any, verb: str) -> None:
    if isinstance(model, ModelEma):
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f'model={type(model).__name__} must be a torch.nn.Module.')
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f'model={type(model).__name__} is scripted or traced: {verb} the network before.')
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f'{name} of model={type(model).__name__} has no shape yet: run the network once before.')


def _wrapped(model: Any) -> str:
    """The attribute of a wrapper that holds the network, or ''."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, ModelEmaV2, ModelEmaV3)):
        return 'module'
    if isinstance(model, ModelEma):
        return 'ema'
    return '_orig_mod' if '_orig_mod' in model._modules else ''


def _rewrap(wrapper: Any, wrapped: str, network: nn.Module, inplace: bool) -> Any:
    """The wrapper, or a copy of it, round another network."""
    old = getattr(wrapper, wrapped)
    if not inplace:
        return deepcopy(wrapper, {id(old): network})
    if isinstance(wrapper, nn.Module):
        _replace(wrapper, {old: network})
    else:
        setattr(wrapper, wrapped, network)
    return wrapper


def convert_fbn(
        model: nn.Module, fbn_groups: int = 4, affine: bool = True, example_inputs: Any = None,
        inplace: bool = False, save_memory: bool = False) -> nn.Module:
    """Replace every convolution + BatchNorm pair by an `FBNConv2d`.

    The weights, and in eval mode the outputs, stay at any G: the pair's statistics and affine terms are split evenly
    over the groups, until training estimates each group's own. A convolution's bias, which batch statistics take away
    again, becomes a part of the mean, and learns no more. Pairs are found and the outputs proven as by `fuse_fbn`.
    Depthwise and grouped convolutions, those whose input channels G does not divide (a stem, mostly), and those that
    `fuse_fbn` would leave keep their BatchNorm. How many of how many convolutions were converted is logged.

    Args:
        model: Any network, in train or eval mode, or in one of the wrappers that `fuse_fbn` knows.
        fbn_groups: G, the FBN groups of each layer.
        affine: False drops the learned gammas and betas (Table 5), and with them their effect on the outputs.
        example_inputs: As for `fuse_fbn`.
        inplace: Change `model`, else a deep copy.
        save_memory: Of the layers. With `fbn_groups=1` this is plain BatchNorm that trains in less memory.

    Raises:
        ValueError: `fbn_groups` is below 1, or no pair fits.
        RuntimeError, TypeError: As from `fuse_fbn`.
    """
    if type(fbn_groups) is not int or fbn_groups < 1:
        given = fbn_groups if isinstance(fbn_groups, (int, float, str)) else f'a {type(fbn_groups).__name__}'
        raise ValueError(f'fbn_groups={given} must be an integer of at least 1.')
    _check_model(model, 'convert')
    wrapped = _wrapped(model)
    if wrapped:
        if inplace and isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                'model=DistributedDataParallel with inplace=True would not learn of the new parameters: convert the '
                'network before it is wrapped.')
        network = getattr(model, wrapped)
        network = convert_fbn(network, fbn_groups, affine, example_inputs, inplace, save_memory)
        return _rewrap(model, wrapped, network, inplace)
    found = _find(model, example_inputs, fuse=False)
    uses = Counter(p for module in model.modules() for p in module._parameters.values())
    found.pairs = [
        (conv, norm) for conv, norm in found.pairs
        if conv not in found.by_keyword and fits_fbn(model.get_submodule(conv), model.get_submodule(norm), fbn_groups)
        and all(uses[p] == 1 for p in model.get_submodule(norm).parameters())]  # others' would not be the same any more

    def convert(network: nn.Module) -> None:
        convert_named(network, found.pairs, fbn_groups, affine, save_memory)

    _prove(model, found, convert, are_equal=affine)
    if not found.pairs:
        raise ValueError(
            f'model={type(model).__name__} has no convolution + BatchNorm pair that fbn_groups={fbn_groups} fits'
            f"{'.' if found.outputs is not None else ', as far as is known without example_inputs.'}")
    _say_what_stays(model, found)
    model = model if inplace else copy_model(model)
    convert(model)
    count = sum(isinstance(module, (nn.Conv2d, FBNConv2d)) for module in model.modules())
    _logger.info(f'{len(found.pairs)} of the {count} convolutions of {type(model).__name__} converted to FBN.')
    return model


@torch.no_grad()
def _to_fbn(conv: nn.Conv2d, norm: _BatchNorm, fbn_groups: int, affine: bool, save_memory: bool) -> FBNConv2d:
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
