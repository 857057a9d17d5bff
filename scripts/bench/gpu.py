"""All that a GPU has to show of the moment form, in one command for whoever has a card for ten minutes.

    python -m scripts.bench.gpu

First tests/test_gpu.py, with torch's passes and with Triton's. Then each of Triton's passes over the layers of
finet_large: milliseconds of one of many in a CUDA graph, and bytes a second of the fewest bytes that the pass needs.
Then training steps of whole networks against torch's own modules, in turns, eager and as a CUDA graph: milliseconds,
memory, kernels launched.

Each line is written to results/gpu.csv as soon as it is known, with the card's name; the command, started again, goes
on with what is missing.
"""
import os
import re
import subprocess
import sys
from datetime import date
from statistics import median

import timm
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scripts.bench.bench_training import build, step
from scripts.bench.kernels import FEWEST, FINET_LARGE
from scripts.report import RESULTS, ROOT, command_line, device_name, markdown, merge_rows, rows_so_far
from scripts.timing import in_turns, peak_bytes, seconds
from timm_finet import convert_fbn
from timm_finet.cuda_graphs import captured
from timm_finet.ops import moment_form

FILE = RESULTS / 'gpu.csv'
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'  # the latter in a test, of tiny sizes
KEY = ['card', 'kind', 'name', 'size', 'batch', 'groups', 'form', 'run']
COLUMNS = [*KEY, 'ms', 'gb_per_s', 'peak_mb', 'kernels', 'result', 'torch', 'date']
BATCHES = ((224, 256), (32, 512), (32, 128))  # px, images
NETWORKS = [  # and G, and their batches
    ('finet_large', 4, BATCHES), ('finet_large', 2, BATCHES), ('finet_large', 8, BATCHES), ('finet_small', 4, BATCHES),
    ('resnet50', 2, BATCHES[:1]), ('mobilenetv3_large_100', 2, BATCHES[:1])]
FORMS = ('bn', 'torch', 'triton')
LAYERS, IMAGES, GROUPS = FINET_LARGE, 256, 4
ROUNDS, COPIES, TIMES = 10, 8, 24  # a pass is timed TIMES times in a row, on COPIES layers that fill no cache


def complete(row):
    return dict.fromkeys(COLUMNS, '') | dict(
        card=device_name(DEVICE), torch=torch.__version__, date=date.today()) | row


def is_missing(**key):
    wanted = [str(complete(key)[column]) for column in KEY]
    return wanted not in [[row[column] for column in KEY] for row in rows_so_far(FILE)]


def add(**row):
    print(' '.join(f'{column}={value}' for column, value in row.items()), flush=True)
    merge_rows(FILE, [complete(row)], KEY)


def first_line(error):
    return f'{type(error).__name__}: {error}'.splitlines()[0][:200]


def run_tests():
    for form, switch in (('torch', '0'), ('triton', '1')):
        key = dict(kind='tests', name='tests/test_gpu.py', form=form)
        if is_missing(**key):
            done = subprocess.run(
                [sys.executable, '-m', 'pytest', '-n', '4', 'tests/test_gpu.py'], cwd=ROOT, text=True,
                env={**os.environ, 'TIMM_FINET_TRITON': switch}, capture_output=True)
            print(done.stdout[-3000:])
            lines = [line for line in done.stdout.splitlines() if re.search('passed|failed|skipped', line)]
            add(**key, result=lines[-1] if lines else f'status {done.returncode}')


def passes_of(channels, out, side):
    """A layer's passes as functions, by their kernels' names."""
    from timm_finet.ops.triton_passes import TritonAlgebra as algebra, TritonPasses as passes
    x, grad_y = (
        torch.randn(IMAGES, width, side, side, device=DEVICE).to(torch.bfloat16, memory_format=torch.channels_last)
        for width in (channels, out))
    weight = torch.randn(out, channels, 1, 1, device=DEVICE) / channels ** 0.5
    gamma, beta = torch.ones(GROUPS * out, device=DEVICE), torch.zeros(GROUPS * out, device=DEVICE)
    count = x.numel() // channels
    shift, shifted_mean, cov = passes(x).moments(GROUPS, torch.float32)
    folded, bias, _, _, inv_std, w_cov = algebra.fold(
        weight, gamma, beta, shift, shifted_mean, cov, 1e-5, x.dtype, None, count)
    products, sums = passes(x, shift, grad_y).weight_gradient(out, torch.float32)
    grad_var = algebra.unfold(weight, gamma, shift, shifted_mean, inv_std, w_cov, products, sums)[3]
    a, b = algebra.input_terms(weight, folded, shift, shifted_mean, grad_var, sums, count)
    return {
        'moments_kernel': lambda: passes(x).moments(GROUPS, torch.float32),
        'convolve_kernel': lambda: passes(x, shift).convolve(folded, bias, True),
        'weight_gradient_kernel': lambda: passes(x, shift, grad_y).weight_gradient(out, torch.float32),
        'input_gradient_kernel': lambda: passes(x, shift, grad_y).input_gradient(folded, a, b),
    }


def timed(runs):
    """Median milliseconds of the functions, each of which does the same to tensors of its own; on a GPU as a graph."""
    def run():
        for i in range(TIMES):
            runs[i % len(runs)]()
    run()
    if DEVICE == 'cuda':
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    return 1e3 * median(seconds(run, DEVICE) for _ in range(ROUNDS)) / TIMES


def bench_passes():
    for (channels, out), (_, positions) in LAYERS.items():
        side, copies = round(positions ** 0.5), []
        for kernel, (times_x, times_y) in FEWEST.items():
            key = dict(kind='pass', name=f'{kernel} {channels} to {out}', size=side, batch=IMAGES, groups=GROUPS,
                       form='triton')
            if not is_missing(**key):
                continue
            try:
                copies = copies or [passes_of(channels, out, side) for _ in range(COPIES)]
                ms = timed([passes[kernel] for passes in copies])
                fewest = 2 * (times_x * channels + times_y * out) * positions * IMAGES
                add(**key, ms=round(ms, 4), gb_per_s=round(fewest / ms / 1e6, 1))
            except Exception as error:  # the other lines are worth having
                add(**key, result=first_line(error))


def network(name, groups, form, size):
    """A network of torch's own modules, or of FBN, in train mode and channels_last."""
    if name.startswith('mobilenet'):
        model = timm.create_model(name)
        model = model if form == 'bn' else convert_fbn(model, groups)
        return model.to(DEVICE, memory_format=torch.channels_last).train()
    return build(name, groups, 'bn' if form == 'bn' else 'moment', size, device=DEVICE)


def count_kernels(run):
    """Kernels of one run on the GPU."""
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA and not event.name.startswith('Mem') for event in prof.events())


def prepare_step(name, groups, form, size, batch, how):
    """A function that takes a training step under bfloat16 autocast; it has taken one."""
    torch.manual_seed(0)
    model = network(name, groups, form, size)
    x = torch.randn(batch, 3, size, size, device=DEVICE).to(memory_format=torch.channels_last)
    target = torch.randint(10, (batch,), device=DEVICE)
    triton = form == 'triton' and DEVICE == 'cuda'
    moment_form.TRITON = triton
    if how == 'graph' and DEVICE == 'cuda':
        captured(model, x, torch.bfloat16)

    def run():
        moment_form.TRITON = triton
        step(model, x, target, 'bfloat16')
    run()
    return run


def bench_steps():
    """Milliseconds, memory and kernels of the forms' steps, which take turns."""
    for name, groups, batches in NETWORKS:
        for size, batch in batches:
            for how in ('graph', 'eager'):
                key = dict(kind='step', name=name, size=size, batch=batch, groups=groups, run=how)
                steps = {}
                for form in [form for form in FORMS if is_missing(**key, form=form)]:
                    try:
                        steps[form] = prepare_step(name, groups, form, size, batch, how)
                    except Exception as error:  # out of memory, or what the next card will not have
                        add(**key, form=form, result=first_line(error))
                for form, times in in_turns(steps, ROUNDS, device=DEVICE).items():
                    found = dict(ms=round(1e3 * median(times), 3))
                    if DEVICE == 'cuda':
                        found['kernels'] = count_kernels(steps[form])
                    if how == 'eager':  # a graph holds its memory from its capture on
                        found['peak_mb'] = round(peak_bytes(steps[form], DEVICE) / 2 ** 20, 1)
                    add(**key, form=form, **found)
                steps.clear()
                torch.cuda.empty_cache()  # nothing where there is no GPU


def table_of_steps(rows):
    """Of the last card in the file."""
    steps = {}
    for row in rows:
        if row['card'] == rows[-1]['card'] and row['kind'] == 'step' and row['ms']:
            key = row['name'], row['groups'], row['size'], row['batch']
            steps.setdefault(key, {})[row['run'], row['form']] = row

    def ratio(of, how, form, column='ms'):
        found, bn = of.get((how, form)), of.get((how, 'bn'))
        return f'{float(found[column]) / float(bn[column]):.2f}' if found and bn else '-'
    return markdown(
        ['training step', 'G', 'BN, ms: graph', 'eager', 'Triton: graph', 'eager', "torch's: graph", 'eager', 'memory'],
        [[f'{name}, {size} px, batch {batch}', groups,
          *(f"{float(of[how, 'bn']['ms']):.1f}" if (how, 'bn') in of else '-' for how in ('graph', 'eager')),
          *(ratio(of, how, form) for form in ('triton', 'torch') for how in ('graph', 'eager')),
          ratio(of, 'eager', 'triton', 'peak_mb')] for (name, groups, size, batch), of in steps.items()])


def table_of_passes(rows):
    """Of the last card in the file."""
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
    parser.parse_args()
    if not torch.cuda.is_available():
        parser.error('torch finds no GPU here')
    run_tests()
    bench_passes()
    bench_steps()


if __name__ == '__main__':
    main()
