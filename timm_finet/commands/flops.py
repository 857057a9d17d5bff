"""`timm-finet flops`: print a table of networks' multiply-adds and parameters."""
import csv
import sys
from typing import Any, Dict, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
import torchvision
from timm.utils import reparameterize_model

from ..flops import count_flops
from ..hub.pretrained import MODULES
from ..rewrite import fuse_fbn
from .names import TORCHVISION, find_names

__all__ = ['count_row', 'flops']


def create(name: str) -> nn.Module:
    if name.startswith(TORCHVISION):
        return torchvision.models.get_model(name.removeprefix(TORCHVISION), weights=None)
    return timm.create_model(name)


def count_row(name: str, input_size: Optional[Tuple[int, int, int]] = None, fused: bool = True) -> Dict[str, Any]:
    """Count a network's multiply-adds in one form and its parameters in both.

    `input_size` defaults to the network's own, and to 224 px for networks of torchvision.
    """
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
    """Print networks' multiply-adds and parameters as a table or as CSV; `names` defaults to all of ours.

    Raises:
        ValueError: A name is unknown, or `input_size` does not fit a network.
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
    print_table(rows, 'fused' if fused else 'train form')


def print_table(rows: Sequence[Dict[str, Any]], form: str) -> None:
    heads = dict(model='model', input='input', conv='convolution', linear='linear', conv_linear='both', other='other',
                 params_train='train form', params_fused='fused')
    cells = [[f'{row[key]:,}' if isinstance(row[key], int) else row[key] for key in heads] for row in rows]
    lines = [list(heads.values()), *cells]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"{'':{sum(widths[:2]) + 2}}  {f'multiply-adds, {form}':<{sum(widths[2:6]) + 6}}  parameters")
    for line in lines:
        padded = [cell.ljust(width) for cell, width in zip(line[:2], widths)]
        padded += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:])]
        print('  '.join(padded))
    print("\nOne multiply-add counts as one FLOP; `both` is the figure that the paper gives.")
    print('Not counted, since fvcore does not know these operators (with numbers of calls):')
    alike = {}
    for row in rows:
        alike.setdefault(row['uncounted'], []).append(row['model'])
    for uncounted, models in alike.items():
        print(f"{', '.join(models)}: {uncounted or 'none'}")
