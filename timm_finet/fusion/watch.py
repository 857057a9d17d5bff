"""Finds the layers that a BatchNorm may be folded into, by watching a network run.

Hooks tell which layer gave a tensor and which norm took it, two modes of torch who else read it, and weak references
who still holds it at the end.
"""
import gc
import threading
from collections import Counter, defaultdict
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from torchvision.ops import FrozenBatchNorm2d

from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, SyncBatchNormAct

from ..fbn import FBNConv2d, ReferenceFBNConv2d, has_hooks
from ..ops.depthwise import DepthwiseConv2d

__all__ = ['NO_LAYER', 'Watch', 'layers_and_norms', 'neighbours', 'why_untouchable']

_LAYERS = (_ConvNd, nn.Linear, FBNConv2d)
_ALL_NORMS = (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)
# By exact type, as a subclass may compute something else.
NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct,
    FrozenBatchNorm2d, FrozenBatchNormAct2d)
# Whose forward is linear in the weight and the bias.
KNOWN_LAYERS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear,
    Conv2dSame, DepthwiseConv2d)


def _computes_by(module_type: type) -> Tuple[Optional[Callable], ...]:
    return module_type.forward, getattr(module_type, '_conv_forward', None)


# As they are defined: some programs replace those of a whole class.
_COMPUTE_BY = {module_type: _computes_by(module_type) for module_type in (*NORMS, *KNOWN_LAYERS)}

_NORM_BEHIND = {
    nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d,
    nn.ConvTranspose1d: nn.BatchNorm1d, nn.ConvTranspose2d: nn.BatchNorm2d, nn.ConvTranspose3d: nn.BatchNorm3d,
    DepthwiseConv2d: nn.BatchNorm2d, Conv2dSame: nn.BatchNorm2d}

# Calls that learn nothing of a tensor's values, and give no other name to them.
_LOOKS = {
    torch.is_floating_point, torch.Tensor.dim, torch.Tensor.size, torch.Tensor.stride, torch.Tensor.numel,
    torch.Tensor.is_contiguous, torch.Tensor.is_floating_point, torch.Tensor.get_device, torch.Tensor.__len__,
    *(getattr(torch.Tensor, name).__get__ for name in (
        'shape', 'dtype', 'device', 'ndim', 'layout', 'requires_grad', 'is_cuda', 'is_meta', 'is_sparse',
        'is_quantized', 'is_nested'))}

NO_LAYER = 'not directly behind a convolution or linear layer'


def layers_and_norms(model: nn.Module) -> Tuple[Dict[str, nn.Module], Dict[str, nn.Module]]:
    """By name. The norm in an FBN layer is a part of it."""
    layers, norms, inner = {}, {}, set()
    for name, module in model.named_modules():
        if module in inner:
            continue
        if isinstance(module, _LAYERS):
            layers[name] = module
        elif isinstance(module, _ALL_NORMS):
            norms[name] = module
        if isinstance(module, FBNConv2d):
            inner.update(module.modules())
    return layers, norms


def why_untouchable(module: nn.Module) -> str:
    """Why a layer or norm has to stay whatever the network does with it, or ''."""
    if any(map(has_hooks, module.modules())):
        return 'hooked'
    own = [(part, name) for part in module.modules() for name, value in vars(part).items() if callable(value)]
    if any(callable(getattr(type(part), name, None)) for part, name in own):
        return 'patched'
    if type(module) in _COMPUTE_BY and _COMPUTE_BY[type(module)] != _computes_by(type(module)):
        return 'patched'
    if isinstance(module, FBNConv2d):  # its own `fuse` decides
        is_ours = type(module).forward in (FBNConv2d.forward, ReferenceFBNConv2d.forward)
        return '' if is_ours else f'of class {type(module).__name__}'
    if is_parametrized(module):
        return 'parametrised'
    if not isinstance(module, _ALL_NORMS):
        return '' if isinstance(module._parameters.get('weight'), nn.Parameter) else 'without a weight of its own'
    if type(module) not in NORMS:
        return f'of class {type(module).__name__}'
    return 'without running statistics' if module.running_mean is None else ''


def neighbours(model: nn.Module) -> Iterator[Tuple[str, str]]:
    """Names of layers and norms that stand one behind the other in an `nn.Sequential`, and nowhere else."""
    places = Counter(child for module in model.modules() for child in module._modules.values())
    for prefix, module in model.named_modules():
        if type(module) is not nn.Sequential or 'forward' in vars(module):
            continue
        children = list(module.named_children())
        for (layer_name, layer), (norm_name, norm) in zip(children, children[1:]):
            norm_type = nn.BatchNorm2d if type(norm) is BatchNormAct2d else type(norm)
            if norm_type is not _NORM_BEHIND.get(type(layer)) or layer.out_channels != norm.num_features:
                continue
            if max(places[layer], places[norm]) > 1:
                continue
            if not why_untouchable(layer) and not why_untouchable(norm):
                yield tuple(f'{prefix}.{name}'.lstrip('.') for name in (layer_name, norm_name))


class _Functions(TorchFunctionMode):
    """Tells `see` of each function of torch that Python calls."""

    def __init__(self, see: Callable):
        super().__init__()
        self.see = see

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        self.see(func, args, kwargs)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    """Tells `see` of each operator, those that scripted functions call too."""

    supports_higher_order_operators = True

    def __init__(self, see: Callable):
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        self.see(func, args, kwargs)
        return func(*args, **(kwargs or {}))


def _parts(module: nn.Module) -> List[nn.Module]:
    """The module, and of an FBN layer what is in it. The activation in a norm of timm's is its own affair."""
    return list(module.modules()) if isinstance(module, FBNConv2d) else [module]


def _attributes(module: nn.Module) -> Dict[str, Any]:
    """All that a module's forward may compute with, tensors and others."""
    return {
        f'{i}.{name}': value for i, part in enumerate(_parts(module))
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items()}


def _state(attributes: Dict[str, Any]) -> Dict[str, Any]:
    """What tells whether an attribute has been replaced, or a tensor changed in place."""
    state = {}
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor):
            state[name] = id(value), value.shape if value.is_inference() else value._version
        else:
            state[name] = value if isinstance(value, (bool, int, float, str)) else id(value)
    return state


class Watch:
    """Watches calls of a network, then says which norm may be folded into which layer, and why others stay.

    In each call the layer's output has to go to this norm and to nobody else, and the norm must take nothing else.

    Args:
        model: The network that runs.
        original: What it is a copy of.
    """

    def __init__(self, model: nn.Module, original: nn.Module):
        self.model = model
        self.layers, self.norms = layers_and_norms(model)
        self.reasons: Dict[nn.Module, str] = {}  # why a layer or norm itself has to stay
        self._uses: Dict[nn.Module, str] = {}  # why no norm may be folded into a layer, or none be left out
        self.inputs: Dict[nn.Module, torch.Tensor] = {}  # what a layer takes, on the meta device
        self.rounding = 0.  # relative, the coarsest of all layers' outputs
        self._sources: Dict[nn.Module, Set[Optional[nn.Module]]] = defaultdict(set)  # of a norm; None for all else
        self._readers: Dict[nn.Module, Set[nn.Module]] = defaultdict(set)  # of a layer: the norms
        self.by_keyword: Set[nn.Module] = set()  # modules whose input has no place but a name
        self._owners: Dict[int, List[nn.Module]] = defaultdict(list)  # of a tensor, by its id
        self._originals = {} if model is original else {
            id(t): name for name, t in (*original.named_parameters(), *original.named_buffers())}
        self.reached = ''  # a tensor of the original that the copy has come to
        self._vanishing: Set[int] = set()  # those that will be no more, ids
        self._layer_of = WeakIdKeyDictionary()  # by the outputs that somebody holds
        self._running: List[nn.Module] = []
        self._calls: Counter = Counter()
        self._hooked = [set(module.modules()) for module in model.modules() if has_hooks(module)]
        self._attributes = {module: _attributes(module) for module in (*self.layers.values(), *self.norms.values())}
        self._states = {module: _state(attributes) for module, attributes in self._attributes.items()}
        for module, attributes in self._attributes.items():
            if why_untouchable(module):
                self.reasons[module] = why_untouchable(module)
            for tensor in attributes.values():
                if isinstance(tensor, torch.Tensor):
                    self._owners[id(tensor)].append(module)
            for part in _parts(module):
                if isinstance(part, _ALL_NORMS):
                    self._vanishing.update(map(id, (*part._parameters.values(), *part._buffers.values())))

    def run(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """`function(*args, **kwargs)`, where `function` is the network or a method of it."""
        hooks = []
        for module in self._attributes:
            hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        self._thread = threading.get_ident()
        try:
            with _Functions(self._see), _Operators(self._see):
                result = function(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
            self._running.clear()
        if any(layer in self._readers for layer in self._layer_of.values()):
            gc.collect()  # what only a cycle keeps
        for layer in self._layer_of.values():
            self._uses.setdefault(layer, 'returned or kept')
        for module, count in self._calls.items():
            if count > 1:
                self._uses.setdefault(module, 'called more than once')
        self._layer_of = WeakIdKeyDictionary()
        self._calls.clear()
        return result

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._running.append(module)
        self._calls[module] += 1
        self._check_state(module)
        if threading.get_ident() != self._thread:
            self.reasons.setdefault(module, 'called in another thread')
        x = next(iter((*args, *kwargs.values())), None)
        if len(args) + len(kwargs) > 1 and type(module) not in KNOWN_LAYERS:
            self.reasons.setdefault(module, 'called with more than its input')
        if not args:
            self.by_keyword.add(module)
            if 'input' not in kwargs:  # as Identity and a plain convolution call it
                self.reasons.setdefault(module, 'called by keyword')
        if not isinstance(x, torch.Tensor):
            self._uses.setdefault(module, 'called without a tensor')
        elif isinstance(module, _LAYERS):
            self.inputs[module] = torch.empty_like(x, device='meta')
        else:
            layer = self._layer_of.get(x)
            self._sources[module].add(layer)
            if layer is not None:
                self._readers[layer].add(module)
                # Only of (N, C, ...) is the norm's channel the layer's; the weight then has as many dimensions.
                if x.dim() != layer.weight.dim():
                    self._uses.setdefault(module, "normalising another dimension than its layer's channels")

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._check_state(module)
        self._running.pop()
        if not isinstance(module, _LAYERS):
            if len({v.dtype for v in (output, *args, *kwargs.values()) if isinstance(v, torch.Tensor)}) > 1:
                self._uses.setdefault(module, 'changing the dtype')
        elif isinstance(output, torch.Tensor):
            self._layer_of[output] = module
            if output.is_floating_point():
                coarse = output.is_cuda and output.dtype == torch.float32  # as TF32
                self.rounding = max(self.rounding, 2 ** -11 if coarse else torch.finfo(output.dtype).eps)

    def _check_state(self, module: nn.Module) -> None:
        if _state(_attributes(module)) != self._states[module]:
            self.reasons.setdefault(module, 'changed by the forward')

    def _see(self, func: Callable, args: tuple, kwargs: Optional[dict]) -> None:
        running = self._running[-1] if self._running else None
        for tensor in tree_leaves((args, kwargs)):
            if not isinstance(tensor, torch.Tensor):
                continue
            if id(tensor) in self._originals:
                self.reached = self._originals[id(tensor)]
                raise RuntimeError(f'A copy of the network computes with {self.reached} of the network itself.')
            if func in _LOOKS and id(tensor) not in self._vanishing:
                continue
            layer = self._layer_of.get(tensor)
            if layer is not None and running not in self._readers[layer]:
                self._uses.setdefault(layer, 'read elsewhere')
            owners = self._owners.get(id(tensor), [running])
            if running not in owners:
                for module in owners:
                    self.reasons.setdefault(module, 'looked into')

    def layer_of(self, norm: nn.Module) -> Tuple[Optional[nn.Module], str]:
        """The layer that `norm` may be folded into and '', or None and why it stays."""
        sources = self._sources[norm]
        reason = self._why_kept(norm)
        if reason:
            return None, reason
        if not sources:
            return None, 'not called'
        if sources == {None}:
            return None, NO_LAYER
        if len(sources) > 1:
            return None, 'behind several layers'
        layer, = sources
        if self._why_kept(layer):
            return None, f'behind a layer that is {self._why_kept(layer)}'
        if self._readers[layer] != {norm}:
            return None, 'behind a layer that several norms read'
        if any((layer in hooked) != (norm in hooked) for hooked in self._hooked):
            return None, 'behind a hook that sees its input'
        return layer, ''

    def _why_kept(self, module: nn.Module) -> str:
        return self.reasons.get(module) or self._uses.get(module, '')
