"""Rounding errors of FBN's statistics: the form that is taken beside nn.BatchNorm2d on the same inputs, both against float64.

    python scripts/numerics.py

For each input the largest relative error of the batch variance, and the root mean square error of the output in units of
the output's deviation; `layers` takes the inputs that each FBN layer of the embedded network sees. Writes results/numerics.csv.
"""
import shlex
import sys
from copy import deepcopy
from datetime import date

import timm
import torch

from bench_training import cpu_name
from report import RESULTS, write_rows
from timm_finet import FBNConv2d
from timm_finet.data import shipped_pictures
from timm_finet.demo import MODEL

FILE = RESULTS / 'numerics.csv'
SEED = 0


def inputs():
    """Names, a layer and its float32 input."""
    layer = FBNConv2d(64, 64, fbn_groups=4)
    noise = torch.randn(32, 64, 16, 16)
    for ratio in (0, 1, 10, 100, 1000, 10000):
        yield f'mean/deviation {ratio}', layer, noise + ratio * torch.randn(64).sign()[:, None, None]
    yield 'half of the channels constant', layer, torch.where(torch.arange(64)[:, None, None] % 2 == 0, 3., noise)
    yield 'first picture constant', layer, torch.cat((torch.full((1, 64, 16, 16), 5.), noise[1:]))
    yield 'up to 60000 (float16 range)', layer, noise.clamp(-4, 4) * 15000
    yield 'down to 1e-4', layer, noise * 1e-4
    yield 'two positions', layer, torch.randn(2, 64, 1, 1)
    model = timm.create_model(MODEL, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    seen, handles = [], []
    for name, module in model.named_modules():
        if isinstance(module, FBNConv2d):
            handles.append(module.register_forward_pre_hook(
                lambda m, x, name=name: seen.append((f'layers, {name}', m, x[0]))))
    with torch.no_grad():
        model(torch.stack([transform(p) for p in shipped_pictures()[0]]))
    for handle in handles:
        handle.remove()
    yield from seen


def errors(layer, x, form, exact):
    """Relative error of the variance, and of the output in units of the exact output's deviation."""
    layer = deepcopy(layer).train()
    layer.form = form
    layer.bn.momentum = 1.0
    y = layer(x)
    variance, output = exact
    return (((layer.bn.running_var - variance) / (variance + layer.bn.eps)).abs().max().item(),
            ((y - output).square().mean().sqrt() / output.std()).item())


def exact(layer, x):
    layer = deepcopy(layer).double().train()
    layer.form = 'reference'
    layer.bn.momentum = 1.0
    y = layer(x.double())
    return layer.bn.running_var, y


@torch.no_grad()
def measure():
    torch.manual_seed(SEED)
    for name, layer, x in inputs():
        truth = exact(layer, x)
        bn, fbn = errors(layer, x, 'reference', truth), errors(layer, x, 'auto', truth)
        yield dict(input=name, bn_variance=bn[0], fbn_variance=fbn[0], bn_output=bn[1], fbn_output=fbn[1])


def main():
    rows = list(measure())
    for row in rows:
        print(f"{row['input']:<34}" + ''.join(f'  {key} {row[key]:.1e}' for key in list(row)[1:]))
    facts = dict(seed=SEED, device=cpu_name(), torch=torch.__version__, date=date.today(), command=shlex.join(sys.argv))
    write_rows(FILE, [{k: f'{v:.2e}' if isinstance(v, float) else v for k, v in row.items()} | facts for row in rows])


if __name__ == '__main__':
    main()
