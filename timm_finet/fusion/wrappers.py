"""Rewrites networks inside the wrappers of torch and timm."""
from copy import deepcopy
from typing import Any, Callable

import torch.nn as nn

from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3

from .folding import set_child

__all__ = ['rewrite_wrapped', 'wrapped_name']


def wrapped_name(model: Any) -> str:
    """Return the attribute in which a wrapper holds its network, or '' if `model` is not a wrapper."""
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel, ModelEmaV2, ModelEmaV3)):
        return 'module'
    if isinstance(model, ModelEma):
        return 'ema'
    return '_orig_mod' if '_orig_mod' in dict(model.named_children()) else ''  # torch.compile's wrapper


def rewrite_wrapped(wrapper: Any, rewrite: Callable[[nn.Module], nn.Module], inplace: bool) -> Any:
    """Return the wrapper, or a copy of it, with its network rewritten by `rewrite`."""
    name = wrapped_name(wrapper)
    network = getattr(wrapper, name)
    rewritten = rewrite(network)
    if not inplace:
        return deepcopy(wrapper, {id(network): rewritten})
    if isinstance(wrapper, nn.Module):
        set_child(wrapper, name, rewritten)
    else:
        setattr(wrapper, name, rewritten)
    return wrapper
