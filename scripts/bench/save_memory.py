"""Plain BatchNorm in less memory: `convert_fbn(model, 1, save_memory=True)` beside torch's modules, one training step.

The peer is `torch.utils.checkpoint` over the same convolutions and norms. Peaks are counted, times taken in turns;
results go to results/save_memory.csv, the table to docs/training_cost.md.

    OMP_NUM_THREADS=1 python -m scripts.bench.save_memory
"""
import argparse
from copy import deepcopy
from datetime import date
from statistics import median

import timm
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from scripts.bench.bench_training import peak_bytes, seconds, step
from scripts.report import RESULTS, command, cpu_name, markdown, read_rows, write_block, write_rows
from timm_finet import FBNConv2d, convert_fbn

FILE = RESULTS / 'save_memory.csv'
MODELS = ('resnet50', 'resnet18', 'regnety_008', 'mobilenetv3_large_100', 'mobilenetv2_100', 'efficientnet_b0')
FORMS = {'bn': "torch's modules", 'checkpoint': 'torch.utils.checkpoint', 'save_memory': 'save_memory=True'}


class Checkpointed(nn.Sequential):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)


def build(name, form):
    model = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last).train()
    if form != 'bn':
        model = convert_fbn(model, 1, save_memory=form == 'save_memory')
    if form == 'checkpoint':
        for path, layer in list(model.named_modules()):
            if isinstance(layer, FBNConv2d):
                conv = nn.Conv2d(
                    layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                    layer.dilation, bias=False)
                conv.weight = layer.weight
                model.set_submodule(path, Checkpointed(conv, deepcopy(layer.bn)))
    return model


def bench(name, args):
    torch.manual_seed(0)
    x = torch.randn(args.batch_size, 3, args.size, args.size).to(memory_format=torch.channels_last)
    target = torch.randint(10, (args.batch_size,))
    runs = {form: lambda model=build(name, form): step(model, x, target, args.dtype) for form in FORMS}
    times = {form: [] for form in FORMS}
    for i in range(args.rounds + 1):
        for form, run in runs.items():
            elapsed = seconds(run, 'cpu')
            if i:  # the first round warms up
                times[form].append(elapsed)
    peaks = {form: peak_bytes(run, 'cpu') for form, run in runs.items()}
    for form in FORMS:
        yield dict(
            model=name, form=form, size=args.size, batch=args.batch_size, dtype=args.dtype,
            ms=round(1e3 * median(times[form]), 1), time_vs_bn=round(median(times[form]) / median(times['bn']), 3),
            peak_mb=round(peaks[form] / 2 ** 20, 1), memory_vs_bn=round(peaks[form] / peaks['bn'], 3),
            rounds=args.rounds, seed=0, device=cpu_name(), threads=torch.get_num_threads(), torch=torch.__version__,
            timm=timm.__version__, date=date.today(), command=command())


def table(rows):
    cells = {}
    for row in rows:
        cells.setdefault(row['model'], [f"`{row['model']}`"])
        if row['form'] != 'bn':
            cells[row['model']] += [f"{float(row['memory_vs_bn']):.2f}", f"{float(row['time_vs_bn']):.2f}"]
    head = ['', *(f'{what}, {FORMS[form]}' for form in ('checkpoint', 'save_memory') for what in ('memory', 'time'))]
    return markdown(head, cells.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--size', type=int, default=160)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--dtype', default='float32', choices=('float32', 'bfloat16'))
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    rows = read_rows(FILE) if FILE.exists() else []
    for name in args.models:
        new = list(bench(name, args))
        for row in new:
            print(f"{name:24} {row['form']:12} {row['ms']:8} ms ({row['time_vs_bn']}x) "
                  f"{row['peak_mb']:8} MB ({row['memory_vs_bn']}x)", flush=True)
        rows = [row for row in rows if row['model'] != name] + new
        write_rows(FILE, rows)
    write_block('save_memory', table(rows))


if __name__ == '__main__':
    main()
