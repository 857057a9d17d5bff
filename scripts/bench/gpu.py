"""Test and time the moment form on a GPU, in one command that needs the GPU for ten minutes.

    python -m scripts.bench.gpu --minutes 10

It runs, in this order:
- tests/test_gpu.py, with torch's passes and with Triton's.
- Each pass over the layers of finet_large, by torch and by Triton: milliseconds of one of many passes in a CUDA graph,
  and bytes per second for the fewest bytes that the pass needs, beside the GPU's own copy. torch's passes begin with a
  centred copy, which two of them share in a layer.
- Training steps of whole networks and of the same networks with torch's own modules, in turns: eager, as a CUDA graph,
  and compiled. It records milliseconds, memory and the number of kernels launched.

Each row is written to results/gpu.csv as soon as it is known, with the GPU's name and the commit. The same command
continues with the rows that the commit lacks. `--device cpu --tiny` rehearses everything without a GPU.
"""
import os
import re
import subprocess
import sys
import time
from datetime import date
from itertools import product
from pathlib import Path
from statistics import median

import timm
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scripts.bench.bench_training import build, step
from scripts.bench.kernels import FEWEST, FINET_LARGE
from scripts.report import RESULTS, ROOT, command_line, device_name, markdown, merge_rows, rows_so_far
from scripts.runs import commit
from scripts.timing import in_turns, peak_bytes, seconds
from timm_finet import convert_fbn
from timm_finet.cuda_graphs import captured
from timm_finet.ops import moment_form
from timm_finet.ops.moment_form import TorchAlgebra
from timm_finet.ops.torch_passes import TorchPasses

KEY = ['card', 'commit', 'kind', 'name', 'size', 'batch', 'groups', 'form', 'run']
COLUMNS = [*KEY, 'ms', 'gb_per_s', 'peak_mb', 'kernels', 'result', 'torch', 'date']
BATCHES = ((224, 256), (32, 512), (32, 128))  # px, images
RUNS = ('graph', 'eager')
FULL = dict(images=256, rounds=10, copies=8, times=24, steps=[  # network, G, batches, how they run
    ('finet_large', 4, BATCHES, RUNS), ('finet_large', 4, BATCHES[:1], ('compiled',)),
    ('finet_large', 2, BATCHES, RUNS), ('finet_large', 8, BATCHES, RUNS), ('finet_small', 4, BATCHES, RUNS),
    ('resnet50', 2, BATCHES[:1], RUNS), ('mobilenetv3_large_100', 2, BATCHES[:1], RUNS)])
TINY = dict(images=1, rounds=1, copies=1, times=1, steps=[
    ('finet_small', 4, ((32, 8),), RUNS), ('mobilenetv3_small_050', 2, ((32, 8),), (*RUNS, 'compiled'))])
FORMS = ('bn', 'torch', 'triton')


class Results:
    """The results file, written row by row."""

    def __init__(self, args):
        self.file, self.end = args.file, time.monotonic() + 60 * args.minutes
        self.same = dict(card=device_name(args.device), commit=args.commit)

    def complete(self, row):
        return dict.fromkeys(COLUMNS, '') | row | self.same | dict(torch=torch.__version__, date=date.today())

    def missing(self, **key):
        """Whether the file lacks a row, and there is time to measure it."""
        wanted = [str(self.complete(key)[column]) for column in KEY]
        known = [[row[column] for column in KEY] for row in rows_so_far(self.file)]
        return wanted not in known and time.monotonic() < self.end

    def add(self, **row):
        print(' '.join(f'{key}={value}' for key, value in row.items() if value != ''), flush=True)
        merge_rows(self.file, [self.complete(row)], KEY)


def first_line(error):
    return f'{type(error).__name__}: {error}'.splitlines()[0][:200]


def run_tests(results):
    for form, switch in (('torch', '0'), ('triton', '1')):
        key = dict(kind='tests', name='tests/test_gpu.py', form=form)
        if results.missing(**key):
            done = subprocess.run(
                [sys.executable, '-m', 'pytest', '-n', '4', 'tests/test_gpu.py'], cwd=ROOT, text=True,
                env={**os.environ, 'TIMM_FINET_TRITON': switch}, capture_output=True)
            if done.returncode:
                print(done.stdout[-3000:])
            lines = [line for line in done.stdout.splitlines() if re.search('passed|failed|skipped', line)]
            results.add(**key, result=lines[-1] if lines else f'status {done.returncode}')


def passes_of(form, channels, out, groups, x, grad_y):
    """A layer's passes and the algebra between them, as functions by name; passes have their Triton kernel's name."""
    if form == 'triton':
        from timm_finet.ops.triton_passes import TritonAlgebra, TritonPasses
        passes, algebra = TritonPasses, TritonAlgebra
    else:
        passes, algebra = TorchPasses, TorchAlgebra
    weight = torch.randn(out, channels, 1, 1, device=x.device) / channels ** 0.5
    gamma, beta = torch.ones(groups * out, device=x.device), torch.zeros(groups * out, device=x.device)
    count = x.numel() // channels
    forward = passes(x)
    shift, shifted_mean, cov = forward.moments(groups, torch.float32)
    folded, bias, _, _, inv_std, w_cov = algebra.fold(
        weight, gamma, beta, shift, shifted_mean, cov, 1e-5, x.dtype, None, count)
    sums = passes(x, shift, grad_y).weight_gradient(out, torch.float32)
    grad_var, grad_bias = algebra.unfold(weight, gamma, shift, shifted_mean, inv_std, w_cov, sums)[3:]
    a, b = algebra.input_terms(weight, folded, shift, shifted_mean, grad_var, grad_bias, count)
    return {
        'moments_kernel': lambda: passes(x).moments(groups, torch.float32),
        'fold': lambda: algebra.fold(weight, gamma, beta, shift, shifted_mean, cov, 1e-5, x.dtype, None, count),
        'convolve_kernel': lambda: passes(x, shift).convolve(folded, bias, True),
        'weight_gradient_kernel': lambda: algebra.unfold(
            weight, gamma, shift, shifted_mean, inv_std, w_cov, passes(x, shift, grad_y).weight_gradient(
                out, torch.float32)),
        'input_terms': lambda: algebra.input_terms(weight, folded, shift, shifted_mean, grad_var, grad_bias, count),
        'input_gradient_kernel': lambda: passes(x, shift, grad_y).input_gradient(folded, a, b),
    }


def timed(runs, device, rounds, times):
    """Median milliseconds of one of the functions, which do the same to different tensors; on a GPU, in a graph."""
    def run():
        for i in range(times):
            runs[i % len(runs)]()
    for first in runs:
        first()
    if device == 'cuda':
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return 1e3 * median(seconds(run, device) for _ in range(rounds)) / times


def bench_copy(results, args, sizes):
    key = dict(kind='copy', name='clone')
    if results.missing(**key):
        x = torch.zeros(2 ** 28 if args.device == 'cuda' else 2 ** 16, device=args.device)
        ms = timed([x.clone], args.device, sizes['rounds'], sizes['times'])
        results.add(**key, ms=round(ms, 4), gb_per_s=round(2 * x.numel() * x.element_size() / ms / 1e6, 1))


def bench_passes(results, args, sizes, groups=4):
    shapes = FINET_LARGE if not args.tiny else {(24, 32): (1, 64)}
    for (channels, out), (_, positions) in shapes.items():
        side = round(positions ** 0.5)
        for form in FORMS[1:]:
            if form == 'triton' and args.device == 'cpu' and not moment_form.INTERPRETED:
                continue
            key = dict(kind='pass', size=side, batch=sizes['images'], groups=groups, form=form)
            names = [name for name in (*FEWEST, 'fold', 'input_terms')
                     if results.missing(**key, name=f'{name} {channels} to {out}')]
            if not names:
                continue
            bytes_of_x = 2 * channels * positions * sizes['images']
            copies = []  # together more than any cache holds
            for name in names:
                try:
                    while len(copies) < min(sizes['copies'], 2 ** 28 // bytes_of_x + 1):
                        x, grad_y = (torch.randn(
                            sizes['images'], width, side, side, device=args.device).to(torch.bfloat16).contiguous(
                            memory_format=torch.channels_last) for width in (channels, out))
                        copies.append(passes_of(form, channels, out, groups, x, grad_y))
                    ms = timed([runs[name] for runs in copies], args.device, sizes['rounds'], sizes['times'])
                    times_x, times_y = FEWEST.get(name, (0, 0))
                    fewest = 2 * (times_x * channels + times_y * out) * positions * sizes['images']
                    found = dict(ms=round(ms, 4), gb_per_s=round(fewest / ms / 1e6, 1) if fewest else '')
                except Exception as error:  # go on with the other rows
                    found = dict(result=first_line(error))
                results.add(**key, name=f'{name} {channels} to {out}', **found)


def network(name, groups, form, size, device):
    """A network of torch's own modules, or of FBN, in train mode and channels_last."""
    if name.startswith('mobilenet'):
        model = timm.create_model(name)
        model = model if form == 'bn' else convert_fbn(model, groups)
        return model.to(device, memory_format=torch.channels_last).train()
    return build(name, groups, 'bn' if form == 'bn' else 'moment', size, device=device)


def count_kernels(run):
    """Number of kernels that one run launches on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA and not event.name.startswith('Mem') for event in prof.events())


def prepare_step(name, groups, form, size, batch, how, args):
    """Return a function that takes a training step under bfloat16 autocast, after it has taken one."""
    torch.manual_seed(0)
    model = network(name, groups, form, size, args.device)
    x = torch.randn(batch, 3, size, size, device=args.device).to(memory_format=torch.channels_last)
    target = torch.randint(10, (batch,), device=args.device)
    triton = form == 'triton' and args.device == 'cuda'
    moment_form.TRITON = triton
    if how == 'compiled':
        model.compile(backend='eager' if args.tiny else 'inductor')
    elif how == 'graph' and args.device == 'cuda':
        captured(model, x, torch.bfloat16)

    def run():
        moment_form.TRITON = triton
        step(model, x, target, 'bfloat16')
    run()
    return run


def bench_step(steps, how, args, rounds):
    """Milliseconds, memory and kernels of the forms' steps, which are timed in turns."""
    for form, times in in_turns(steps, rounds, device=args.device).items():
        run, found = steps[form], dict(ms=round(1e3 * median(times), 3))
        if how != 'graph':  # it holds its memory from its capture on
            found['peak_mb'] = round(peak_bytes(run, args.device) / 2 ** 20, 1)
        if args.device == 'cuda':
            found['kernels'] = count_kernels(run)
        yield form, found


def bench_steps(results, args, sizes):
    for name, groups, batches, runs in sizes['steps']:
        for (size, batch), how in product(batches, runs):
            key = dict(kind='step', name=name, size=size, batch=batch, groups=groups, run=how)
            steps = {}
            for form in [form for form in FORMS if results.missing(**key, form=form)]:
                try:
                    steps[form] = prepare_step(name, groups, form, size, batch, how, args)
                except Exception as error:  # out of memory, or an error that another GPU may not have
                    results.add(**key, form=form, result=first_line(error))
            for form, found in bench_step(steps, how, args, sizes['rounds']):
                results.add(**key, form=form, **found)
            steps.clear()
            torch.compiler.reset()
            if args.device == 'cuda':
                torch.cuda.empty_cache()


def table_of_steps(rows):
    """Training steps on the last GPU in the file; a ratio is between rows of the last commit that has both."""
    steps = {}
    for row in rows:
        if row['card'] == rows[-1]['card'] and row['kind'] == 'step' and row['ms']:
            step = steps.setdefault((row['name'], row['groups'], row['size'], row['batch']), {})
            step.setdefault(row['run'], {}).setdefault(row['commit'], {})[row['form']] = row

    def ratio(of, how, form, column='ms'):
        both = [lines for lines in of.get(how, {}).values() if form in lines and 'bn' in lines]
        return f"{float(both[-1][form][column]) / float(both[-1]['bn'][column]):.2f}" if both else '-'

    def ms(of, how):
        both = [lines for lines in of.get(how, {}).values() if 'triton' in lines and 'bn' in lines]
        return f"{float(both[-1]['bn']['ms']):.1f}" if both else '-'
    runs = ('graph', 'eager')
    return markdown(
        ['training step', 'G', 'BN, ms: graph', 'eager', 'Triton: graph', 'eager', 'memory', "torch's: graph", 'eager'],
        [[f'{name}, {size} px, batch {batch}', groups, *(ms(of, how) for how in runs),
          *(ratio(of, how, 'triton') for how in runs), ratio(of, 'eager', 'triton', 'peak_mb'),
          *(ratio(of, how, 'torch') for how in runs)] for (name, groups, size, batch), of in steps.items()])


def table_of_passes(rows):
    """The last row of each pass on the last GPU in the file."""
    passes = {}
    for row in rows:
        if row['card'] == rows[-1]['card'] and (row['kind'], row['form']) == ('pass', 'triton') and row['gb_per_s']:
            name, layer = row['name'].split(' ', 1)
            passes.setdefault(f"{layer}, {row['size']} px", {})[name] = row
    return markdown(['layer', *FEWEST], [
        [layer, *(f"{1e3 * float(of[name]['ms']):.0f} us, {float(of[name]['gb_per_s']) / 1e3:.1f}" for name in FEWEST)]
        for layer, of in passes.items()])


def main():
    parser = command_line(__doc__)
    parser.add_argument('--minutes', type=float, default=10, help='start no measurement after these minutes')
    parser.add_argument('--device', default='cuda', choices=('cuda', 'cpu'))
    parser.add_argument('--tiny', action='store_true', help='small sizes, for a rehearsal')
    parser.add_argument('--commit', default=commit(), help='to record, for a copy of the repository without history')
    parser.add_argument('--file', type=Path, default=RESULTS / 'gpu.csv')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('torch finds no GPU here: rehearse with --device cpu --tiny --file FILE')
    results, sizes = Results(args), TINY if args.tiny else FULL
    run_tests(results)
    bench_copy(results, args, sizes)
    bench_passes(results, args, sizes)
    bench_steps(results, args, sizes)


if __name__ == '__main__':
    main()
