"""Compares the outputs of two networks, of any structure, and allows for what rounding does to them."""
import math
from collections import deque
from typing import Any, List, NamedTuple, Sequence, Tuple

import numpy as np
import torch

__all__ = ['Verdict', 'distance', 'flatten', 'judge']


def flatten(value: Any) -> Tuple[Any, List[torch.Tensor], List[str]]:
    """Flatten containers of any depth and objects with attributes.

    Returns:
        The structure, which includes Python's integers and can be compared with `==`; all other numbers as tensors; and
        the types of values that cannot be compared.
    """
    tensors, unknown, seen = [], [], set()

    def visit(value: Any) -> Any:
        """Collect what is in `value` and return its structure."""
        if isinstance(value, (float, complex, np.ndarray, np.generic)) and np.asarray(value).dtype.kind in 'biufc':
            array = np.array(value)
            tensors.append(torch.as_tensor(array))
            return type(value), array.shape, array.dtype.str
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return type(value), value.shape, value.dtype
        if value is None or isinstance(value, (bool, int, str, torch.dtype, torch.device)):
            return value
        if id(value) in seen:
            return 'seen'
        seen.add(id(value))
        if isinstance(value, dict):
            return type(value), list(value), list(map(visit, value.values()))
        if isinstance(value, (list, tuple, deque)):
            return type(value), list(map(visit, value))
        if callable(value):  # a network, for instance
            return type(value)
        if hasattr(value, '__dict__'):
            return type(value), list(vars(value)), list(map(visit, vars(value).values()))
        unknown.append(type(value).__name__)
        return type(value)

    return visit(value), tensors, unknown


class Verdict(NamedTuple):
    complaint: str  # what is wrong, or ''
    unproven: int  # how many parts of the outputs prove nothing
    total: int  # how many parts there are


def judge(outputs: Any, others: Any, noisy: Sequence[Any], rounding: float) -> Verdict:
    """Compare the outputs of a network with those of its rewritten copy.

    Args:
        outputs, others: The outputs of the network and of its rewritten copy.
        noisy: The outputs of copies whose weights have been changed by as much as rounding may change them.
        rounding: The relative precision in which the network computes.
    """
    structure, tensors, unknown = flatten(outputs)
    other_structure, other_tensors, _ = flatten(others)
    noisy_structures, noisy_tensors, _ = zip(*map(flatten, noisy))
    total = len(tensors) + len(unknown)
    if any(each != structure for each in noisy_structures):  # rounding alone may make a detector find other objects
        return Verdict('', total, total)
    if other_structure != structure:
        return Verdict('another structure', 0, total)
    unproven, depends_on_weights = len(unknown), any(tensor.is_meta for tensor in tensors)
    for tensor, other, *copies in zip(tensors, other_tensors, *noisy_tensors):
        if tensor.is_meta:  # there are no values, as expected
            continue
        difference, allowed, is_affected = _measure(tensor, other, copies, rounding)
        if allowed >= 1:
            unproven += 1
        elif difference > allowed:
            text = f'values that differ by {difference:.1e} of the largest, where rounding explains {allowed:.1e}'
            return Verdict(text, unproven, total)
        else:
            depends_on_weights |= is_affected
    return Verdict('', unproven if depends_on_weights else total, total)


def distance(outputs: Any, others: Any) -> float:
    """Return the largest difference of two tensors, relative to their largest value, or inf if structures differ."""
    structure, tensors, _ = flatten(outputs)
    other_structure, other_tensors, _ = flatten(others)
    if structure != other_structure:
        return math.inf
    return max((_measure(a, b, [a], 0.)[0] for a, b in zip(tensors, other_tensors) if not a.is_meta), default=0.)


def _measure(
        tensor: torch.Tensor, other: torch.Tensor, copies: Sequence[torch.Tensor],
        rounding: float) -> Tuple[float, float, bool]:
    """Return by how much two tensors differ and may differ, and whether they depend on the weights.

    Differences are relative to the largest value that rounding changes: a constant that fills a mask says nothing about
    the size of the other values. Any difference is allowed if rounding or chance alone changes the values, or if no
    value is finite.
    """
    a, b = _numbers(tensor), _numbers(other)
    if not a.numel():
        return 0., math.inf, False
    difference = _differences(a, b)
    noise = torch.stack([_differences(a, _numbers(copy)) for copy in copies]).amax(0)
    values = torch.maximum(a.abs(), b.abs()).nan_to_num(posinf=0.)
    scale = (values[noise > 0] if noise.any() else values).max().item() or 1.
    difference, noise = difference.max().item() / scale, noise.max().item() / scale
    is_rounded = tensor.is_floating_point() or tensor.is_complex()
    if is_rounded and a.isfinite().any():
        allowed = 100 * max(rounding, noise) + 2 * torch.finfo(tensor.dtype).eps
    else:
        allowed = math.inf if is_rounded or noise else 0.
    return difference, allowed, noise > 0 or not is_rounded


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """Return all values in float64 on the CPU."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.detach().cpu().double()


def _differences(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `|a - b|`, which is infinite where only one is NaN and where the two are different infinities."""
    are_same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(are_same, 0., (a - b).abs().nan_to_num(nan=math.inf))
