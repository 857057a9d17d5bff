"""Rounding errors of FBN in training: FBNConv2d and the paper's own form on the same inputs, both against float64.

    python -m scripts.bench.numerics

For each input, this measures the largest relative error of the batch variance, and the root mean square errors of the
output and of the gradients of input, weight and gamma. The errors of the gradients are relative to their root mean
square, and that of the output to its standard deviation. Inputs named `layers` are those that each FBN layer of the
embedded network sees. This writes results/numerics.csv.
"""
from copy import deepcopy

import timm
import torch

from scripts.report import RESULTS, command_line, facts, write_rows
from timm_finet import FBNConv2d
from timm_finet.commands.demo import SHIPPED
from timm_finet.fbn import ReferenceFBNConv2d
from timm_finet.images import shipped_images

WHAT = ('variance', 'output', 'grad_x', 'grad_weight', 'grad_gamma')
SEED = 0


def inputs():
    """Yield a name, a layer and its float32 input."""
    layer = FBNConv2d(64, 64, fbn_groups=4)
    noise = torch.randn(32, 64, 16, 16)
    for ratio in (0, 1, 10, 100, 1000, 10000):
        yield f'mean/deviation {ratio}', layer, noise + ratio * torch.randn(64).sign()[:, None, None]
    for ratio in (0, 3, 100):
        yield f'16 channels, mean {ratio}', FBNConv2d(16, 32, fbn_groups=4), torch.randn(32, 16, 16, 16) + ratio
    yield 'half of the channels constant', layer, torch.where(torch.arange(64)[:, None, None] % 2 == 0, 3., noise)
    yield 'first image constant', layer, torch.cat((torch.full((1, 64, 16, 16), 5.), noise[1:]))
    yield 'up to 60000 (float16 range)', layer, noise.clamp(-4, 4) * 15000
    yield 'down to 1e-4', layer, noise * 1e-4
    yield 'two positions', layer, torch.randn(2, 64, 1, 1)
    model = timm.create_model(SHIPPED, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model, use_test_size=True))
    seen = []
    handles = [
        module.register_forward_pre_hook(lambda m, x, name=name: seen.append((f'layers, {name}', m, x[0])))
        for name, module in model.named_modules() if isinstance(module, FBNConv2d)]
    with torch.no_grad():
        model(torch.stack([transform(image) for image in shipped_images()[0]]))
    for handle in handles:
        handle.remove()
    yield from seen


def step(layer, x, grad, form, dtype):
    """Batch variance, output and gradients of one training step."""
    layer = deepcopy(layer).to(dtype).train()
    layer.__class__, layer.bn.momentum = form, 1.0
    x = x.detach().clone().to(dtype).requires_grad_()
    y = layer(x)
    y.backward(grad.to(dtype))
    return layer.bn.running_var, y.detach(), x.grad, layer.weight.grad, layer.bn.weight.grad


def errors(found, exact, eps):
    variance = ((found[0] - exact[0]) / (exact[0] + eps)).abs().max()
    sizes = exact[1].std(), *(e.square().mean().sqrt() for e in exact[2:])
    return variance.item(), *(
        ((f - e).square().mean().sqrt() / size).item() for f, e, size in zip(found[1:], exact[1:], sizes))


def measure():
    torch.manual_seed(SEED)
    for name, layer, x in inputs():
        grad = torch.randn(x.shape[0], layer.out_channels, *x.shape[2:])
        exact = step(layer, x, grad, ReferenceFBNConv2d, torch.float64)
        row = {'input': name}
        for who, form in (('reference', ReferenceFBNConv2d), ('fbn', FBNConv2d)):
            found = errors(step(layer, x, grad, form, torch.float32), exact, layer.bn.eps)
            row.update({f'{who}_{what}': error for what, error in zip(WHAT, found)})
        yield row


def main():
    torch.set_num_threads(1)  # on several threads sums round otherwise
    command_line(__doc__).parse_args()
    write_rows(RESULTS / 'numerics.csv', [
        {key: f'{value:.2e}' if isinstance(value, float) else value for key, value in row.items()}
        | dict(seed=SEED, **facts()) for row in measure()])


if __name__ == '__main__':
    main()
