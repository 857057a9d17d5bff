"""Runs copies of a network on an example, without any change to the network itself."""
import random
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn

from .compare import flatten

__all__ = ['Example', 'copy_model', 'copy_to_run', 'example_for', 'run', 'undisturbed']

Example = Tuple[tuple, Dict[str, Any]]


def example_for(model: nn.Module, example_inputs: Any) -> Optional[Example]:
    """Return the arguments to run `model` on: those given, random images of the size in `pretrained_cfg`, or None."""
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        if example_inputs and all(isinstance(size, int) for size in example_inputs):
            raise TypeError(f'example_inputs={example_inputs} is a shape: give a tensor, torch.rand{example_inputs}.')
        return example_inputs, {}
    if example_inputs is not None:
        raise TypeError(
            f'example_inputs={type(example_inputs).__name__} must be a tensor, or a tuple or dict of arguments. If the '
            f'network takes a list, give a tuple that contains it.')
    size = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size')
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if size is None or weight is None:
        return None
    # Two images: with one, `squeeze` would remove the batch dimension.
    shape = 2, getattr(model, 'in_chans', size[0]), *size[1:]
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return (images.to(weight.device, weight.dtype),), {}


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy, also of a network that holds a process group or results of a forward pass with gradients."""
    memo = {
        id(module.process_group): module.process_group for module in model.modules()
        if isinstance(module, nn.SyncBatchNorm) and module.process_group is not None}
    copy = _copy(model, type(model).__name__, [vars(module) for module in model.modules()], memo)
    shared = set(model.modules()).intersection(copy.modules())
    if shared:
        name = next(name for name, module in model.named_modules() if module in shared)
        raise RuntimeError(f'A deep copy of {type(model).__name__} shares {name} with it, so it cannot be tried out.')
    for name, module in copy.named_modules():
        module.training = model.get_submodule(name).training  # copies of torchvision's feature extractors lose it
    return copy


def copy_to_run(model: nn.Module) -> nn.Module:
    """Return a copy in eval mode. It shares no tensors with `model`: `eval()` and the forward may change parameters."""
    return copy_model(model).eval()


def _copy(value: Any, name: str, contents: Any, memo: Dict[int, Any]) -> Any:
    """Return a deep copy. `deepcopy` refuses tensors with a history, so those in `contents` are copied without it."""
    _, tensors, _ = flatten(contents)
    for tensor in tensors:
        if not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    try:
        return deepcopy(value, memo)
    except Exception as error:
        raise TypeError(f'{name} cannot be copied, which is necessary to try it out: {error}') from error


@contextmanager
def undisturbed():
    """Run without gradients and compilers, and restore the random states at the end."""
    state, numpy_state = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), torch.compiler.set_stance('force_eager'):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def run(model: nn.Module, example: Example, context: Callable = nullcontext) -> Dict[str, Any]:
    """Return the outputs of `model` on a copy of the example, called within a new `context()`.

    They include those of timm's `forward_intermediates` if the network has this method and it accepts the example.
    """
    calls = {'outputs': model}
    if hasattr(model, 'forward_intermediates'):
        calls['intermediates'] = model.forward_intermediates
    outputs = {}
    for name, function in calls.items():
        args, kwargs = _copy(example, 'example_inputs', example, {})
        try:
            with undisturbed(), context():
                outputs[name] = function(*args, **kwargs)
        except Exception:
            if function is model:
                raise
    return outputs
