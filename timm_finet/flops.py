"""Multiply-adds by fvcore. One multiply-add is one FLOP, as in the paper."""
import warnings
from typing import Any, Dict, Optional, Tuple

import torch.nn as nn

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # fvcore scripts functions as it is imported, which torch calls deprecated
    from fvcore.nn import FlopCountAnalysis

__all__ = ['count_flops']


def count_flops(model: nn.Module, input_size: Optional[Tuple[int, int, int]] = None) -> Dict[str, Any]:
    """Count one picture's forward pass.

    Args:
        model: Any network; it is counted in eval mode, in the form it is in. Fuse it first for the deploy form.
        input_size: `(channels, height, width)`, by default the one of the model's `pretrained_cfg`.

    Returns:
        `conv`, `linear` and `other` multiply-adds (BatchNorm not counted), `params`, and `uncounted`: how often each
        operator ran that fvcore does not know.

    Raises:
        ValueError: No `input_size`, and no `pretrained_cfg` to take it from.
    """
    if input_size is None:
        if not hasattr(model, 'pretrained_cfg'):
            raise ValueError('input_size=None needs a model with a pretrained_cfg: give (channels, height, width).')
        input_size = model.pretrained_cfg['input_size']
    first = next(model.parameters())
    was_training = model.training
    model.eval()
    analysis = FlopCountAnalysis(model, first.new_zeros(1, *input_size))
    analysis.set_op_handle('aten::batch_norm', None).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_operator = analysis.by_operator()
    model.train(was_training)
    return {
        'conv': int(by_operator.pop('conv', 0)),
        'linear': int(by_operator.pop('linear', 0)),
        'other': int(sum(by_operator.values())),
        'params': sum(p.numel() for p in model.parameters()),
        'uncounted': dict(analysis.unsupported_ops()),
    }
