"""Finds the layers of any network that a BatchNorm can be folded into: what `fuse_fbn` and `convert_fbn` stand on."""
import logging
from collections import defaultdict
from copy import deepcopy
from typing import Any, Dict, Iterator, List, Sequence, Set, Tuple

import torch
import torch.nn as nn
from torch.fx import Graph, Node, Tracer
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from timm.layers import BatchNormAct2d, Conv2dSame, SyncBatchNormAct, get_notrace_functions, get_notrace_modules

from .depthwise import DepthwiseConv2d
from .fbn import FBNConv2d

__all__ = ['copy_model', 'find_pairs', 'is_watched']

_logger = logging.getLogger(__name__)

# Exact types: a subclass may make its weight in forward (weight standardisation, parametrisations), or norm otherwise.
# With the dimension: a BatchNorm of another one would normalise what is no channel of the layer.
_NORMS_2D = (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct)
_NORMS_BEHIND = {
    nn.Conv1d: (nn.BatchNorm1d, nn.SyncBatchNorm),
    nn.Conv2d: _NORMS_2D,
    DepthwiseConv2d: _NORMS_2D,
    Conv2dSame: _NORMS_2D,
    FBNConv2d: _NORMS_2D,
    nn.Conv3d: (nn.BatchNorm3d, nn.SyncBatchNorm),
    nn.Linear: (nn.BatchNorm1d, nn.SyncBatchNorm),
}
_MAX_WAYS = 32


class _Tracer(Tracer):
    """Stops at BatchNorm and timm's notrace modules, notes what is read, and takes branches by `choices`, then True."""

    def __init__(self, choices: Sequence[bool]):
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = (_BatchNorm, *get_notrace_modules())
        self.choices = list(choices)
        self.taken = 0
        self.read: Set[int] = set()

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, qualified_name)

    def getattr(self, attr: str, value: Any, parameter_proxy_cache: Dict[str, Any]) -> Any:
        self.read.add(id(value))
        return super().getattr(attr, value, parameter_proxy_cache)

    def to_bool(self, obj: Any) -> bool:
        self.taken += 1
        if self.taken > len(self.choices):
            self.choices.append(True)
        return self.choices[self.taken - 1]


def copy_model(model: nn.Module, shared: Sequence[torch.Tensor] = ()) -> nn.Module:
    copy = deepcopy(model, {id(tensor): tensor for tensor in shared})
    for name, module in copy.named_modules():
        module.training = model.get_submodule(name).training  # torchvision's traced feature extractors forget theirs
    return copy


def _tensors(model: nn.Module) -> List[torch.Tensor]:
    return [
        tensor for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        if isinstance(tensor, torch.Tensor)]


def _graphs(model: nn.Module) -> Iterator[Tuple[Graph, Set[int]]]:
    """A graph, and the ids of the tensors that it reads, of each way that control flow may take through `model`."""
    ways: List[List[bool]] = [[]]
    for choices in ways:
        # of a copy, which shares the tensors: modules may keep proxies, and hooks pass them on
        copy = copy_model(model, _tensors(model))
        for module in copy.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        tracer = _Tracer(choices)
        yield tracer.trace(copy), tracer.read
        ways += [tracer.choices[:i] + [False] for i in range(len(choices), len(tracer.choices))]
        if len(ways) > _MAX_WAYS:
            raise RuntimeError(f'its control flow has more than {_MAX_WAYS} ways')


def _is_matrix(node: Any, root: nn.Module) -> bool:
    """Whether the graph proves that `node` gives `(N, C)`: of `(N, L, C)`, BatchNorm1d would normalise the L."""
    if not isinstance(node, Node) or not node.args:
        return False
    name = getattr(node.target, '__name__', node.target)
    if node.op == 'call_module':
        module = root.get_submodule(node.target)
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        keeps_shape = isinstance(module, (nn.Linear, nn.BatchNorm1d, nn.Identity, nn.ReLU, _DropoutNd))
    elif name in ('flatten', 'view', 'reshape'):
        return len(node.args) == 3 if name != 'flatten' else node.args[1:] == (1,) and not node.kwargs
    else:
        keeps_shape = name in ('relu', 'dropout')
    return keeps_shape and _is_matrix(node.args[0], root)


def _is_hooked(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def is_watched(layer: nn.Module, read: Set[int]) -> bool:
    """Whether anything but the layer's own forward sees what is in it."""
    return any(map(_is_hooked, layer.modules())) or any(id(tensor) in read for tensor in _tensors(layer))


def find_pairs(model: nn.Module) -> Tuple[List[Tuple[nn.Module, nn.Module]], Set[int]]:
    """Pairs of a convolution or linear layer and the BatchNorm that alone reads it, and the ids of the tensors read.

    A warning names the BatchNorms that cannot be judged, and the pairs that hooks or the network's forward look into.
    Whatever `torch.fx` raises on the network itself goes on to the caller.
    """
    sources, readers = defaultdict(set), defaultdict(set)
    read, unsure, opaque, kept = set(), set(), set(), set()
    roots = [model]  # then the modules that tracing has stopped at
    for root in roots:
        def called(node: Any):
            return root.get_submodule(node.target) if isinstance(node, Node) and node.op == 'call_module' else None

        try:
            graphs = list(_graphs(root))
        except Exception:  # whatever a forward may raise when it is handed proxies
            if root is model:
                raise
            opaque.update(root.modules())
            continue
        for graph, tensors in graphs:
            read |= tensors
            for node in graph.find_nodes(op='call_module'):
                module, source = called(node), node.args[0] if node.args else None
                sources[module].add(called(source))
                readers[module].update(map(called, node.users))
                if isinstance(module, nn.Linear) and not _is_matrix(source, root):
                    unsure.add(module)
                inner = set(module.modules()) - {module}
                if isinstance(module, FBNConv2d) or not any(isinstance(m, _BatchNorm) for m in inner):
                    unsure |= inner
                elif module not in roots:
                    roots.append(module)

    held = [set(module.modules()) for module in model.modules() if _is_hooked(module)]
    pairs = []
    for norm, (layer, *others) in list(sources.items()):
        if others or readers[layer] != {norm} or type(norm) not in _NORMS_BEHIND.get(type(layer), ()):
            continue
        if layer.weight.shape[0] != norm.num_features or norm.running_mean is None or {layer, norm} & (unsure | opaque):
            continue
        if is_watched(layer, read) or is_watched(norm, read) or any((layer in h) != (norm in h) for h in held):
            kept.add(norm)
        else:
            pairs.append((layer, norm))
    for module in model.modules():  # an FBN layer needs no pair
        opaque.discard(module.bn if isinstance(module, FBNConv2d) else None)
    kept |= {module for module in opaque if isinstance(module, _BatchNorm)}
    if kept:
        names = [name for name, module in model.named_modules() if module in kept]
        _logger.warning(
            f'{len(kept)} BatchNorm layers of {type(model).__name__} stay, as hooks or its forward look into them, or '
            f"torch.fx cannot trace the module around them: {', '.join(names)}")
    return pairs, read
