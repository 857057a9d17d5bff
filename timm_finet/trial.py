"""Runs copies of a network on an example, so that nothing of the network itself changes, and compares the outputs."""
import math
import random
from collections.abc import Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import is_dataclass
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten, tree_map_only

__all__ = ['Example', 'copy_model', 'copy_to_run', 'distance', 'example_for', 'run', 'undisturbed']

Example = Tuple[tuple, Dict[str, Any]]


def example_for(model: nn.Module, example_inputs: Any) -> Optional[Example]:
    """Arguments to run `model` on: those given, or for a network of timm an input as its cfg says; else None."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if example_inputs is not None:
        raise TypeError(
            f'example_inputs={type(example_inputs).__name__} must be a tensor, or a tuple or dict of arguments.')
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size')
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if size is None or weight is None:
        return None
    # Two images: with one, `squeeze` would take the batch away.
    shape = 2, getattr(model, 'in_chans', size[0]), *size[1:]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (x.to(weight.device, weight.dtype),), {}


def copy_model(model: nn.Module, shared: Tuple[type, ...] = ()) -> nn.Module:
    """A deep copy that shares the tensors of these types, and what a forward with gradients has left behind."""
    tensors = (t for m in model.modules() for t in (*m._parameters.values(), *vars(m).values()))
    tensors = [t for t in tensors if isinstance(t, torch.Tensor) and (isinstance(t, shared) or not t.is_leaf)]
    copy = deepcopy(model, {id(t): t for t in tensors})
    for name, module in copy.named_modules():
        module.training = model.get_submodule(name).training  # torchvision's traced feature extractors forget theirs
    return copy


def copy_to_run(model: nn.Module) -> nn.Module:
    """In eval mode, with the parameters shared: what a forward counts or keeps, is counted and kept in the copy."""
    copy = copy_model(model, (nn.Parameter,))
    copy.eval()
    return copy


@contextmanager
def undisturbed():
    """Without gradients and compilers, and with the random states at the end as they were."""
    state = random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance('force_eager'):
            yield
    finally:
        random.setstate(state)


def _call(function: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def run(model: nn.Module, example: Example, call: Callable = _call) -> Dict[str, Any]:
    """What `model` gives, and where timm's `forward_intermediates` takes the example, what that gives."""
    outputs = {}
    for name, function in (('outputs', model), ('intermediates', getattr(model, 'forward_intermediates', None))):
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), example)
        try:
            with undisturbed():
                outputs[name] = call(function, args, kwargs) if function else None
        except Exception:
            if function is model:
                raise
    return outputs


def distance(outputs: Any, others: Any) -> float:
    """The largest difference of two tensors relative to the largest value; infinite between other structures.

    Tensors on the meta device have no values; of all else that is no tensor the type alone is compared.
    """
    leaves, structure = tree_flatten(outputs)
    other_leaves, other_structure = tree_flatten(others)
    if structure != other_structure:
        return math.inf
    return max((_leaf_distance(a, b) for a, b in zip(leaves, other_leaves)), default=0.)


def _leaf_distance(a: Any, b: Any) -> float:
    if type(a) is not type(b):
        return math.inf
    if is_dataclass(a):
        return distance(vars(a), vars(b))
    if isinstance(a, float):
        a, b = torch.tensor(a), torch.tensor(b)
    if not isinstance(a, torch.Tensor):
        return 0.
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return math.inf
    if a.is_meta:
        return 0.
    if not a.is_floating_point():
        return 0. if a.equal(b) else math.inf
    a, b = a.cpu().double(), b.cpu().double()
    finite = a.isfinite()
    if not finite.equal(b.isfinite()):
        return math.inf
    difference = (a - b)[finite].abs()
    return (difference.max() / a[finite].abs().max()).item() if difference.any() else 0.
