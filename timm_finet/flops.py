"""Counts multiply-adds with fvcore. One multiply-add is one FLOP, as in the paper."""
import warnings
from math import prod
from typing import Any, Dict, Optional, Tuple

import torch.nn as nn

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # on import fvcore scripts functions, which torch has deprecated
    from fvcore.nn import FlopCountAnalysis

__all__ = ['count_flops']


def count_flops(model: nn.Module, input_size: Optional[Tuple[int, int, int]] = None) -> Dict[str, Any]:
    """Count the multiply-adds of one image's forward pass.

    Args:
        model: Any network. It is counted in eval mode and in its present form; fuse it first to count the deploy form.
        input_size: `(channels, height, width)`; the default is that of the model's `pretrained_cfg`.

    Returns:
        The multiply-adds `conv`, `linear` and `other` (all else that fvcore counts, such as products of activations,
        and BatchNorm and average pooling with one for each element); the number of parameters, `params`; and
        `uncounted`, the number of calls of each operator that fvcore does not know.

    Raises:
        ValueError: `input_size` does not fit the model; or it is None and the model has no `pretrained_cfg`.
    """
    if input_size is None:
        if not hasattr(model, 'pretrained_cfg'):
            raise ValueError('input_size=None needs a model with a pretrained_cfg: give (channels, height, width).')
        input_size = model.pretrained_cfg['input_size']
    input_size = tuple(input_size)
    least = least_size(model)
    if min(input_size[1:]) < least:  # with padding, many networks run on smaller images
        raise ValueError(
            f'input_size={input_size} is too small for {type(model).__name__}, which reduces its input {least} times: '
            f'give at least {least} px.')
    first = next(model.parameters())
    was_training = model.training
    model.eval()
    analysis = FlopCountAnalysis(model, first.new_zeros(1, *input_size))
    analysis.set_op_handle('aten::batch_norm', lambda inputs, outputs: prod(outputs[0].type().sizes()))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'FBNConv2d computes')  # fvcore hooks every module
            by_operator = analysis.by_operator()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'input_size={input_size} does not fit {type(model).__name__}: {reason}') from error
    finally:
        model.train(was_training)
    return {
        'conv': int(by_operator.pop('conv', 0)),
        'linear': int(by_operator.pop('linear', 0)),
        'other': int(sum(by_operator.values())),
        'params': sum(p.numel() for p in model.parameters()),
        'uncounted': dict(analysis.unsupported_ops()),
    }


def least_size(model: nn.Module) -> int:
    """Return the smallest edge in pixels that the network does not reduce to nothing, by timm's `feature_info`."""
    levels = getattr(model, 'feature_info', None) or ()
    return max((level.get('reduction', 1) for level in levels if isinstance(level, dict)), default=1)
