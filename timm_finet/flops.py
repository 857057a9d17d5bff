"""Multiply-adds by fvcore, and `timm-finet flops`. One multiply-add is one FLOP, as in the paper."""
import csv
import sys
import warnings
from math import prod
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import torchvision
from timm.utils import reparameterize_model

from .names import MODULES, TORCHVISION, find_names
from .rewrite import fuse_fbn

with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # fvcore scripts functions as it is imported, which torch calls deprecated
    from fvcore.nn import FlopCountAnalysis

__all__ = ['count_flops']


def count_flops(model: nn.Module, input_size: Optional[Tuple[int, int, int]] = None) -> Dict[str, Any]:
    """Count one image's forward pass.

    Args:
        model: Any network; it is counted in eval mode, in the form it is in. Fuse it first for the deploy form.
        input_size: `(channels, height, width)`, by default the one of the model's `pretrained_cfg`.

    Returns:
        Multiply-adds `conv`, `linear` and `other` (BatchNorm and average pooling at one an element, products of
        activations), `params`, and `uncounted`: how often each operator ran that fvcore does not know.

    Raises:
        ValueError: `input_size` does not fit the model, or there is none, nor a `pretrained_cfg` to take it from.
    """
    if input_size is None:
        if not hasattr(model, 'pretrained_cfg'):
            raise ValueError('input_size=None needs a model with a pretrained_cfg: give (channels, height, width).')
        input_size = model.pretrained_cfg['input_size']
    input_size = tuple(input_size)
    least = least_size(model)
    if min(input_size[1:]) < least:  # padding lets many a network run on next to nothing
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
    """The pixels of an edge below which nothing is left of an image, by the `feature_info` of timm's networks."""
    levels = getattr(model, 'feature_info', None) or ()
    return max((level.get('reduction', 1) for level in levels if isinstance(level, dict)), default=1)


def create(name: str) -> nn.Module:
    if name.startswith(TORCHVISION):
        return torchvision.models.get_model(name.removeprefix(TORCHVISION), weights=None)
    return timm.create_model(name)


def count_row(name: str, input_size: Optional[Tuple[int, int, int]] = None, fused: bool = True) -> Dict[str, Any]:
    """Multiply-adds of one network in one form, its parameters in both; torchvision's networks at 224 px by default."""
    model = create(name).eval()
    if input_size is None:
        input_size = (3, 224, 224) if name.startswith(TORCHVISION) else model.pretrained_cfg['input_size']
    counts = None if fused else count_flops(model, input_size)
    params_train = sum(p.numel() for p in model.parameters())
    model = fuse_fbn(reparameterize_model(model, inplace=True), torch.rand(2, *input_size), inplace=True)
    params_fused = sum(p.numel() for p in model.parameters())
    counts = counts or count_flops(model, input_size)
    return {
        'model': name, 'input': 'x'.join(map(str, input_size)), 'form': 'fused' if fused else 'train',
        'conv': counts['conv'], 'linear': counts['linear'], 'conv_linear': counts['conv'] + counts['linear'],
        'other': counts['other'],
        'params_train': params_train, 'params_fused': params_fused,
        'uncounted': ' '.join(f'{op}:{times}' for op, times in sorted(counts['uncounted'].items())),
    }


def flops(
        names: Sequence[str] = (), input_size: Optional[Tuple[int, int, int]] = None, fused: bool = True,
        as_csv: bool = False) -> None:
    """Print a table, or CSV, of networks' multiply-adds and parameters; without `names`, of all of ours.

    Raises:
        ValueError: An unknown name, or an `input_size` that does not fit.
    """
    names = find_names(names) if names else timm.list_models(module=MODULES)
    rows = []
    for name in names:
        try:
            rows.append(count_row(name, input_size, fused))
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from error
    if as_csv:
        writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
        return
    heads = dict(model='model', input='input', conv='convolution', linear='linear', conv_linear='both', other='other',
                 params_train='train form', params_fused='fused')
    cells = [[f'{row[key]:,}' if isinstance(row[key], int) else row[key] for key in heads] for row in rows]
    widths = [max(map(len, column)) for column in zip(heads.values(), *cells)]
    left = sum(widths[:2]) + 2
    title = 'multiply-adds, ' + ('fused' if fused else 'train form')
    print(f"{'':{left}}  {title:<{sum(widths[2:6]) + 6}}  parameters")
    for line in ([*heads.values()], *cells):
        padded = [
            f'{cell:<{width}}' if i < 2 else f'{cell:>{width}}' for i, (cell, width) in enumerate(zip(line, widths))]
        print('  '.join(padded))
    print("\nOne multiply-add is one FLOP; `both` is the paper's. Not counted, as fvcore does not know them (calls):")
    alike = {}
    for row in rows:
        alike.setdefault(row['uncounted'], []).append(row['model'])
    for uncounted, models in alike.items():
        print(f"{', '.join(models)}: {uncounted or 'none'}")
