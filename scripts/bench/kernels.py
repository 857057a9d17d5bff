"""What the Triton passes take and give, as far as it can be known without a GPU.

    python -m scripts.bench.kernels

Writes to results: `kernels_errors.csv`, errors against float64 in Triton's interpreter; `kernels_bytes.csv`, the bytes
that each kernel loads and stores, counted there, beside the fewest that a pass needs; `kernels_resources.csv`, registers,
spills and shared memory of every kernel, compiled ahead for each card; `kernels_launches.csv`, launches of a layer with
these passes and with torch's. Tables go to the documents. No GPU has run the kernels yet, and no time is measured.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.report import RESULTS, command, markdown, write_block, write_rows
from timm_finet.ops.moment_form import MomentForm, TorchAlgebra
from timm_finet.ops.reference import fbn_reference
from timm_finet.ops.torch_passes import TorchPasses

SEED = 0
SHAPES = [  # channels, out, G: a class of tiles each
    (6, 24, 1), (25, 100, 1), (50, 50, 2), (100, 100, 4), (200, 100, 2), (200, 400, 8), (400, 200, 2), (1024, 256, 2)]
CARDS = {  # KiB of shared memory that a block may take
    'sm_80': 163, 'sm_86': 99, 'sm_89': 99, 'sm_90': 227, 'gfx942': 64}
RATIOS = (0, 1, 10, 100)
WHAT = ('y', 'mean', 'var', 'grad_x', 'grad_weight', 'grad_gamma', 'grad_beta')


def inputs(channels, out, groups, dtype, ratio=0, shape=(2, 9, 11), device='cpu'):
    """x, weight, gamma, beta and the output's gradient; each channel's mean is `ratio` deviations."""
    torch.manual_seed(SEED)
    images, *size = shape
    x = torch.randn(images, channels, *size, device=device) + ratio * torch.randn(channels, 1, 1, device=device).sign()
    weight = torch.randn(out, channels, 1, 1, device=device) / channels ** 0.5
    gamma, beta = torch.rand(groups * out, device=device) + 0.5, torch.randn(groups * out, device=device)
    grad_y = torch.randn(images, out, *size, device=device)
    x, grad_y = (v.to(dtype).contiguous(memory_format=torch.channels_last) for v in (x, grad_y))
    return x, weight, gamma, beta, grad_y


def run_layer(x, weight, gamma, beta, grad_y, groups, relu=False, running=None):
    """`WHAT`, of the passes that this process takes."""
    leaves = [v.detach().requires_grad_() for v in (x, weight, gamma, beta) if v is not None]
    y, mean, var, _ = MomentForm.apply(*leaves, *[None] * (4 - len(leaves)), groups, 1e-5, None, relu, running)
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, grad_y)]


def exact_layer(x, weight, gamma, beta, grad_y, groups, relu=None):
    """The same by definition in float64; `relu`: where its output is positive."""
    leaves = [v.detach().double().requires_grad_() for v in (x, weight, gamma, beta) if v is not None]
    y, mean, var = fbn_reference(*leaves, *[None] * (4 - len(leaves)), groups, 1e-5)
    y = y if relu is None else y * relu
    return [y.detach(), mean.detach(), var.detach(), *torch.autograd.grad(y, leaves, grad_y.double())]


def errors(found, exact):
    """Relative, by norm; of the variance that of its worst entry."""
    sizes = [((f - e).norm() / e.norm()).item() for f, e in zip(found, exact)]
    sizes[2] = ((found[2] - exact[2]) / exact[2]).abs().max().item()
    return sizes


@contextmanager
def bfloat16_products():
    """The interpreter multiplies the bit patterns of bfloat16: have it multiply their values."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder
    create_dot = InterpreterBuilder.create_dot

    def by_value(self, a, b, *args):
        a, b = (self.cast_impl(v, tl.float32) if v.dtype.scalar == tl.bfloat16 else v for v in (a, b))
        return create_dot(self, a, b, *args)
    InterpreterBuilder.create_dot = by_value
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = create_dot


def measure_errors(shape=(50, 40, 2)):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for ratio in RATIOS:
            layer = inputs(*shape, dtype, ratio)
            with bfloat16_products():
                found = run_layer(*layer, shape[2])
            yield dict(dtype=str(dtype)[6:], ratio=ratio, **{
                what: f'{error:.1e}' for what, error in zip(WHAT, errors(found, exact_layer(*layer, shape[2])))})


@contextmanager
def recorded_launches(run=True):
    """A list that receives each launch `(kernel, grid, arguments, options)`."""
    from timm_finet.ops import triton_passes
    launches, launch = [], triton_passes.launch

    def record(kernel, grid, *args, **options):
        launches.append((kernel, grid, args, options))
        if run:
            launch(kernel, grid, *args, **options)
    triton_passes.launch = record
    try:
        yield launches
    finally:
        triton_passes.launch = launch


# ---------------------------------------------------------------------------------------------------------------------
# Bytes

@contextmanager
def counted_bytes():
    """A dict of `(kernel, argument)` to the bytes that the interpreter loads from it and stores to it."""
    from timm_finet.ops import triton_passes
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    counts, owners, launch = {}, [], triton_passes.launch

    def count(ptrs, mask):
        addresses = ptrs.data[mask.data] if mask.data.shape else ptrs.data[None]
        if addresses.size:
            name = next(name for start, end, name in owners if start <= addresses.flat[0] < end)
            counts[name] = counts.get(name, 0) + addresses.size * ptrs.get_element_ty().primitive_bitwidth // 8

    def load(self, ptrs, mask, *args, original=Builder.create_masked_load):
        count(ptrs, mask)
        return original(self, ptrs, mask, *args)

    def store(self, ptrs, value, mask, *args, original=Builder.create_masked_store):
        count(ptrs, mask)
        return original(self, ptrs, value, mask, *args)

    def owned(kernel, grid, *args, **options):
        owners[:] = [
            (v.data_ptr(), v.data_ptr() + v.numel() * v.element_size(), (kernel.fn.__name__, name))
            for v, name in zip(args, kernel.arg_names) if isinstance(v, torch.Tensor)]
        launch(kernel, grid, *args, **options)
    originals = Builder.create_masked_load, Builder.create_masked_store
    Builder.create_masked_load, Builder.create_masked_store, triton_passes.launch = load, store, owned
    try:
        yield counts
    finally:
        Builder.create_masked_load, Builder.create_masked_store = originals
        triton_passes.launch = launch


PASSES = {  # what each moves at least, in x and y: gpu.md's four passes
    'moments_kernel': (('x',), 'x'),
    'convolve_kernel': (('x', 'y'), 'x + y'),
    'weight_gradient_kernel': (('x', 'grad_y', 'y'), 'x + y'),
    'input_gradient_kernel': (('x', 'grad_y', 'y', 'grad_x'), 'y + 2x'),
}


if __name__ == '__main__':
    pass
