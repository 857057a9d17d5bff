"""Fuse networks of many packages, and compare their outputs before and after.

    python -m scripts.bench.fuse_networks

The weights and the statistics of all BatchNorms are random. Everything is float64, and outputs are compared on another
input than the one that `fuse_fbn` has watched. A network is wrong if an output differs by more than 100 times the
effect of rounding: float64's epsilon or, if the network amplifies it, the effect of changing all weights by epsilon. A
network is undecided if there is nothing to compare, e.g. when a detector finds nothing, or if rounding already changes
what it finds.

In addition to what the package requires, this uses `transformers`, `segmentation_models_pytorch`, `ultralytics`,
`monai` and `efficientnet_pytorch`, if they are installed. Rows are added to results/fuse_networks.csv; the same command
continues where it was stopped.
"""
import importlib.metadata
import logging
import math
import signal
import sys
import time
from collections import Counter
from copy import deepcopy
from datetime import date
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves, tree_map

from scripts.bench.networks import networks
from scripts.report import RESULTS, command_line, markdown, rows_so_far, write_rows
from timm_finet import fuse_fbn, rewrite
from timm_finet.fusion import compare, trial
from timm_finet.fusion.layers import layers_and_norms

FILE = RESULTS / 'fuse_networks.csv'
EPS = torch.finfo(torch.float64).eps
SECONDS = 240  # for one network
RESULT_NAMES = {'whole': 'fused whole', 'left': 'left, with reasons', 'refused': 'refused', 'undecided': 'undecided',
                'wrong': 'wrong'}


def randomise(model):
    for norm in layers_and_norms(model)[1].values():
        if getattr(norm, 'running_mean', None) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            if norm.weight is not None:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_()


def perturbed(model):
    model = deepcopy(model)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.mul_(1 + EPS * torch.randn_like(parameter))
    return model


def again(example):
    """Another input of the same kind."""
    return tree_map(lambda x: torch.rand_like(x) if torch.is_tensor(x) and x.is_floating_point() else x, example)


def outputs(model, example):
    torch.manual_seed(1)
    return trial.run(model, trial.example_for(model, example))


@torch.no_grad()
def measure(build):
    """Fuse a network and return what happened to it; None if it has no BatchNorm."""
    torch.manual_seed(0)
    model, *examples = build()
    if model is None:
        return None
    model = model.double().eval()
    norms = len(layers_and_norms(model)[1])
    if not norms:
        return None
    randomise(model)
    for example in examples:  # the smaller one first
        try:
            outputs(model, example)
            break
        except Exception:
            if example is examples[-1]:
                raise
    reasons = Counter()
    try:
        with patch.object(rewrite, '_say_what_stays', lambda model, plan: reasons.update(plan.stays.values())):
            fused = fuse_fbn(model, example)
    except RuntimeError as error:
        return dict(norms=norms, left=norms, reasons=str(error), difference='', rounding='', result='refused')
    left = len(layers_and_norms(fused)[1])
    example = again(example)
    expected = outputs(model, example)
    difference = compare.distance(expected, outputs(fused, example))
    rounding = EPS
    if difference > 100 * EPS:
        rounding = max(EPS, compare.distance(expected, outputs(perturbed(model), example)))
    result = 'left' if left else 'whole'
    if math.isinf(rounding) or not any(t.numel() for t in tree_leaves(expected) if isinstance(t, torch.Tensor)):
        result = 'undecided'
    elif difference > 100 * rounding:
        result = 'wrong'
    return dict(
        norms=norms, left=left, reasons='; '.join(f'{count} {reason}' for reason, count in reasons.most_common()),
        difference=f'{difference:.1e}', rounding=f'{rounding:.1e}', result=result)


def stop(*_):
    raise TimeoutError(f'{SECONDS} s')


def table(rows):
    cells = []
    for package in dict.fromkeys(row['package'] for row in rows):
        mine = [row for row in rows if row['package'] == package]
        results, reasons = Counter(row['result'] for row in mine), Counter()
        for part in '; '.join(row['reasons'] for row in mine if row['result'] == 'left').split('; '):
            count, _, reason = part.partition(' ')
            reasons[reason] += int(count or 0)
        norms, left = (sum(int(row[column]) for row in mine) for column in ('norms', 'left'))
        why = '; '.join(f'{count} {reason}' for reason, count in reasons.most_common() if reason)
        cells.append([
            package, len(mine), *(results[result] for result in RESULT_NAMES), f'{norms - left} of {norms}', why])
    head = ['package', 'networks tried', *RESULT_NAMES.values(), 'BatchNorms folded', 'why the others stay']
    return markdown(head, cells)


def main():
    command_line(__doc__).parse_args()
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGALRM, stop)
    rows = rows_so_far(FILE)
    done = {(row['package'], row['network']) for row in rows}
    for package, name, build in networks():
        if (package, name) in done:
            continue
        signal.alarm(SECONDS)
        start = time.perf_counter()
        try:
            row = measure(build)
        except Exception as error:
            print(f'{package} {name}: not tried, {error!r}'[:300], file=sys.stderr, flush=True)
            continue
        finally:
            signal.alarm(0)
        if row is not None:
            versions = {each: importlib.metadata.version(each) for each in ('torch', 'timm', package)}
            rows.append(dict(
                package=package, network=name, **row, seconds=f'{time.perf_counter() - start:.0f}',
                versions=' '.join(f'{each} {number}' for each, number in versions.items()), date=date.today()))
            write_rows(FILE, rows)


if __name__ == '__main__':
    main()
