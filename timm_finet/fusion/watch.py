"""Finds the layer that each norm may be folded into, by watching a network run.

Hooks record which layer made a tensor and which norm took it. Two of torch's modes record what else reads it. Weak
references show whether anything still holds it at the end.
"""
import gc
import threading
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..fbn import FBNConv2d, has_hooks
from .layers import ANY_NORM, LAYERS, layers_and_norms, why_untouchable

__all__ = ['NO_LAYER', 'Watch']

NO_LAYER = 'not directly behind a convolution or linear layer'

# Calls that neither read a tensor's values nor make another tensor of them.
_LOOKS = {
    torch.is_floating_point, torch.Tensor.dim, torch.Tensor.size, torch.Tensor.stride, torch.Tensor.numel,
    torch.Tensor.is_contiguous, torch.Tensor.is_floating_point, torch.Tensor.get_device, torch.Tensor.__len__,
    *(getattr(torch.Tensor, name).__get__ for name in (
        'shape', 'dtype', 'device', 'ndim', 'layout', 'requires_grad', 'is_cuda', 'is_meta', 'is_sparse',
        'is_quantized', 'is_nested'))}


class _Reports:
    """A mode that reports each call and then makes it."""

    def __init__(self, report: Callable):
        super().__init__()
        self.report = report

    def call(self, func: Callable, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        self.report(func, args, kwargs)
        return func(*args, **(kwargs or {}))


class _Functions(_Reports, TorchFunctionMode):
    """Reports the calls of torch's functions from Python."""
    __torch_function__ = _Reports.call


class _Operators(_Reports, TorchDispatchMode):
    """Reports all operators that run, including those called by scripted functions."""
    __torch_dispatch__ = _Reports.call
    supports_higher_order_operators = True


def _computing_modules(module: nn.Module) -> List[nn.Module]:
    """Return the module and, for an FBN layer, the norm inside. (An activation inside a norm stays.)"""
    return list(module.modules()) if isinstance(module, FBNConv2d) else [module]


_State = Dict[Any, Tuple[Any, int]]


def _state(module: nn.Module) -> _State:
    """Return everything that the module's forward may use, and how often each tensor was changed in place."""
    state = {}
    for i, submodule in enumerate(_computing_modules(module)):
        for name, value in (
                *vars(submodule).items(), *submodule.named_parameters(recurse=False),
                *submodule.named_buffers(recurse=False)):
            has_version = isinstance(value, torch.Tensor) and not value.is_inference()
            state[i, name] = value, value._version if has_version else 0
    return state


def _is_same(before: _State, after: _State) -> bool:
    """Whether no attribute has been replaced and no tensor has been changed in place."""
    if before.keys() != after.keys():
        return False
    changes = [(*before[name], *after[name]) for name in before]
    return all(
        version == new_version and (value is new or isinstance(value, (bool, int, float, str)) and value == new)
        for value, version, new, new_version in changes)


@dataclass
class _Record:
    """What is known about one layer or norm."""
    state: _State  # before the run
    why_stays: str  # why it must stay, regardless of its neighbours, or ''
    why_unpaired: str = ''  # why it must not be part of a pair, or ''
    sources: Set[Optional[nn.Module]] = field(default_factory=set)  # of a norm: the layers before it; None: no layer
    readers: Set[nn.Module] = field(default_factory=set)  # of a layer: the norms that took its output
    by_keyword: bool = False  # whether the input was passed by keyword
    example: Optional[torch.Tensor] = None  # a layer's input, on the meta device

    def keep(self, reason: str) -> None:
        self.why_stays = self.why_stays or reason

    def keep_unpaired(self, reason: str) -> None:
        self.why_unpaired = self.why_unpaired or reason


class Watch:
    """Watches calls of a network, then says which norm may be folded into which layer, and why others stay.

    In every call the layer's output must go to this norm only, and the norm must take nothing else.

    Args:
        model: The network that runs.
        original: The network of which `model` is a copy.
    """

    def __init__(self, model: nn.Module, original: nn.Module):
        self.model = model
        self.layers, self.norms = layers_and_norms(model)
        self.rounding = 0.  # the relative precision of the coarsest layer output
        self.reached = ''  # the name of a tensor of the original that the copy computes with
        self._originals = {} if model is original else {
            id(t): name for name, t in (*original.named_parameters(), *original.named_buffers())}
        self.records: Dict[nn.Module, _Record] = {}
        self._owners: Dict[int, List[nn.Module]] = defaultdict(list)  # the modules that own a tensor, by its id
        self._vanishing: Set[int] = set()  # ids of the norms' tensors
        for module in (*self.layers.values(), *self.norms.values()):
            self.records[module] = _Record(_state(module), why_untouchable(module))
            for value, _ in self.records[module].state.values():
                if isinstance(value, torch.Tensor):
                    self._owners[id(value)].append(module)
            for norm in _computing_modules(module):
                if isinstance(norm, ANY_NORM):
                    self._vanishing.update(map(id, (*norm.parameters(recurse=False), *norm.buffers(recurse=False))))
        self._hooked = [set(module.modules()) for module in model.modules() if has_hooks(module)]
        self._layer_of = WeakIdKeyDictionary()  # for each layer output that still exists
        self._calls: Counter = Counter()
        self._running: List[nn.Module] = []
        self._thread = 0

    @contextmanager
    def watching(self):
        """Watch one call of the network or of one of its methods. The caller must hold the result until this ends."""
        hooks = []
        for module in self.records:
            hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        self._thread = threading.get_ident()
        try:
            with _Functions(self._see), _Operators(self._see):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            self._running.clear()
        if any(self.records[layer].readers for layer in self._layer_of.values()):
            gc.collect()  # frees tensors that only a reference cycle keeps
        for layer in self._layer_of.values():
            self.records[layer].keep_unpaired('returned or kept')
        for module, count in self._calls.items():
            if count > 1:
                self.records[module].keep_unpaired('called more than once')
        self._layer_of = WeakIdKeyDictionary()
        self._calls.clear()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        record = self.records[module]
        self._running.append(module)
        self._calls[module] += 1
        self._check_state(module)
        if threading.get_ident() != self._thread:  # the modes see nothing there
            record.keep('called in another thread')
        if len(args) + len(kwargs) > 1 and type(module) not in LAYERS:
            record.keep('called with more than its input')
        if not args:
            record.by_keyword = True
            if 'input' not in kwargs:  # as nn.Identity and nn.Conv2d name it
                record.keep('called by keyword')
        x = next(iter((*args, *kwargs.values())), None)
        if isinstance(module, ANY_NORM):
            self._note_source(module, x)
        elif isinstance(x, torch.Tensor):
            record.example = torch.empty_like(x, device='meta')
        else:
            record.keep_unpaired('called without a tensor')

    def _note_source(self, norm: nn.Module, x: Any) -> None:
        layer = self._layer_of.get(x) if isinstance(x, torch.Tensor) else None
        self.records[norm].sources.add(layer)
        if layer is not None:
            self.records[layer].readers.add(norm)
            # Layer and norm agree about the channel dimension only in (N, C, ...), which has as many dimensions as the
            # weight.
            if x.dim() != layer.weight.dim():
                self.records[norm].keep_unpaired("normalising another dimension than its layer's channels")

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self._check_state(module)
        self._running.pop()
        if isinstance(module, ANY_NORM):
            if len({v.dtype for v in (output, *args, *kwargs.values()) if isinstance(v, torch.Tensor)}) > 1:
                self.records[module].keep_unpaired('changing the dtype')
        elif isinstance(output, torch.Tensor):
            self._layer_of[output] = module
            if output.is_floating_point():
                is_coarse = output.is_cuda and output.dtype == torch.float32  # may be TF32
                self.rounding = max(self.rounding, 2 ** -11 if is_coarse else torch.finfo(output.dtype).eps)

    def _check_state(self, module: nn.Module) -> None:
        if not _is_same(self.records[module].state, _state(module)):
            self.records[module].keep('changed by the forward')

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
            if layer is not None and running not in self.records[layer].readers:
                self.records[layer].keep_unpaired('read elsewhere')
            owners = self._owners.get(id(tensor), [running])
            if running not in owners:
                for module in owners:
                    self.records[module].keep('looked into')

    def layer_of(self, norm: nn.Module) -> Tuple[Optional[nn.Module], str]:
        """Return the layer that `norm` may be folded into and '', or None and the reason why the norm stays."""
        record = self.records[norm]
        reason = record.why_stays or record.why_unpaired
        if reason:
            return None, reason
        if not record.sources:
            return None, 'not called'
        if record.sources == {None}:
            return None, NO_LAYER
        if len(record.sources) > 1:
            return None, 'behind several layers'
        layer, = record.sources
        reason = self.records[layer].why_stays or self.records[layer].why_unpaired
        if reason:
            return None, f'behind a layer that is {reason}'
        if self.records[layer].readers != {norm}:
            return None, 'behind a layer that several norms read'
        if any((layer in hooked) != (norm in hooked) for hooked in self._hooked):
            return None, 'behind a hook that sees its input'
        return layer, ''
