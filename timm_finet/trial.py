"""Runs copies of a network on an example, so that nothing of the network itself changes, and compares the outputs."""
import math
import random
from collections import deque
from collections.abc import Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn

__all__ = ['Example', 'copy_model', 'copy_to_run', 'distance', 'example_for', 'has_values', 'run', 'undisturbed']

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


def _copy(value: Any, tensors: List[torch.Tensor]) -> Any:
    """A deep copy of `value`, in which these tensors are leaves: torch copies no others."""
    return deepcopy(value, {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors})


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also of a network in which a forward with gradients has left tensors."""
    tensors = (t for m in model.modules() for t in vars(m).values())
    copy = _copy(model, [t for t in tensors if isinstance(t, torch.Tensor) and not t.is_leaf])
    for name, module in copy.named_modules():
        module.training = model.get_submodule(name).training  # torchvision's traced feature extractors forget theirs
    return copy


def copy_to_run(model: nn.Module) -> nn.Module:
    """In eval mode. It shares no tensor with `model`, as `eval()` and the forward may change parameters too."""
    return copy_model(model).eval()


@contextmanager
def undisturbed():
    """Without gradients and compilers, and with the random states at the end as they were."""
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance('force_eager'):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def _call(function: Callable, args: tuple, kwargs: Dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def run(model: nn.Module, example: Example, call: Callable = _call) -> Dict[str, Any]:
    """What `model` gives, and where timm's `forward_intermediates` takes the example, what that gives."""
    outputs = {}
    for name, function in (('outputs', model), ('intermediates', getattr(model, 'forward_intermediates', None))):
        args, kwargs = _copy(example, _flatten(example)[1])
        try:
            with undisturbed():
                outputs[name] = call(function, args, kwargs) if function else None
        except Exception:
            if function is model:
                raise
    return outputs


def _flatten(value: Any, around: Tuple[int, ...] = ()) -> Tuple[Any, List[torch.Tensor]]:
    """The structure of `value`, which `==` compares, and its tensors; floats count as tensors.

    Of a set, whose order is chance, and of what can be called, such as a network, only the type is known.
    """
    if id(value) in around:
        return 'cycle', []
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in 'biuf':
        return type(value), [torch.as_tensor(value)]
    if isinstance(value, float):
        return float, [torch.tensor(value, dtype=torch.float64)]
    if isinstance(value, torch.Tensor):
        return (type(value), value.shape, value.dtype), [value]
    if value is None or isinstance(value, (bool, int, str)):
        return value, []
    if isinstance(value, Mapping):
        names, values = list(value), list(value.values())
    elif isinstance(value, (list, tuple, deque)):
        names, values = len(value), list(value)
    elif hasattr(value, '__dict__') and not callable(value):
        names, values = list(vars(value)), list(vars(value).values())
    else:
        return type(value), []
    parts = [_flatten(part, (*around, id(value))) for part in values]
    return (type(value), names, [structure for structure, _ in parts]), [t for _, tensors in parts for t in tensors]


def has_values(outputs: Any) -> bool:
    """Whether there is anything to compare. Tensors on the meta device have no values, which is what one expects."""
    return any(t.is_meta or t.isfinite().any() for t in _flatten(outputs)[1])


def distance(outputs: Any, others: Any) -> float:
    """The largest difference of two tensors relative to the largest value; infinite between other structures."""
    structure, tensors = _flatten(outputs)
    other_structure, other_tensors = _flatten(others)
    if structure != other_structure:
        return math.inf
    return max(map(_tensor_distance, tensors, other_tensors), default=0.)


def _tensor_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_meta:
        return 0.
    a, b = (t.dequantize() if t.is_quantized else t.to_dense() if t.layout != torch.strided else t for t in (a, b))
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.is_floating_point():
        return 0. if a.equal(b) else math.inf
    a, b = a.cpu().double(), b.cpu().double()
    finite = a.isfinite()
    if not finite.equal(b.isfinite()):
        return math.inf
    difference = (a - b)[finite].abs()
    return (difference.max() / a[finite].abs().max()).item() if difference.any() else 0.
