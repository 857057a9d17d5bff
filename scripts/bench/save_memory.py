"""Plain BatchNorm in less memory: `convert_fbn(model, 1, save_memory=True)` and torch's modules in a training step.

    OMP_NUM_THREADS=1 python -m scripts.bench.save_memory

Both are compared with `torch.utils.checkpoint` over the same convolutions and norms. A step takes 8 images of 160 px in
float32; peaks of memory are counted, and times are taken in turns. This writes results/save_memory.csv.
"""
from copy import deepcopy
from statistics import median

import timm
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from scripts.bench.bench_training import step, torch_conv
from scripts.report import RESULTS, command_line, facts, markdown, write_rows
from scripts.timing import in_turns, peak_bytes
from timm_finet import FBNConv2d, convert_fbn

MODELS = ('resnet50', 'resnet18', 'regnety_008', 'mobilenetv3_large_100', 'mobilenetv2_100', 'efficientnet_b0')
FORMS = {'bn': "torch's modules", 'checkpoint': 'torch.utils.checkpoint', 'save_memory': 'save_memory=True'}
SIZE, BATCH, ROUNDS, SEED = 160, 8, 5, 0


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
                conv = torch_conv(layer)
                conv.weight = layer.weight
                model.set_submodule(path, Checkpointed(conv, deepcopy(layer.bn)))
    return model


def bench(name):
    torch.manual_seed(SEED)
    x = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    target = torch.randint(10, (BATCH,))
    runs = {form: lambda model=build(name, form): step(model, x, target, 'float32') for form in FORMS}
    times = {form: median(values) for form, values in in_turns(runs, ROUNDS).items()}
    peaks = {form: peak_bytes(run) for form, run in runs.items()}
    for form in FORMS:
        yield dict(
            model=name, form=form, size=SIZE, batch=BATCH, dtype='float32', ms=round(1e3 * times[form], 1),
            time_vs_bn=round(times[form] / times['bn'], 3), peak_mb=round(peaks[form] / 2 ** 20, 1),
            memory_vs_bn=round(peaks[form] / peaks['bn'], 3), rounds=ROUNDS, seed=SEED,
            threads=torch.get_num_threads(), **facts())


def table(rows):
    cells = {}
    for row in rows:
        cells.setdefault(row['model'], [f"`{row['model']}`"])
        if row['form'] != 'bn':
            cells[row['model']] += [f"{float(row['memory_vs_bn']):.2f}", f"{float(row['time_vs_bn']):.2f}"]
    head = ['', *(f'{what}, {FORMS[form]}' for form in ('checkpoint', 'save_memory') for what in ('memory', 'time'))]
    return markdown(head, cells.values())


def main():
    command_line(__doc__).parse_args()
    write_rows(RESULTS / 'save_memory.csv', [row for name in MODELS for row in bench(name)])


if __name__ == '__main__':
    main()
