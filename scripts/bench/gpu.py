"""All that a GPU has to show of the moment form, in one command for whoever has a card for ten minutes.

    python -m scripts.bench.gpu --minutes 10

First tests/test_gpu.py, with torch's passes and with Triton's. Then each pass over the layers of finet_large, by torch
and by Triton: milliseconds, and bytes a second of the fewest bytes that the pass needs, beside the card's own copy.
torch's passes begin with a centred copy, which in a layer two of them share. Then training steps of whole networks
against torch's own modules, eager, as a CUDA graph and compiled: milliseconds, memory, kernels launched.

Each line is written to results/gpu.csv as soon as it is known, with the card's name; the command, started again, goes
on with what is missing. `--device cpu --tiny` rehearses all of it without a GPU.
"""
import argparse
import csv
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from datetime import date
from pathlib import Path
from statistics import median

import timm
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scripts.bench.bench_training import build, peak_bytes, seconds, step
from scripts.bench.kernels import FEWEST, FINET_LARGE
from scripts.report import RESULTS, ROOT, cpu_name, read_rows
from timm_finet import convert_fbn
from timm_finet.cuda_graphs import captured
from timm_finet.ops import moment_form
from timm_finet.ops.moment_form import TorchAlgebra
from timm_finet.ops.torch_passes import TorchPasses

COLUMNS = ['card', 'kind', 'name', 'size', 'batch', 'groups', 'form', 'run', 'ms', 'gb_per_s', 'peak_mb', 'kernels',
           'result', 'torch', 'date']
KEY = COLUMNS[:8]
NETWORKS = {'finet_large': 4, 'finet_small': 4, 'resnet50': 2, 'mobilenetv3_large_100': 2}  # G
BATCHES = ((224, 256), (32, 512), (32, 128))  # px, images
FORMS = ('bn', 'torch', 'triton')
RUNS = ('graph', 'eager', 'compiled')
FULL = dict(networks=NETWORKS, compiled=list(NETWORKS), batches=BATCHES, images=256, rounds=10)
TINY = dict(
    networks={'finet_small': 4, 'mobilenetv3_small_050': 2}, compiled=['mobilenetv3_small_050'], batches=((32, 8),),
    images=1, rounds=1)


class Results:
    """The results file, a line at a time."""

    def __init__(self, file, card, minutes):
        self.file, self.card, self.end = file, card, time.monotonic() + 60 * minutes
        rows = read_rows(file) if file.exists() else []
        self.known = {tuple(row[column] for column in KEY) for row in rows}

    def missing(self, **key):
        """Whether there is a line to measure, and time for it."""
        row = dict.fromkeys(COLUMNS, '') | key | {'card': self.card}
        return tuple(str(row[column]) for column in KEY) not in self.known and time.monotonic() < self.end

    def add(self, **row):
        row = dict.fromkeys(COLUMNS, '') | row | dict(card=self.card, torch=torch.__version__, date=date.today())
        print(' '.join(f'{key}={value}' for key, value in row.items() if value != ''), flush=True)
        new = not self.file.exists()
        with self.file.open('a', newline='') as lines:
            writer = csv.DictWriter(lines, COLUMNS, lineterminator='\n')
            if new:
                writer.writeheader()
            writer.writerow(row)


def first_line(error):
    return f'{type(error).__name__}: {error}'.splitlines()[0][:200]


def run_tests(results):
    for form, switch in (('torch', '0'), ('triton', '1')):
        key = dict(kind='tests', name='tests/test_gpu.py', form=form)
        if results.missing(**key):
            done = subprocess.run(
                [sys.executable, '-m', 'pytest', '-n', '0', 'tests/test_gpu.py'], cwd=ROOT, text=True,
                env={**os.environ, 'TIMM_FINET_TRITON': switch}, capture_output=True)
            if done.returncode:
                print(done.stdout[-3000:])
            lines = [line for line in done.stdout.splitlines() if re.search('passed|failed|skipped', line)]
            results.add(**key, result=lines[-1] if lines else f'status {done.returncode}')


def passes_of(form, channels, out, groups, x, grad_y):
    """The layer's passes and the algebra between them as functions by name; those of Triton with its kernel's name."""
    if form == 'triton':
        from timm_finet.ops.triton_passes import TritonAlgebra, TritonPasses
        passes, algebra = TritonPasses, TritonAlgebra
    else:
        passes, algebra = TorchPasses, TorchAlgebra
    weight = torch.randn(out, channels, 1, 1, device=x.device) / channels ** 0.5
    gamma, beta = torch.ones(groups * out, device=x.device), torch.zeros(groups * out, device=x.device)
    count = x.numel() // channels
    forward = passes(x)
    shift, rest, cov = forward.moments(groups, torch.float32)
    folded, bias, _, _, inv, w_cov = algebra.fold(weight, gamma, beta, shift, rest, cov, 1e-5, x.dtype, None, count)
    y = forward.convolve(folded, bias, True)
    products, sums = passes(x, shift, grad_y, y).weight_gradient(out, torch.float32)
    grad_var = algebra.unfold(weight, gamma, rest, inv, w_cov, products, sums)[3]
    a, b = algebra.input_terms(weight, folded, shift, rest, grad_var, sums, count)
    return {
        'moments_kernel': lambda: passes(x).moments(groups, torch.float32),
        'fold': lambda: algebra.fold(weight, gamma, beta, shift, rest, cov, 1e-5, x.dtype, None, count),
        'convolve_kernel': lambda: passes(x, shift).convolve(folded, bias, True),
        'weight_gradient_kernel': lambda: passes(x, shift, grad_y, y).weight_gradient(out, torch.float32),
        'unfold': lambda: algebra.unfold(weight, gamma, rest, inv, w_cov, products, sums),
        'input_terms': lambda: algebra.input_terms(weight, folded, shift, rest, grad_var, sums, count),
        'input_gradient_kernel': lambda: passes(x, shift, grad_y, y).input_gradient(folded, a, b),
    }


def timed(run, device, rounds):
    """Median milliseconds, after a run that compiles."""
    run()
    return 1e3 * median(seconds(run, device) for _ in range(rounds))


def bench_copy(results, args, sizes):
    key = dict(kind='copy', name='clone')
    if results.missing(**key):
        x = torch.zeros(2 ** 28 if args.device == 'cuda' else 2 ** 16, device=args.device)
        ms = timed(x.clone, args.device, sizes['rounds'])
        results.add(**key, ms=round(ms, 4), gb_per_s=round(2 * x.numel() * x.element_size() / ms / 1e6, 1))


def bench_passes(results, args, sizes, groups=4):
    shapes = FINET_LARGE if not args.tiny else {(24, 32): (1, 64)}
    for (channels, out), (_, positions) in shapes.items():
        side = round(positions ** 0.5)
        for form in FORMS[1:]:
            if form == 'triton' and args.device == 'cpu' and not moment_form.INTERPRETED:
                continue
            key = dict(kind='pass', size=side, batch=sizes['images'], groups=groups, form=form)
            names = [name for name in (*FEWEST, 'fold', 'unfold', 'input_terms')
                     if results.missing(**key, name=f'{name} {channels} to {out}')]
            if not names:
                continue
            x, grad_y = (torch.randn(
                sizes['images'], width, side, side, device=args.device).to(torch.bfloat16).contiguous(
                memory_format=torch.channels_last) for width in (channels, out))
            runs = None
            for name in names:
                try:
                    runs = runs or passes_of(form, channels, out, groups, x, grad_y)
                    ms = timed(runs[name], args.device, sizes['rounds'])
                    times_x, times_y = FEWEST.get(name, (0, 0))
                    fewest = 2 * (times_x * channels + times_y * out) * positions * sizes['images']
                    found = dict(ms=round(ms, 4), gb_per_s=round(fewest / ms / 1e6, 1) if fewest else '')
                except Exception as error:  # the other lines are worth having
                    found = dict(result=first_line(error))
                results.add(**key, name=f'{name} {channels} to {out}', **found)


def network(name, groups, form, size, device):
    """A network of torch's own modules, or of FBN, in train mode and channels_last."""
    if name.startswith('mobilenet'):
        model = timm.create_model(name)
        model = model if form == 'bn' else convert_fbn(model, groups)
        return model.to(device, memory_format=torch.channels_last).train()
    args = Namespace(channels_last=True, device=device)
    return build(name, groups, 'bn' if form == 'bn' else 'moment', args, size)


def count_kernels(run):
    """Kernels of one run on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA and not event.name.startswith('Mem') for event in prof.events())


def bench_step(name, groups, form, size, batch, how, args, rounds):
    """A training step under bfloat16 autocast."""
    torch.manual_seed(0)
    moment_form.TRITON = form == 'triton' and args.device == 'cuda'
    model = network(name, groups, form, size, args.device)
    x = torch.randn(batch, 3, size, size, device=args.device).to(memory_format=torch.channels_last)
    target = torch.randint(10, (batch,), device=args.device)
    if how == 'compiled':
        model.compile(backend='eager' if args.tiny else 'inductor')
    elif how == 'graph' and args.device == 'cuda':
        captured(model, x, torch.bfloat16)

    def run():
        step(model, x, target, 'bfloat16')
    ms = timed(run, args.device, rounds)
    found = dict(ms=round(ms, 3))
    if how != 'graph':  # a graph holds its memory from its capture on
        found['peak_mb'] = round(peak_bytes(run, args.device) / 2 ** 20, 1)
    if args.device == 'cuda':
        found['kernels'] = count_kernels(run)
    return found


def bench_steps(results, args, sizes):
    for how in RUNS:
        for size, batch in sizes['batches']:
            for name in sizes['compiled' if how == 'compiled' else 'networks']:
                groups = sizes['networks'][name]
                for form in FORMS:
                    key = dict(kind='step', name=name, size=size, batch=batch, groups=groups, form=form, run=how)
                    if not results.missing(**key):
                        continue
                    try:
                        results.add(**key, **bench_step(name, groups, form, size, batch, how, args, sizes['rounds']))
                    except Exception as error:  # out of memory, or what the next card will not have
                        results.add(**key, result=first_line(error))
                    torch.compiler.reset()
                    if args.device == 'cuda':
                        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=10, help='start no measurement after so long')
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--tiny', action='store_true', help='small sizes, for a rehearsal')
    parser.add_argument('--file', type=Path, default=RESULTS / 'gpu.csv')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('torch finds no GPU here: rehearse with --device cpu --tiny --file FILE')
    results = Results(args.file, torch.cuda.get_device_name() if args.device == 'cuda' else cpu_name(), args.minutes)
    sizes = TINY if args.tiny else FULL
    run_tests(results)
    bench_copy(results, args, sizes)
    bench_passes(results, args, sizes)
    bench_steps(results, args, sizes)


if __name__ == '__main__':
    main()
