"""The moment form in Triton for half precision in channels_last: four launches forward, five backward.

`x` is rows `(P, C)`, a position each; `S = C / G` channels make a group. What a channel's mean would take from half
precision is kept in float32 instead of a centred copy: `moments` subtracts a `shift` from each value as it is loaded,
the products that give `y` and `grad_x` start from a float32 bias, and the mean's part is taken from the sums that make
the weight's gradient when they are complete.

Sums over positions are written in parts, one a program, and added by a launch of their own: no atomics, so that a step
gives the same twice. Columns stand in tiles of up to 128: whole groups as long as they fit, else pieces of one group.
"""
from functools import lru_cache, partial
from typing import Optional, Tuple

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel

from .moment_form import track

__all__ = ['TritonAlgebra', 'TritonPasses']

# Blocks, warps and stages are the fastest of some 5,000 tried on an H200 with the layers of finet_large.
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
    """`y = W' x + b'`, `b'` the sum of `bias` `(G, OUT)`. Of n programs each takes every n-th block of positions."""
    TILES: tl.constexpr = (OUT + BO - 1) // BO
    RESIDENT: tl.constexpr = C <= BC
    o, o_exists = columns_of(0, tl.program_id(0) % TILES, OUT, OUT, BO)
    c = tl.arange(0, BC)
    if RESIDENT:  # the weight stays where it is while activations pass by
        w = tl.load(weight + (o[None, :] * C + c[:, None]), o_exists[None, :] & (c[:, None] < C), 0.0)
    b = tl.zeros((BO,), tl.float32)
    for g in range(G):
        b += tl.load(bias + g * OUT + o, o_exists, 0.0)
    for p in range(tl.program_id(0) // TILES * BP, P, tl.num_programs(0) // TILES * BP):
        row = p + tl.arange(0, BP)
        if RESIDENT:
            acc = tl.dot(load_rows(x, row, P, c, c < C, C), w)
        else:
            acc = tl.zeros((BP, BO), tl.float32)
            for k in range(0, C, BC):
                exists = k + c < C
                values = load_rows(x, row, P, k + c, exists, C)
                part = tl.load(weight + (o[None, :] * C + k + c[:, None]), o_exists[None, :] & exists[:, None], 0.0)
                acc = tl.dot(values, part, acc)
        acc += b[None, :]
        if RELU:
            acc = tl.where(acc < 0, 0.0, acc)  # a NaN stays one
        mask = (row[:, None] < P) & o_exists[None, :]
        tl.store(y + row[:, None].to(tl.int64) * OUT + o[None, :], acc.to(y.dtype.element_ty), mask)


@triton.jit
def weight_gradient_kernel(
        grad_y, x, parts, P, rows,
        C: tl.constexpr, OUT: tl.constexpr, BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr):
    """Of `rows` positions: `sum dy x^T` `(OUT, C)`, then `sum dy` `(OUT,)`: a row of `parts`."""
    TILES: tl.constexpr = (C + BC - 1) // BC
    part, tile = tl.program_id(1), tl.program_id(0) % TILES
    o, o_exists = columns_of(0, tl.program_id(0) // TILES, OUT, OUT, BO)
    c, c_exists = columns_of(0, tile, C, C, BC)
    product = tl.zeros((BO, BC), tl.float32)
    # The sum is a product as well: of a load that has a second use, Triton 3.6 overwrites what a product still reads.
    ones, total = tl.full((BP, 16), 1, tl.float32).to(x.dtype.element_ty), tl.zeros((BO, 16), tl.float32)
    last = min(P, (part + 1) * rows)
    for p in range(part * rows, last, BP):
        row = p + tl.arange(0, BP)
        grad = tl.trans(load_rows(grad_y, row, last, o, o_exists, OUT))
        product = tl.dot(grad, load_rows(x, row, last, c, c_exists, C), product)
        total = tl.dot(grad, ones, total)
    parts += part.to(tl.int64) * (OUT * C + OUT)
    tl.store(parts + (o[:, None] * C + c[None, :]), product, o_exists[:, None] & c_exists[None, :])
    if tile == 0:
        tl.store(parts + OUT * C + o, tl.sum(total, 1) / 16, o_exists)


@triton.jit
def input_gradient_kernel(
        grad_y, x, weight, a, b, grad_x, P,
        C: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
        BP: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr):
    """`dx = W'^T dy + A x + b`, in one accumulator; `a` `(C, S)`, symmetric. Programs as in `convolve_kernel`."""
    TILES: tl.constexpr = (WIDTH + BC - 1) // BC
    BLOCKS: tl.constexpr = (C + WIDTH - 1) // WIDTH
    RESIDENT: tl.constexpr = (TILES == 1) & (OUT <= BO)
    block, tile = tl.program_id(0) // TILES % BLOCKS, tl.program_id(0) % TILES
    column, exists = columns_of(block, tile, C, WIDTH, BC)
    o = tl.arange(0, BO)
    if RESIDENT:
        j = column[None, :] - column[:, None] // S * S
        inside = exists[:, None] & exists[None, :] & (j >= 0) & (j < S)
        quadratic = tl.load(a + (column[:, None] * S + j), inside, 0.0)
        w = tl.load(weight + (o[:, None] * C + column[None, :]), (o[:, None] < OUT) & exists[None, :], 0.0)
    constant = tl.load(b + column, exists, 0.0)
    for p in range(tl.program_id(0) // (BLOCKS * TILES) * BP, P, tl.num_programs(0) // (BLOCKS * TILES) * BP):
        row = p + tl.arange(0, BP)
        if RESIDENT:
            acc = tl.dot(load_rows(x, row, P, column, exists, C), quadratic)
            acc = tl.dot(load_rows(grad_y, row, P, o, o < OUT, OUT), w, acc)
        else:
            acc = tl.zeros((BP, BC), tl.float32)
            for k in range(TILES):
                c, c_exists = columns_of(block, k, C, WIDTH, BC)
                at = column[None, :] - c[:, None] // S * S
                within = c_exists[:, None] & exists[None, :] & (at >= 0) & (at < S)
                values = load_rows(x, row, P, c, c_exists, C)
                acc = tl.dot(values, tl.load(a + (c[:, None] * S + at), within, 0.0), acc)
            for k in range(0, OUT, BO):
                grad = load_rows(grad_y, row, P, k + o, k + o < OUT, OUT)
                at = (k + o[:, None]) * C + column[None, :]
                part = tl.load(weight + at, (k + o[:, None] < OUT) & exists[None, :], 0.0)
                acc = tl.dot(grad, part, acc)
        acc += constant[None, :]
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
        weight, gamma, shift, rest, inv_, w_cov, grad_folded, grad_bias, grad_weight, grad_gamma, grad_beta, grad_var,
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
        m = tl.load(shift + g * S + cj, cj < S, 0.0) + tl.load(rest + g * S + cj, cj < S, 0.0)
        effective = tl.load(grad_folded + at, mask, 0.0) - gb[:, None] * m[None, :]  # y = W' (x - m) + beta
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
        m = tl.load(shift + g * S + cj, cj < S, 0.0) + tl.load(rest + g * S + cj, cj < S, 0.0)
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

# What launches a compiled kernel, and the constants to call it with, by all that Triton would compile it by.
LAUNCHERS = {}


def launch(kernel, grid, *args, num_warps=4, num_stages=2, **constants):
    """Every launch of this module goes through here, which its tests count and compile."""
    device = args[0].get_device()
    if device < 0 or device == torch.cuda.current_device():
        launch_here(kernel, grid, device, args, constants, num_warps, num_stages)
    else:
        with torch.cuda.device(device):
            launch_here(kernel, grid, device, args, constants, num_warps, num_stages)


def launch_here(kernel, grid, device, args, constants, num_warps, num_stages):
    """Launch on the current device: first by Triton, whose way to the compiled kernel takes time, then without.

    On NVIDIA's cards Triton compiles anew for other dtypes and constants, for whether an integer is 1, large, or a
    multiple of 16, and for whether a pointer is one. Integers are in the key by value; pointers that are none, which
    torch makes only as views, always go by Triton. AMD's backend looks at sizes too, and keeps to Triton.
    """
    addresses, key = 0, [kernel.fn, grid, device, num_warps, num_stages, *constants.items()]
    for value in args:
        if isinstance(value, torch.Tensor):
            addresses |= value.data_ptr()
            key.append(value.dtype)
        else:
            key.append(float if type(value) is float else (type(value), value))
    key = tuple(key)
    aligned = addresses % 16 == 0
    if aligned and key in LAUNCHERS:
        launcher, rest = LAUNCHERS[key]
        launcher(*args, *rest)
        return
    compiled = kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
    if aligned and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == 'cuda':
        # It takes all of the kernel's arguments in order, and three dimensions of a grid.
        rest = [constants[name] for name in kernel.arg_names[len(args):]]
        LAUNCHERS[key] = compiled[(*grid, 1, 1)[:3]], rest


def cdiv(a: int, b: int) -> int:
    """Triton's, made for kernels too, takes thirty times as long; so does its `next_power_of_2`."""
    return -(-a // b)


def power_of_2(n: int, least: int = 16) -> int:
    """The block for n columns: `tl.dot` takes 16 or more."""
    return max(least, 1 << (n - 1).bit_length())


def tiles(channels: int, groups: int, widest: int = WIDEST) -> dict:
    """How the columns are cut: blocks of WIDTH, whole groups, in tiles of BC."""
    size = channels // groups
    if size > widest:
        return dict(WIDTH=size, BC=WIDEST)
    width = size * min(groups, widest // size)
    return dict(WIDTH=width, BC=power_of_2(width))


@lru_cache
def card(device: torch.device) -> Tuple[int, int]:
    """Processors, and bytes of shared memory that a program may take."""
    if device.type != 'cuda':
        return 2, 2 ** 16
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, 'shared_memory_per_block_optin', properties.shared_memory_per_block)
    return properties.multi_processor_count, shared


def parts_of(positions: int, n_tiles: int, each: int, block: int, device: torch.device) -> Tuple[int, int]:
    """Into how many parts a sum over positions is split, `each` programs a processor, and the positions of each."""
    parts = max(1, min(cdiv(each * card(device)[0], n_tiles), positions // 128))
    rows = cdiv(cdiv(positions, parts), block) * block
    return cdiv(positions, rows), rows


def programs(positions: int, n_tiles: int, block: int, each: Optional[int], device: torch.device) -> Tuple[int]:
    """The grid of a pass that writes activations: `each` programs a processor, or None for one a block."""
    blocks = cdiv(positions, block)
    return n_tiles * (blocks if each is None else min(blocks, cdiv(each * card(device)[0], n_tiles))),


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
    cut = tiles(channels, groups, 64 if size <= 64 else WIDEST)
    n_blocks, n_tiles = cdiv(channels, cut['WIDTH']), cdiv(cut['WIDTH'], cut['BC'])
    n_pairs = n_tiles * (n_tiles + 1) // 2
    block, each = (32, 1) if cut['BC'] > 64 else (64, 2)
    parts, rows = parts_of(positions, n_blocks * n_pairs, each, block, x.device)
    products, sums = rest.new_empty(parts, channels, size), rest.new_empty(parts, channels)
    launch(moments_kernel, (n_blocks * n_tiles ** 2, parts), x, shift, products, sums, positions, rows,
           C=channels, S=size, **cut, BP=block, num_warps=8 if cut['BC'] > 64 else 4, num_stages=3)
    block = min(128, power_of_2(size))
    launch(covariances_kernel, (channels, cdiv(size, block)), products, sums, rest, cov, parts, positions,
           C=channels, S=size, BK=64, BS=block)
    return shift, rest, cov


def fold_outputs(weight, gamma, beta, shift, rest, cov, running_mean, running_var, eps, momentum, unbiased, dtype):
    out, groups, size = weight.shape[0], cov.shape[0], cov.shape[2]
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
    block = min(64, power_of_2(size))
    launch(fold_kernel, (cdiv(out, 16), groups), weight.contiguous(), gamma, beta, shift, rest, cov,
           running_mean, running_var, *made, eps, momentum, unbiased, C=groups * size, OUT=out, S=size,
           AFFINE=gamma is not None, TRACK=running_mean is not None, BO=16, BS=block,
           num_warps=8 if 32 < size <= 64 else 4)
    return made


def convolve_outputs(x, weight, bias, relu):
    return torch.empty(
        (x.shape[0], weight.shape[0], *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@operator(convolve_outputs)
def triton_convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, relu: bool) -> torch.Tensor:
    y = convolve_outputs(x, weight, bias, relu)
    positions, channels, out = count_positions(x), x.shape[1], weight.shape[0]
    stages, rows, block, resident = 3, 64, min(128, power_of_2(out)), power_of_2(channels)
    each = 2 if channels <= 128 else 1
    if resident > 256 or 2 * resident * (block + stages * rows) > card(x.device)[1]:
        resident, each = 64, None
    grid = programs(positions, cdiv(out, block), rows, each, x.device)
    launch(convolve_kernel, grid, x, weight, bias, y, positions, C=channels, OUT=out, G=bias.shape[0], RELU=relu,
           BP=rows, BO=block, BC=resident, num_stages=stages)
    return y


def weight_gradient_outputs(grad_y, x):
    out, channels = grad_y.shape[1], x.shape[1]
    return torch.empty(out * channels + out, dtype=torch.float32, device=x.device)


@operator(weight_gradient_outputs)
def triton_weight_gradient(grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    total = weight_gradient_outputs(grad_y, x)
    positions, channels, out = count_positions(x), x.shape[1], grad_y.shape[1]
    stages, rows, block_o, block_c, each = 3, 64, min(128, power_of_2(out)), min(128, power_of_2(channels, 32)), 1
    if out * channels > 2 ** 16:
        block_o, each = 64, 3
    elif max(block_o, block_c) <= 64:
        each = 2
    if 2 * stages * rows * (block_o + block_c) > card(x.device)[1]:
        rows = 32
    n_tiles = cdiv(out, block_o) * cdiv(channels, block_c)
    parts, part = parts_of(positions, n_tiles, each, rows, x.device)
    sums = total.new_empty(parts, total.shape[0])
    launch(weight_gradient_kernel, (n_tiles, parts), grad_y, x, sums, positions, part,
           C=channels, OUT=out, BP=rows, BO=block_o, BC=block_c, num_warps=8 if block_o > 64 else 4, num_stages=stages)
    launch(add_parts_kernel, (cdiv(total.shape[0], 64),), sums, total, parts, N=total.shape[0], BK=32, BN=64,
           num_warps=2)
    return total


def unfold_outputs(weight, gamma, shift, rest, inv, w_cov, grad_folded, grad_bias):
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    like = inv if gamma is None else gamma
    return grad_weight, like.new_empty(inv.numel()), like.new_empty(inv.numel()), torch.empty_like(inv)


@operator(unfold_outputs)
def triton_unfold(
        weight: torch.Tensor, gamma: Optional[torch.Tensor], shift: torch.Tensor, rest: torch.Tensor,
        inv: torch.Tensor, w_cov: torch.Tensor, grad_folded: torch.Tensor, grad_bias: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    made = unfold_outputs(weight, gamma, shift, rest, inv, w_cov, grad_folded, grad_bias)
    out, groups, size = w_cov.shape
    launch(unfold_kernel, (cdiv(out, 8), groups), weight.contiguous(), gamma, shift, rest, inv, w_cov,
           grad_folded, grad_bias, *made, C=groups * size, OUT=out, S=size, AFFINE=gamma is not None,
           BO=8, BS=min(128, power_of_2(size)))
    return made


def input_terms_outputs(weight, folded, shift, rest, grad_var, grad_bias, total, count):
    channels, groups = weight.shape[1], grad_var.shape[0]
    return folded.new_empty(groups, channels // groups, channels // groups), torch.empty_like(rest)


@operator(input_terms_outputs)
def triton_input_terms(
        weight: torch.Tensor, folded: torch.Tensor, shift: torch.Tensor, rest: torch.Tensor, grad_var: torch.Tensor,
        grad_bias: torch.Tensor, total: Optional[torch.Tensor], count: int) -> Tuple[torch.Tensor, torch.Tensor]:
    a, b = input_terms_outputs(weight, folded, shift, rest, grad_var, grad_bias, total, count)
    groups, size = a.shape[0], a.shape[2]
    block = min(128, power_of_2(size))
    launch(input_terms_kernel, (cdiv(size, 16), groups), weight.contiguous(), folded, shift, rest, grad_var,
           grad_bias, a, b, count if total is None else total, C=groups * size, OUT=weight.shape[0], S=size,
           COUNT_IS_TENSOR=total is not None, BI=16, BO=32 if block > 64 else 64, BS=block,
           num_warps=8 if block == 64 else 4)
    return a, b


def input_gradient_outputs(grad_y, x, weight, a, b):
    return torch.empty_like(x, memory_format=torch.channels_last)


@operator(input_gradient_outputs)
def triton_input_gradient(
        grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    grad_x = input_gradient_outputs(grad_y, x, weight, a, b)
    positions, channels, out, groups = count_positions(x), x.shape[1], weight.shape[0], a.shape[0]
    stages, rows, resident, each, warps = 3, 64, power_of_2(out), 1, 4
    for widest in (WIDEST, 64):
        cut = tiles(channels, groups, widest)
        width = cut['BC']
        shared = 2 * (width * (width + resident) + stages * rows * (width + resident))
        if resident <= 256 and cut['WIDTH'] <= width and shared <= card(x.device)[1]:
            break
    else:
        cut = tiles(channels, groups)
        if cut['WIDTH'] % 2:
            cut = tiles(channels, groups, 64)
        each, warps = None, 8 if cut['BC'] > 32 else 4
        # A group in several tiles takes more shared memory, odd columns and cards before Hopper more registers.
        small = cut['WIDTH'] > cut['BC'] or cut['WIDTH'] % 2 or card(x.device)[1] < 200 * 1024
        stages, rows, resident = (2, 64, 32) if small else (3, 128, 64)
    n_tiles = cdiv(channels, cut['WIDTH']) * cdiv(cut['WIDTH'], cut['BC'])
    launch(input_gradient_kernel, programs(positions, n_tiles, rows, each, x.device), grad_y, x, weight, a, b, grad_x,
           positions, C=channels, OUT=out, S=a.shape[2], **cut, BP=rows, BO=resident, num_warps=warps,
           num_stages=stages)
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
        self.x = x
        if grad_y is not None:
            grad_y = grad_y.contiguous(memory_format=torch.channels_last)
            # By itself it takes less time than inside both passes that read the result.
            self.grad_y = grad_y if y is None else torch.ops.aten.threshold_backward(grad_y, y, 0)

    def moments(self, groups: int, dtype: torch.dtype):
        """`shift`, `rest`, `cov` as from `TorchPasses`, in float32 whatever `dtype` is."""
        return triton_moments(self.x, groups)

    def convolve(self, weight: torch.Tensor, bias: torch.Tensor, relu: bool) -> torch.Tensor:
        """`W' x + b'`, or its ReLU; the bias `(G, out)` as from `TritonAlgebra.fold`."""
        return triton_convolve(self.x, weight, bias, relu)

    def weight_gradient(self, out: int, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        """`sum dy x^T` `(out, C)` and `sum dy` `(out,)` in float32."""
        channels = self.x.shape[1]
        products, sums = triton_weight_gradient(self.grad_y, self.x).split((out * channels, out))
        return products.view(out, channels), sums

    def input_gradient(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`W'^T dy + A x + b`."""
        return triton_input_gradient(self.grad_y, self.x, weight, a, b)


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
    def unfold(weight, gamma, shift, rest, inv, w_cov, grad_folded, grad_bias):
        grad_weight, grad_gamma, grad_beta, grad_var = triton_unfold(
            weight, gamma, shift, rest, inv, w_cov, grad_folded, grad_bias)
        if gamma is None:
            grad_gamma = grad_beta = None
        return grad_weight, grad_gamma, grad_beta, grad_var

    @staticmethod
    def input_terms(weight, folded, shift, rest, grad_var, grad_bias, count):
        total, count = (count, 0) if isinstance(count, torch.Tensor) else (None, count)
        return triton_input_terms(weight, folded, shift, rest, grad_var, grad_bias, total, count)
