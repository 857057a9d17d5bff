"""Runs copies of a network on an example, so that nothing of the network itself changes, and compares the outputs."""
import math
import random
from collections import deque
from collections.abc import Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
import torch.nn as nn

__all__ = ['Example', 'copy_model', 'copy_to_run', 'distance', 'example_for', 'judge', 'run', 'undisturbed']

Example = Tuple[tuple, Dict[str, Any]]


def example_for(model: nn.Module, example_inputs: Any) -> Optional[Example]:
    """Arguments to run `model` on: those given, or for a network of timm an input as its cfg says; else None."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple):
        if example_inputs and all(isinstance(size, int) for size in example_inputs):
            raise TypeError(f'example_inputs={example_inputs} is a shape: give a tensor, torch.rand{example_inputs}.')
        return example_inputs, {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if example_inputs is not None:
        raise TypeError(
            f'example_inputs={type(example_inputs).__name__} must be a tensor, or a tuple or dict of arguments; if the '
            f'network takes a list, a tuple with it.')
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size')
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if size is None or weight is None:
        return None
    # Two images: with one, `squeeze` would take the batch away.
    shape = 2, getattr(model, 'in_chans', size[0]), *size[1:]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (x.to(weight.device, weight.dtype),), {}


def _copy(value: Any, memo: Dict[int, Any], what: str) -> Any:
    try:
        return deepcopy(value, memo)
    except Exception as error:
        raise TypeError(f'{what} cannot be copied, as is necessary to try it out: {error}') from error


def _without_history(tensors: List[torch.Tensor]) -> Dict[int, torch.Tensor]:
    """For `deepcopy`, which takes none with a history: copies without it, by id."""
    return {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors if not t.is_leaf}


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also of a network in which a forward with gradients has left tensors."""
    memo = _without_history([t for module in model.modules() for t in _flatten(vars(module))[1]])
    groups = [module.process_group for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    memo.update((id(group), group) for group in groups if group is not None)
    copy = _copy(model, memo, type(model).__name__)
    shared = set(model.modules()).intersection(copy.modules())
    if shared:
        name = next(name for name, module in model.named_modules() if module in shared)
        raise RuntimeError(f'A deep copy of {type(model).__name__} has the same {name}, so nothing can be tried on it.')
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
        args, kwargs = _copy(example, _without_history(_flatten(example)[1]), 'example_inputs')
        try:
            with undisturbed():
                outputs[name] = call(function, args, kwargs) if function else None
        except Exception:
            if function is model:
                raise
    return outputs


def _flatten(value: Any, seen: Optional[Set[int]] = None) -> Tuple[Any, List[torch.Tensor], List[str]]:
    """The structure of `value`, which `==` compares; its tensors, numbers among them; types of what is in neither."""
    seen = set() if seen is None else seen
    if isinstance(value, (float, complex)):
        return type(value), [torch.from_numpy(np.asarray(value))], []
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in 'biufc':
        return type(value), [torch.as_tensor(value)], []
    if isinstance(value, torch.Tensor):
        return (type(value), value.shape, value.dtype), [value], []
    if value is None or isinstance(value, (bool, int, str, torch.dtype, torch.device)):
        return value, [], []
    if id(value) in seen:
        return 'seen', [], []
    seen.add(id(value))
    if isinstance(value, dict):
        names, values = list(value), list(value.values())
    elif isinstance(value, (list, tuple, deque)):
        names, values = len(value), list(value)
    elif callable(value):  # a network, for instance
        return type(value), [], []
    elif hasattr(value, '__dict__'):
        names, values = list(vars(value)), list(vars(value).values())
    else:
        return type(value), [], [type(value).__name__]
    parts = [_flatten(part, seen) for part in values]
    structure = type(value), names, [part[0] for part in parts]
    return structure, [t for part in parts for t in part[1]], [name for part in parts for name in part[2]]


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """All values in float64, on the CPU."""
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.detach().cpu().double()


def _changes(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`|a - b|` of numbers, infinite where only one is NaN or they are infinite otherwise."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0., (a - b).abs().nan_to_num(nan=math.inf))


def distance(outputs: Any, others: Any) -> float:
    """The largest difference of two tensors relative to the largest value; infinite between other structures."""
    structure, tensors, _ = _flatten(outputs)
    other_structure, other_tensors, _ = _flatten(others)
    if structure != other_structure:
        return math.inf
    largest = 0.
    for a, b in zip(tensors, other_tensors):
        if a.numel() and not a.is_meta:
            a, b = _numbers(a), _numbers(b)
            scale = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.
            difference = _changes(a, b).max().item()
            largest = max(largest, difference / scale if scale else math.inf if difference else 0.)
    return largest


def judge(outputs: Any, others: Any, noisy: Sequence[Any], rounding: float) -> Tuple[str, int, int]:
    """Compare two networks' outputs by what rounding does to them.

    Each tensor may differ by 100 times of what it differs by in `noisy`, or of `rounding`, relative to the largest of
    its values that are not the same in `noisy`: a constant that fills a mask says nothing of the others' size.

    Args:
        outputs, others: Of the network and of its rewritten copy.
        noisy: Of copies whose weights have been changed as by rounding.
        rounding: Relative, of what the network computes in.

    Returns:
        What is wrong, or ''; how many parts of the outputs tell nothing, as rounding or chance alone changes them or as
        they cannot be compared; and how many parts there are.
    """
    structure, tensors, unknown = _flatten(outputs)
    total = len(tensors) + len(unknown)
    other_structure, other_tensors, _ = _flatten(others)
    noisy_structures, noisy_tensors, _ = zip(*map(_flatten, noisy))
    if any(each != structure for each in noisy_structures):  # as of a detector that then finds other things
        return '', total, total
    if other_structure != structure:
        return 'another structure', 0, total
    blind, knows_weights = len(unknown), any(t.is_meta for t in tensors)
    for tensor, other, *copies in zip(tensors, other_tensors, *noisy_tensors):
        if tensor.is_meta:  # has no values, as one expects
            continue
        a, b = _numbers(tensor), _numbers(other)
        if not a.isfinite().any():
            blind += 1
            continue
        difference = _changes(a, b)
        noise = torch.stack([_changes(a, _numbers(copy)) for copy in copies]).amax(0)
        values = torch.maximum(a.abs(), b.abs()).nan_to_num(posinf=0.)
        scale = values[noise > 0].max().item() if noise.any() else values.max().item()
        noise, difference = noise.max().item() / (scale or 1.), difference.max().item() / (scale or 1.)
        is_rounded = tensor.is_floating_point() or tensor.is_complex()
        if is_rounded:
            allowed = 100 * max(rounding, noise) + 2 * torch.finfo(tensor.dtype).eps
        else:
            allowed = math.inf if noise else 0.
        if allowed >= 1:
            blind += 1
        elif difference <= allowed:
            knows_weights |= bool(noise) or not is_rounded
        else:
            complaint = f'values that differ by {difference:.1e} of the largest, where rounding explains {allowed:.1e},'
            return complaint, blind, total
    return '', blind if knows_weights else total, total
