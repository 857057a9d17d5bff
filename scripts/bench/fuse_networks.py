"""Fuse networks of many packages and compare them with themselves: results/fuse_networks.csv, docs/fusing.md.

    python -m scripts.bench.fuse_networks

Weights are random, and so are the statistics of all BatchNorms; everything is float64 and runs on another input than
the one that `fuse_fbn` has watched. A network is wrong if an output differs by more than 100 times what rounding does
to it: float64's own, or where the network multiplies that, what a change of all weights by so much does. It is
undecided if there is nothing to compare, as a detector finds nothing, or if rounding already changes what it finds.

Besides what the package requires it takes `transformers`, `segmentation_models_pytorch`, `ultralytics`, `monai` and
`efficientnet_pytorch`, each as far as it is installed. It goes on where it was stopped; --table only writes the table.
"""
import argparse
import importlib.metadata
import logging
import math
import signal
import sys
import time
from collections import Counter, defaultdict
from copy import deepcopy
from datetime import date

import torch
from torch.utils._pytree import tree_leaves

from scripts.bench.networks import networks
from scripts.report import RESULTS, markdown, read_rows, write_block, write_rows
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
    if isinstance(example, torch.Tensor):
        return torch.rand_like(example) if example.is_floating_point() else example
    if isinstance(example, dict):
        return {key: again(value) for key, value in example.items()}
    return type(example)(map(again, example)) if isinstance(example, (list, tuple)) else example


def outputs(model, example):
    torch.manual_seed(1)
    return trial.run(model, trial.example_for(model, example))


@torch.no_grad()
def measure(build):
    """What becomes of a network; None if it has no BatchNorm."""
    torch.manual_seed(0)
    model, *examples = build()
    if model is None:
        return None
    model = model.double().eval()
    norms = len(layers_and_norms(model)[1])
    if not norms:
        return None
    randomise(model)
    for example in examples:  # the smaller first
        try:
            outputs(model, example)
            break
        except Exception:
            if example is examples[-1]:
                raise
    reasons = Counter()
    say = rewrite._say_what_stays
    rewrite._say_what_stays = lambda model, plan: reasons.update(plan.stays.values())
    try:
        fused = fuse_fbn(model, example)
    except RuntimeError as error:
        return dict(norms=norms, left=norms, reasons=str(error), result='refused')
    finally:
        rewrite._say_what_stays = say
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


def run(only):
    rows = read_rows(FILE) if FILE.exists() else []
    done = {(row['package'], row['network']) for row in rows}
    signal.signal(signal.SIGALRM, stop)
    for package, name, build in networks():
        if (package, name) in done or only and package not in only:
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
        if row is None:
            continue
        packages = dict.fromkeys(('torch', 'timm', package))
        versions = ' '.join(f'{each} {importlib.metadata.version(each)}' for each in packages)
        rows.append({
            'package': package, 'network': name, 'norms': '', 'left': '', 'reasons': '', 'difference': '',
            'rounding': '', 'result': '', **row, 'seconds': f'{time.perf_counter() - start:.0f}',
            'versions': versions, 'date': date.today().isoformat()})
        write_rows(FILE, rows)
        print(package, name, row, flush=True)


def table():
    packages = defaultdict(Counter)
    reasons = defaultdict(Counter)
    for row in read_rows(FILE):
        packages[row['package']][row['result']] += 1
        packages[row['package']]['norms'] += int(row['norms'])
        packages[row['package']]['gone'] += int(row['norms']) - int(row['left'])
        if row['result'] == 'left':
            for part in row['reasons'].split('; '):
                count, reason = part.split(' ', 1)
                reasons[row['package']][reason] += int(count)
    lines = []
    for package, counts in packages.items():
        tried = sum(counts[result] for result in RESULT_NAMES)
        why = '; '.join(f'{count} {reason}' for reason, count in reasons[package].most_common())
        results = [counts[result] for result in RESULT_NAMES]
        lines.append([package, tried, *results, f"{counts['gone']} of {counts['norms']}", why])
    head = ['package', 'networks tried', *RESULT_NAMES.values(), 'BatchNorms folded', 'those left are']
    write_block('fuse_networks', markdown(head, lines))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--table', action='store_true', help='write the table alone')
    parser.add_argument('--only', nargs='*', help='packages to run')
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    if not args.table:
        run(args.only)
    table()
