"""The moment form in Triton for half precision in channels_last: four launches forward, five backward.

Not yet run on a GPU: by Triton's interpreter, and compiled.

`x` is rows `(P, C)`, a position each; `S = C / G` channels make a group. What a channel's mean would take from half
precision is kept in float32 instead of a centred copy: `moments` and `weight_gradient` subtract a `shift` from each
value as it is loaded, and the products that give `y` and `grad_x` start from a float32 bias.

Sums over positions are written in parts, one a program, and added by a launch of their own: no atomics, so that a step
gives the same twice. Columns stand in tiles of up to 128: whole groups as long as they fit, else pieces of one group.
"""
from functools import lru_cache, partial
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl

from .moment_form import track

__all__ = ['TritonAlgebra', 'TritonPasses']

WIDEST = 128  # columns of a tile


# ---------------------------------------------------------------------------------------------------------------------
# Passes over the activations

@triton.jit
def columns_of(block, tile, C: tl.constexpr, WIDTH: tl.constexpr, BC: tl.constexpr):
    """The columns of a tile, and which of them there are: blocks of WIDTH columns hold whole groups, in tiles of BC."""
    c = tile * BC + tl.arange(0, BC)
    column = block * WIDTH + c
    return column, (c < WIDTH) & (column < C)


@triton.jit
def load_rows(x, row, last, column, exists, C: tl.constexpr):
    """Values of rows before `last`, and zeros."""
    mask = (row[:, None] < last) & exists[None, :]
    return tl.load(x + row[:, None].to(tl.int64) * C + column[None, :], mask, 0.0)


@triton.jit
def load_centred(x, row, last, column, exists, shift, C: tl.constexpr):
    """`c = x - shift` in the dtype of `x`, and zeros."""
    mask = (row[:, None] < last) & exists[None, :]
    value = tl.load(x + row[:, None].to(tl.int64) * C + column[None, :], mask, 0.0)
    return tl.where(mask, value.to(tl.float32) - shift[None, :], 0.0).to(x.dtype.element_ty)


@triton.jit
def pilot_shift(x, P, column, exists, C: tl.constexpr, BP: tl.constexpr):
    """The mean of BP positions where it is more than four deviations, else zero.

    A difference is exact in half precision only near the shift; far from it, rounding it costs more than it saves.
    """
    row = tl.arange(0, BP).to(tl.int64) * P // BP
    value = load_rows(x, row, P, column, exists, C).to(tl.float32)
    mean = tl.sum(value, 0) / BP
    rest = value - mean[None, :]
    shift = tl.where(mean * mean > 16 * tl.sum(rest * rest, 0) / BP, mean, 0.0)
    return shift.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def moments_kernel(
        x, shift, products, sums, P, rows,
        C: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr):
    """Of `rows` positions: `sum c_i c_j` within the groups `(parts, C, S)`, and `sum c_i` `(parts, C)`."""
    TILES: tl.constexpr = (WIDTH + BC - 1) // BC
    part = tl.program_id(1)
    i, j = tl.program_id(0) // TILES % TILES, tl.program_id(0) % TILES
    if j > i:  # the mirror image of another
        return
    block = tl.program_id(0) // (TILES * TILES)
    column_i, exists_i = columns_of(block, i, C, WIDTH, BC)
    column_j, exists_j = columns_of(block, j, C, WIDTH, BC)
    shift_i = pilot_shift(x, P, column_i, exists_i, C, BP)
    shift_j = shift_i
    if TILES > 1:
        shift_j = pilot_shift(x, P, column_j, exists_j, C, BP)

    product = tl.zeros((BC, BC), tl.float32)
    total = tl.zeros((BP, BC), tl.float32)
    last = min(P, (part + 1) * rows)
    for p in range(part * rows, last, BP):
        row = p + tl.arange(0, BP)
        c_i = load_centred(x, row, last, column_i, exists_i, shift_i, C)
        c_j = c_i
        if TILES > 1:
            c_j = load_centred(x, row, last, column_j, exists_j, shift_j, C)
        product = tl.dot(tl.trans(c_i), c_j, product)
        total += c_i.to(tl.float32)

    products += part.to(tl.int64) * C * S
    k = column_j[None, :] - column_i[:, None] // S * S
    mask = exists_i[:, None] & exists_j[None, :] & (k >= 0) & (k < S)
    tl.store(products + (column_i[:, None] * S + k), product, mask)
    if i != j:
        k = column_i[None, :] - column_j[:, None] // S * S
        tl.store(products + (column_j[:, None] * S + k), tl.trans(product), exists_j[:, None] & exists_i[None, :])
    if j == 0:
        tl.store(sums + part * C + column_i, tl.sum(total, 0), exists_i)
        if part == 0:
            tl.store(shift + column_i, shift_i, exists_i)


@triton.jit
def convolve_kernel(
        x, weight, bias, y, P,
        C: tl.constexpr, OUT: tl.constexpr, G: tl.constexpr, RELU: tl.constexpr,
        BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr):
    """`y = W' x + b'`, `b'` the sum of `bias` `(G, OUT)`."""
    TILES: tl.constexpr = (OUT + BO - 1) // BO
    row = tl.program_id(0) // TILES * BP + tl.arange(0, BP)
    o, exists = columns_of(0, tl.program_id(0) % TILES, OUT, OUT, BO)
    acc = tl.zeros((BP, BO), tl.float32)
    for k in range(0, C, BC):
        c = k + tl.arange(0, BC)
        values = load_rows(x, row, P, c, c < C, C)
        w = tl.load(weight + (o[None, :] * C + c[:, None]), exists[None, :] & (c[:, None] < C), 0.0)
        acc = tl.dot(values, w, acc)
    for g in range(G):
        acc += tl.load(bias + g * OUT + o, exists, 0.0)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # a NaN stays one
    mask = (row[:, None] < P) & exists[None, :]
    tl.store(y + row[:, None].to(tl.int64) * OUT + o[None, :], acc.to(y.dtype.element_ty), mask)


@triton.jit
def load_grad(grad_y, y, row, last, o, exists, OUT: tl.constexpr, RELU: tl.constexpr):
    """`dy`, zero where the ReLU has made a zero."""
    grad = load_rows(grad_y, row, last, o, exists, OUT)
    if RELU:
        grad = tl.where(load_rows(y, row, last, o, exists, OUT).to(tl.float32) <= 0, 0.0, grad)
    return grad


@triton.jit
def weight_gradient_kernel(
        grad_y, y, x, shift, parts, P, rows,
        C: tl.constexpr, OUT: tl.constexpr, RELU: tl.constexpr,
        BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr):
    """Of `rows` positions: `sum dy c^T` `(OUT, C)`, then `sum dy` `(OUT,)`: a row of `parts`."""
    TILES: tl.constexpr = (C + BC - 1) // BC
    part, tile = tl.program_id(1), tl.program_id(0) % TILES
    o, o_exists = columns_of(0, tl.program_id(0) // TILES, OUT, OUT, BO)
    c, c_exists = columns_of(0, tile, C, C, BC)
    shift_c = tl.load(shift + c, c_exists, 0.0)
    product = tl.zeros((BO, BC), tl.float32)
    total = tl.zeros((BP, BO), tl.float32)
    last = min(P, (part + 1) * rows)
    for p in range(part * rows, last, BP):
        row = p + tl.arange(0, BP)
        grad = load_grad(grad_y, y, row, last, o, o_exists, OUT, RELU)
        values = load_centred(x, row, last, c, c_exists, shift_c, C)
        product = tl.dot(tl.trans(grad), values, product)
        total += grad.to(tl.float32)
    parts += part.to(tl.int64) * (OUT * C + OUT)
    tl.store(parts + (o[:, None] * C + c[None, :]), product, o_exists[:, None] & c_exists[None, :])
    if tile == 0:
        tl.store(parts + OUT * C + o, tl.sum(total, 0), o_exists)


@triton.jit
def input_gradient_kernel(
        grad_y, y, x, weight, a, b, grad_x, P,
        C: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, RELU: tl.constexpr,
        BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr):
    """`dx = W'^T dy + A x + b`, in one accumulator; `a` `(C, S)`, symmetric."""
    TILES: tl.constexpr = (WIDTH + BC - 1) // BC
    BLOCKS: tl.constexpr = (C + WIDTH - 1) // WIDTH
    row = tl.program_id(0) // (BLOCKS * TILES) * BP + tl.arange(0, BP)
    block, tile = tl.program_id(0) // TILES % BLOCKS, tl.program_id(0) % TILES
    column, exists = columns_of(block, tile, C, WIDTH, BC)
    acc = tl.zeros((BP, BC), tl.float32)
    for k in range(TILES):
        c, c_exists = columns_of(block, k, C, WIDTH, BC)
        j = column[None, :] - c[:, None] // S * S
        mask = c_exists[:, None] & exists[None, :] & (j >= 0) & (j < S)
        values = load_rows(x, row, P, c, c_exists, C)
        acc = tl.dot(values, tl.load(a + (c[:, None] * S + j), mask, 0.0), acc)
    for k in range(0, OUT, BO):
        o = k + tl.arange(0, BO)
        grad = load_grad(grad_y, y, row, P, o, o < OUT, OUT, RELU)
        w = tl.load(weight + (o[:, None] * C + column[None, :]), (o[:, None] < OUT) & exists[None, :], 0.0)
        acc = tl.dot(grad, w, acc)
    acc += tl.load(b + column, exists, 0.0)[None, :]
    mask = (row[:, None] < P) & exists[None, :]
    tl.store(grad_x + row[:, None].to(tl.int64) * C + column[None, :], acc.to(grad_x.dtype.element_ty), mask)


# ---------------------------------------------------------------------------------------------------------------------
# Between them: sums of the parts, and the algebra of moment_form.py with tensors of the weight's size

@triton.jit
def add_parts_kernel(parts, total, n_parts, N: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """The sum of `parts` `(n_parts, N)`."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for k in range(0, n_parts, BK):
        part = k + tl.arange(0, BK)
        mask = (part[:, None] < n_parts) & (n[None, :] < N)
        acc += tl.sum(tl.load(parts + part[:, None].to(tl.int64) * N + n[None, :], mask, 0.0), 0)
    tl.store(total + n, acc, n < N)


@triton.jit
def covariances_kernel(
        products, sums, rest, cov, n_parts, count,
        C: tl.constexpr, S: tl.constexpr, BK: tl.constexpr, BS: tl.constexpr):
    """`rest = E[c]` `(C,)` and `S_ij = E[c_i c_j] - rest_i rest_j` `(C, S)` of all parts; a channel i a program."""
    i = tl.program_id(0)
    j = tl.program_id(1) * BS + tl.arange(0, BS)
    product, total_j, total_i = tl.zeros((BS,), tl.float32), tl.zeros((BS,), tl.float32), 0.0
    for k in range(0, n_parts, BK):
        part = k + tl.arange(0, BK)
        mask = (part[:, None] < n_parts) & (j[None, :] < S)
        at = part[:, None].to(tl.int64) * C
        product += tl.sum(tl.load(products + (at + i) * S + j[None, :], mask, 0.0), 0)
        total_j += tl.sum(tl.load(sums + at + i // S * S + j[None, :], mask, 0.0), 0)
        total_i += tl.sum(tl.load(sums + part * C + i, part < n_parts, 0.0), 0)
    tl.store(cov + i * S + j, product / count - (total_i / count) * (total_j / count), j < S)
    if tl.program_id(1) == 0:
        tl.store(rest + i, total_i / count)


@triton.jit
def fold_kernel(
        weight, gamma, beta, shift, rest, cov, running_mean, running_var,
        folded, bias, mean_, var_, inv_, w_cov, eps, momentum, unbiased,
        C: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, AFFINE: tl.constexpr, TRACK: tl.constexpr,
        BO: tl.constexpr, BS: tl.constexpr):
    """The folded weight, and for group g its part of the bias, statistics, and `W_g S_g`."""
    g = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    exists = o < OUT
    weight += g * S
    w_cov += g * S
    folded += g * S
    mean, var = tl.zeros((BO,), tl.float32), tl.zeros((BO,), tl.float32)
    for j in range(0, S, BS):
        cj = j + tl.arange(0, BS)
        mask = exists[:, None] & (cj[None, :] < S)
        ws = tl.zeros((BO, BS), tl.float32)
        for k in range(0, S, BS):
            ck = k + tl.arange(0, BS)
            w = tl.load(weight + o[:, None] * C + ck[None, :], exists[:, None] & (ck[None, :] < S), 0.0).to(tl.float32)
            s = tl.load(cov + (g * S + ck[:, None]) * S + cj[None, :], (ck[:, None] < S) & (cj[None, :] < S), 0.0)
            ws = tl.dot(w, s, ws, input_precision='ieee')
        w = tl.load(weight + o[:, None] * C + cj[None, :], mask, 0.0).to(tl.float32)
        m = tl.load(shift + g * S + cj, cj < S, 0.0) + tl.load(rest + g * S + cj, cj < S, 0.0)
        mean += tl.sum(w * m[None, :], 1)  # mu = W m
        var += tl.sum(ws * w, 1)  # var = diag(W S W^T)
        tl.store(w_cov + o[:, None] * C + cj[None, :], ws, mask)
    var = tl.where(var < 0, 0.0, var)  # by rounding; a NaN stays one
    inv = 1 / tl.sqrt_rn(var + eps)
    scale = inv
    b = tl.zeros((BO,), tl.float32)
    if AFFINE:
        scale *= tl.load(gamma + g * OUT + o, exists, 0.0).to(tl.float32)
        b += tl.load(beta + g * OUT + o, exists, 0.0).to(tl.float32)
    for j in range(0, S, BS):
        cj = j + tl.arange(0, BS)
        mask = exists[:, None] & (cj[None, :] < S)
        w = tl.load(weight + o[:, None] * C + cj[None, :], mask, 0.0).to(tl.float32)
        m = tl.load(shift + g * S + cj, cj < S, 0.0) + tl.load(rest + g * S + cj, cj < S, 0.0)
        rounded = (w * scale[:, None]).to(folded.dtype.element_ty)
        b -= tl.sum(rounded.to(tl.float32) * m[None, :], 1)  # of the rounded weight: the mean of y is that of beta
        tl.store(folded + o[:, None] * C + cj[None, :], rounded, mask)
    at = g * OUT + o
    tl.store(bias + at, b, exists)
    tl.store(mean_ + at, mean, exists)
    tl.store(var_ + at, var, exists)
    tl.store(inv_ + at, inv, exists)
    if TRACK:
        old = tl.load(running_mean + at, exists, 0.0).to(tl.float32)
        tl.store(running_mean + at, (old + momentum * (mean - old)).to(running_mean.dtype.element_ty), exists)
        old = tl.load(running_var + at, exists, 0.0).to(tl.float32)
        tl.store(running_var + at, (old + momentum * (var * unbiased - old)).to(running_var.dtype.element_ty), exists)


@triton.jit
def unfold_kernel(
        weight, gamma, rest, inv_, w_cov, grad_folded, grad_bias, grad_weight, grad_gamma, grad_beta, grad_var,
        C: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, AFFINE: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr):
    """Gradients of weight, gamma, beta and var of group g."""
    g = tl.program_id(1)
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    exists = o < OUT
    gb = tl.load(grad_bias + o, exists, 0.0)
    grad_scale = tl.zeros((BO,), tl.float32)
    for j in range(0, S, BS):
        cj = j + tl.arange(0, BS)
        at = o[:, None] * C + g * S + cj[None, :]
        mask = exists[:, None] & (cj[None, :] < S)
        w = tl.load(weight + at, mask, 0.0).to(tl.float32)
        m = tl.load(rest + g * S + cj, cj < S, 0.0)
        effective = tl.load(grad_folded + at, mask, 0.0) - gb[:, None] * m[None, :]  # y = W' (c - rest) + beta
        grad_scale += tl.sum(effective * w, 1)
    inv = tl.load(inv_ + g * OUT + o, exists, 0.0)
    scale = inv
    if AFFINE:
        scale *= tl.load(gamma + g * OUT + o, exists, 0.0).to(tl.float32)
        tl.store(grad_gamma + g * OUT + o, (grad_scale * inv).to(grad_gamma.dtype.element_ty), exists)
        tl.store(grad_beta + g * OUT + o, gb.to(grad_beta.dtype.element_ty), exists)
    dvar = -0.5 * grad_scale * scale * inv * inv  # scale = gamma / sqrt(var + eps)
    tl.store(grad_var + g * OUT + o, dvar, exists)
    for j in range(0, S, BS):
        cj = j + tl.arange(0, BS)
        at = o[:, None] * C + g * S + cj[None, :]
        mask = exists[:, None] & (cj[None, :] < S)
        m = tl.load(rest + g * S + cj, cj < S, 0.0)
        effective = tl.load(grad_folded + at, mask, 0.0) - gb[:, None] * m[None, :]
        grad = effective * scale[:, None] + 2 * dvar[:, None] * tl.load(w_cov + at, mask, 0.0)  # var = diag(W S W^T)
        tl.store(grad_weight + at, grad.to(grad_weight.dtype.element_ty), mask)


@triton.jit
def input_terms_kernel(
        weight, folded, shift, rest, grad_var, grad_bias, a, b, count,
        C: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, COUNT_IS_TENSOR: tl.constexpr,
        BI: tl.constexpr, BO: tl.constexpr, BS: tl.constexpr):
    """`A = 2 / count W^T dvar W` `(C, S)`, and `b = -A m - W'^T sum dy / count` `(C,)` of A as it is rounded."""
    if COUNT_IS_TENSOR:
        count = tl.load(count)
    g = tl.program_id(1)
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    exists = i < S
    lost = tl.zeros((BI,), tl.float32)
    for k in range(0, OUT, BO):
        o = k + tl.arange(0, BO)
        mask = exists[:, None] & (o[None, :] < OUT)
        w = tl.load(folded + o[None, :] * C + g * S + i[:, None], mask, 0.0).to(tl.float32)
        lost -= tl.sum(w * tl.load(grad_bias + o, o < OUT, 0.0)[None, :], 1) / count
    for j in range(0, S, BS):
        cj = j + tl.arange(0, BS)
        acc = tl.zeros((BI, BS), tl.float32)
        for k in range(0, OUT, BO):
            o = k + tl.arange(0, BO)
            mask = exists[:, None] & (o[None, :] < OUT)
            w_i = tl.load(weight + o[None, :] * C + g * S + i[:, None], mask, 0.0).to(tl.float32)
            w_i *= tl.load(grad_var + g * OUT + o, o < OUT, 0.0)[None, :]
            mask = (o[:, None] < OUT) & (cj[None, :] < S)
            w_j = tl.load(weight + o[:, None] * C + g * S + cj[None, :], mask, 0.0).to(tl.float32)
            acc = tl.dot(w_i, w_j, acc, input_precision='ieee')
        rounded = (acc * (2 / count)).to(a.dtype.element_ty)
        m = tl.load(shift + g * S + cj, cj < S, 0.0) + tl.load(rest + g * S + cj, cj < S, 0.0)
        lost -= tl.sum(rounded.to(tl.float32) * m[None, :], 1)
        mask = exists[:, None] & (cj[None, :] < S)
        tl.store(a + (g * S + i[:, None]) * S + cj[None, :], rounded, mask)
    tl.store(b + g * S + i, lost, exists)


# ---------------------------------------------------------------------------------------------------------------------
# Launches

def launch(kernel, grid, *args, num_warps=4, num_stages=2, **constants):
    """Every launch of this module goes through here, which its tests count and compile."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def power_of_2(n: int, least: int = 16) -> int:
    """The block for n columns: `tl.dot` takes 16 or more."""
    return max(least, triton.next_power_of_2(n))


def tiles(channels: int, groups: int) -> dict:
    """How the columns are cut: blocks of WIDTH, whole groups, in tiles of BC."""
    size = channels // groups
    if size > WIDEST:
        return dict(WIDTH=size, BC=WIDEST)
    width = size * min(groups, WIDEST // size)
    return dict(WIDTH=width, BC=power_of_2(width))


@lru_cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == 'cuda' else 2


def parts_of(positions: int, n_tiles: int, least: int, block: int, device: torch.device) -> Tuple[int, int]:
    """Into how many parts a sum over positions is split, and the positions of each.

    Two programs a processor, unless writing and reading the parts came to a quarter of what is summed.
    """
    parts = max(1, min(triton.cdiv(2 * processors(device), n_tiles), positions // max(least, block)))
    rows = triton.cdiv(triton.cdiv(positions, parts), block) * block
    return triton.cdiv(positions, rows), rows


def count_positions(x: torch.Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def operator(outputs, mutates_args=()):
    """A function that launches kernels, as one operator for torch.compile; eager code calls it as it is.

    `outputs`, of the same arguments, makes the tensors that it fills.
    """
    def wrap(function):
        op = torch.library.custom_op(f'timm_finet::{function.__name__}', function, mutates_args=mutates_args)
        op.register_fake(outputs)

        def call(*args):
            return (op if torch.compiler.is_compiling() else function)(*args)
        return call
    return wrap


def moments_outputs(x: torch.Tensor, groups: int):
    channels = x.shape[1]
    new = partial(x.new_empty, dtype=torch.float32)
    return new(channels), new(channels), new(groups, channels // groups, channels // groups)


@operator(moments_outputs)
def triton_moments(x: torch.Tensor, groups: int) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shift, rest, cov = moments_outputs(x, groups)
    positions, channels, size = count_positions(x), x.shape[1], cov.shape[2]
    cut = tiles(channels, groups)
    n_blocks, n_tiles = triton.cdiv(channels, cut['WIDTH']), triton.cdiv(cut['WIDTH'], cut['BC'])
    n_pairs = n_tiles * (n_tiles + 1) // 2
    parts, rows = parts_of(positions, n_blocks * n_pairs, 16 * size, 32, x.device)
    products, sums = rest.new_empty(parts, channels, size), rest.new_empty(parts, channels)
    launch(moments_kernel, (n_blocks * n_tiles ** 2, parts), x, shift, products, sums, positions, rows,
           C=channels, S=size, **cut, BP=32, num_warps=8 if cut['BC'] > 64 else 4, num_stages=3)
    block = min(128, power_of_2(size))
    launch(covariances_kernel, (channels, triton.cdiv(size, block)), products, sums, rest, cov, parts, positions,
           C=channels, S=size, BK=16, BS=block)
    return shift, rest, cov


def fold_outputs(weight, gamma, beta, shift, rest, cov, running_mean, running_var, eps, momentum, unbiased, dtype):
    out, groups, size = len(weight), len(cov), cov.shape[2]
    folded = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
    small = [cov.new_empty(groups, out) for _ in range(4)]
    return folded, *small, cov.new_empty(out, groups, size)


@operator(fold_outputs, mutates_args=('running_mean', 'running_var'))
def triton_fold(
        weight: torch.Tensor, gamma: Optional[torch.Tensor], beta: Optional[torch.Tensor], shift: torch.Tensor,
        rest: torch.Tensor, cov: torch.Tensor, running_mean: Optional[torch.Tensor],
        running_var: Optional[torch.Tensor], eps: float, momentum: float, unbiased: float, dtype: torch.dtype,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    made = fold_outputs(
        weight, gamma, beta, shift, rest, cov, running_mean, running_var, eps, momentum, unbiased, dtype)
    out, groups, size = made[-1].shape
    launch(fold_kernel, (triton.cdiv(out, 16), groups), weight.contiguous(), gamma, beta, shift, rest, cov,
           running_mean, running_var, *made, eps, momentum, unbiased, C=groups * size, OUT=out, S=size,
           AFFINE=gamma is not None, TRACK=running_mean is not None, BO=16, BS=min(64, power_of_2(size)))
    return made


def convolve_outputs(x, weight, bias, relu):
    return torch.empty_like(x[:, :1].expand(-1, len(weight), -1, -1), memory_format=torch.channels_last)


@operator(convolve_outputs)
def triton_convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, relu: bool) -> torch.Tensor:
    y = convolve_outputs(x, weight, bias, relu)
    positions, channels, out = count_positions(x), x.shape[1], len(weight)
    block = min(128, power_of_2(out))
    grid = triton.cdiv(positions, 128) * triton.cdiv(out, block),
    launch(convolve_kernel, grid, x, weight, bias, y, positions, C=channels, OUT=out, G=len(bias), RELU=relu,
           BP=128, BO=block, BC=min(64, power_of_2(channels)), num_warps=8 if block > 64 else 4)
    return y


def weight_gradient_outputs(grad_y, y, x, shift):
    out, channels = grad_y.shape[1], x.shape[1]
    return shift.new_empty(out * channels + out)


@operator(weight_gradient_outputs)
def triton_weight_gradient(
        grad_y: torch.Tensor, y: Optional[torch.Tensor], x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    total = weight_gradient_outputs(grad_y, y, x, shift)
    positions, channels, out = count_positions(x), x.shape[1], grad_y.shape[1]
    block_o, block_c = min(128, power_of_2(out)), min(128, power_of_2(channels))
    n_tiles = triton.cdiv(out, block_o) * triton.cdiv(channels, block_c)
    parts, rows = parts_of(positions, n_tiles, 16 * out * channels // (out + channels), 32, x.device)
    sums = shift.new_empty(parts, len(total))
    launch(weight_gradient_kernel, (n_tiles, parts), grad_y, y, x, shift, sums, positions, rows,
           C=channels, OUT=out, RELU=y is not None, BP=32, BO=block_o, BC=block_c,
           num_warps=8 if max(block_o, block_c) > 64 else 4, num_stages=3)
    launch(add_parts_kernel, (triton.cdiv(len(total), 128),), sums, total, parts, N=len(total), BK=16, BN=128)
    return total


def unfold_outputs(weight, gamma, rest, inv, w_cov, grad_folded, grad_bias):
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    like = inv if gamma is None else gamma
    return grad_weight, like.new_empty(inv.numel()), like.new_empty(inv.numel()), torch.empty_like(inv)


@operator(unfold_outputs)
def triton_unfold(
        weight: torch.Tensor, gamma: Optional[torch.Tensor], rest: torch.Tensor, inv: torch.Tensor,
        w_cov: torch.Tensor, grad_folded: torch.Tensor, grad_bias: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    made = unfold_outputs(weight, gamma, rest, inv, w_cov, grad_folded, grad_bias)
    out, groups, size = w_cov.shape
    launch(unfold_kernel, (triton.cdiv(out, 16), groups), weight.contiguous(), gamma, rest, inv, w_cov, grad_folded,
           grad_bias, *made, C=groups * size, OUT=out, S=size, AFFINE=gamma is not None,
           BO=16, BS=min(128, power_of_2(size)))
    return made


def input_terms_outputs(weight, folded, shift, rest, grad_var, grad_bias, total, count):
    channels, groups = weight.shape[1], len(grad_var)
    return folded.new_empty(groups, channels // groups, channels // groups), torch.empty_like(rest)


@operator(input_terms_outputs)
def triton_input_terms(
        weight: torch.Tensor, folded: torch.Tensor, shift: torch.Tensor, rest: torch.Tensor, grad_var: torch.Tensor,
        grad_bias: torch.Tensor, total: Optional[torch.Tensor], count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    a, b = input_terms_outputs(weight, folded, shift, rest, grad_var, grad_bias, total, count)
    groups, size = len(a), a.shape[2]
    launch(input_terms_kernel, (triton.cdiv(size, 16), groups), weight.contiguous(), folded, shift, rest, grad_var,
           grad_bias, a, b, count if total is None else total, C=groups * size, OUT=len(weight), S=size,
           COUNT_IS_TENSOR=total is not None, BI=16, BO=16, BS=min(128, power_of_2(size)))
    return a, b


def input_gradient_outputs(grad_y, y, x, weight, a, b):
    return torch.empty_like(x, memory_format=torch.channels_last)


@operator(input_gradient_outputs)
def triton_input_gradient(
        grad_y: torch.Tensor, y: Optional[torch.Tensor], x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor,
        b: torch.Tensor) -> torch.Tensor:
    grad_x = input_gradient_outputs(grad_y, y, x, weight, a, b)
    positions, channels, out = count_positions(x), x.shape[1], len(weight)
    cut = tiles(channels, len(a))
    n_tiles = triton.cdiv(channels, cut['WIDTH']) * triton.cdiv(cut['WIDTH'], cut['BC'])
    # A group in several tiles takes more shared memory, odd columns more registers.
    block = 128 if cut['WIDTH'] <= cut['BC'] and cut['WIDTH'] % 2 == 0 else 64
    launch(input_gradient_kernel, (triton.cdiv(positions, block) * n_tiles,), grad_y, y, x, weight, a, b, grad_x,
           positions, C=channels, OUT=out, S=a.shape[2], **cut, RELU=y is not None,
           BP=block, BO=32, num_warps=8 if cut['BC'] > 32 else 4)
    return grad_x


class TritonPasses:
    """The passes over one layer's input `x`, channels_last and with positions; arguments as for `TorchPasses`."""

    def __init__(
            self,
            x: torch.Tensor,
            shift: Optional[torch.Tensor] = None,
            grad_y: Optional[torch.Tensor] = None,
            y: Optional[torch.Tensor] = None,
    ):
        self.x, self.shift, self.y = x, shift, y
        self.grad_y = None if grad_y is None else grad_y.contiguous(memory_format=torch.channels_last)

    def moments(self, groups: int, dtype: torch.dtype):
        """`shift`, `rest`, `cov` as from `TorchPasses`, in float32 whatever `dtype` is."""
        return triton_moments(self.x, groups)

    def convolve(self, weight: torch.Tensor, bias: torch.Tensor, relu: bool) -> torch.Tensor:
        """`W' x + b'`, or its ReLU; the bias `(G, out)` as from `TritonAlgebra.fold`."""
        return triton_convolve(self.x, weight, bias, relu)

    def weight_gradient(self, out: int, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        """`sum dy c^T` `(out, C)` and `sum dy` `(out,)` in float32."""
        channels = self.x.shape[1]
        products, sums = triton_weight_gradient(self.grad_y, self.y, self.x, self.shift).split((out * channels, out))
        return products.view(out, channels), sums

    def input_gradient(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`W'^T dy + A x + b`."""
        return triton_input_gradient(self.grad_y, self.y, self.x, weight, a, b)


class TritonAlgebra:
    """The algebra of `TorchAlgebra`, a launch a method, for passes that take `x` itself: biases hold its whole mean."""

    @staticmethod
    def fold(weight, gamma, beta, shift, rest, cov, eps, dtype, running, count):
        in_kernel = running is not None and not isinstance(count, torch.Tensor)
        running_mean, running_var, momentum = running if in_kernel else (None, None, 0.)
        unbiased = count / (count - 1) if in_kernel else 1.
        made = triton_fold(
            weight, gamma, beta, shift, rest, cov, running_mean, running_var, eps, momentum, unbiased, dtype)
        if running is not None and not in_kernel:
            track(running, made[2], made[3], count)
        return made

    @staticmethod
    def unfold(weight, gamma, rest, inv, w_cov, grad_folded, grad_bias):
        grad_weight, grad_gamma, grad_beta, grad_var = triton_unfold(
            weight, gamma, rest, inv, w_cov, grad_folded, grad_bias)
        if gamma is None:
            grad_gamma = grad_beta = None
        return grad_weight, grad_gamma, grad_beta, grad_var

    @staticmethod
    def input_terms(weight, folded, shift, rest, grad_var, grad_bias, count):
        total, count = (count, 0) if isinstance(count, torch.Tensor) else (None, count)
        return triton_input_terms(weight, folded, shift, rest, grad_var, grad_bias, total, count)
