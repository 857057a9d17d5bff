"""The moment form in Triton for half precision in channels_last: four launches forward, four or five backward.

triton_kernels.py contains the kernels, and triton_launch.py launches them. This file contains plans, which set the
grids and block sizes and are made once for each shape; operators, which launch the plans and are opaque to
torch.compile; and `TritonPasses` and `TritonAlgebra`, which have the interfaces of `TorchPasses` and `TorchAlgebra`.

There is no shifted copy of `x`. In half precision a large channel mean would cost accuracy, so means are handled in
float32: `moments_kernel` subtracts the shift from each value as it is loaded, the products that make `y` and `grad_x`
get a float32 bias, and the mean's part is subtracted from the complete sums of the weight's gradient. The fifth launch
backward is the gradient of a ReLU.
"""
from functools import lru_cache, partial
from operator import attrgetter
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .moment_form import track
from .torch_passes import relu_gradient
from .triton_kernels import (
    convolve_kernel, covariances_kernel, fold_kernel, input_gradient_kernel, input_terms_kernel, moments_kernel,
    unfold_kernel, weight_gradient_kernel)
from .triton_launch import Plan

__all__ = ['TritonAlgebra', 'TritonPasses']


# ---------------------------------------------------------------------------------------------------------------------
# Plans. Blocks, warps and stages are the fastest of about 5,000 settings tried on an H200 with finet_large's layers.

MAX_TILE = 128  # columns
# The cache of one kernel's plans is limited, because training on ever new shapes would fill the memory. The last
# arguments of each `plan_...`, `kinds`, are the dtypes and devices of the tensors that the plan is for.
keep = lru_cache(4096)


class Card(NamedTuple):
    processors: int
    shared: int  # bytes of shared memory that a program may take


@lru_cache
def card(device: torch.device) -> Card:
    if device.type != 'cuda':
        return Card(2, 2 ** 16)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, 'shared_memory_per_block_optin', properties.shared_memory_per_block)
    return Card(properties.multi_processor_count, shared)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int, minimum: int = 16) -> int:
    """Return the block size for n columns; `tl.dot` takes 16 or more."""
    return max(minimum, 1 << (n - 1).bit_length())


def tiles(channels: int, groups: int, max_tile: int = MAX_TILE) -> dict:
    """Return the widths of blocks and tiles, `WIDTH` and `BC`: a block is one or more whole groups, cut into tiles."""
    size = channels // groups
    if size > max_tile:
        return dict(WIDTH=size, BC=MAX_TILE)
    width = size * min(groups, max_tile // size)
    return dict(WIDTH=width, BC=power_of_2(width))


def split_positions(positions: int, n_tiles: int, occupancy: int, block: int, card: Card) -> Tuple[int, int]:
    """Return into how many splits a sum over positions is cut, and the rows of each.

    There are about `occupancy` programs a multiprocessor, or fewer if a split would have fewer than 128 positions.
    """
    splits = max(1, min(cdiv(occupancy * card.processors, n_tiles), positions // 128))
    rows = cdiv(cdiv(positions, splits), block) * block
    return cdiv(positions, rows), rows


def persistent_grid(positions: int, n_tiles: int, block: int, occupancy: Optional[int], card: Card) -> Tuple[int]:
    """Return the grid of a pass that writes activations.

    It has `occupancy` programs a multiprocessor, or one program a block if `occupancy` is None.
    """
    blocks = cdiv(positions, block)
    if occupancy is not None:
        blocks = min(blocks, cdiv(occupancy * card.processors, n_tiles))
    return n_tiles * blocks,


@keep
def plan_moments(positions: int, channels: int, groups: int, card: Card, *kinds) -> Tuple[Plan, Plan, int]:
    """Return the plans of both kernels and the number of splits."""
    size = channels // groups
    cut = tiles(channels, groups, 64 if size <= 64 else MAX_TILE)
    n_blocks, n_tiles = cdiv(channels, cut['WIDTH']), cdiv(cut['WIDTH'], cut['BC'])
    n_pairs = n_tiles * (n_tiles + 1) // 2
    block, occupancy, warps = (32, 1, 8) if cut['BC'] > 64 else (64, 2, 4)
    splits, split_rows = split_positions(positions, n_blocks * n_pairs, occupancy, block, card)
    moments = Plan(moments_kernel, (n_blocks * n_tiles ** 2, splits), positions, split_rows,
                   C=channels, SIZE=size, **cut, BP=block, num_warps=warps, num_stages=3)
    block = min(128, power_of_2(size))
    covariances = Plan(covariances_kernel, (channels, cdiv(size, block)), splits, positions,
                       C=channels, SIZE=size, BK=64, BS=block)
    return moments, covariances, splits


@keep
def plan_fold(out: int, groups: int, size: int, affine: bool, track: bool, *kinds) -> Plan:
    return Plan(fold_kernel, (cdiv(out, 16), groups), C=groups * size, OUT=out, SIZE=size, AFFINE=affine, TRACK=track,
                BO=16, BS=min(64, power_of_2(size)), num_warps=8 if 32 < size <= 64 else 4)


@keep
def plan_convolve(positions: int, channels: int, out: int, groups: int, relu: bool, card: Card, *kinds) -> Plan:
    stages, rows, block_o, block_c = 3, 64, min(128, power_of_2(out)), power_of_2(channels)
    occupancy = 2 if channels <= 128 else 1
    if block_c > 256 or 2 * block_c * (block_o + stages * rows) > card.shared:  # too large to keep the weight
        block_c, occupancy = 64, None
    grid = persistent_grid(positions, cdiv(out, block_o), rows, occupancy, card)
    return Plan(convolve_kernel, grid, positions, C=channels, OUT=out, G=groups, RELU=relu,
                BP=rows, BO=block_o, BC=block_c, num_stages=stages)


@keep
def plan_weight_gradient(positions: int, channels: int, out: int, card: Card, *kinds) -> Tuple[Plan, int]:
    """Return the plan and the number of splits."""
    stages, rows, block_o, block_c = 3, 64, min(128, power_of_2(out)), min(128, power_of_2(channels, 32))
    occupancy = 1
    if out * channels > 2 ** 16:
        block_o, occupancy = 64, 3
    elif max(block_o, block_c) <= 64:
        occupancy = 2
    if 2 * stages * rows * (block_o + block_c) > card.shared:
        rows = 32
    n_tiles = cdiv(out, block_o) * cdiv(channels, block_c)
    splits, split_rows = split_positions(positions, n_tiles, occupancy, rows, card)
    return Plan(weight_gradient_kernel, (n_tiles, splits), positions, split_rows, C=channels, OUT=out,
                BP=rows, BO=block_o, BC=block_c, num_warps=8 if block_o > 64 else 4, num_stages=stages), splits


@keep
def plan_unfold(splits: int, out: int, groups: int, size: int, affine: bool, *kinds) -> Plan:
    block = min(128, power_of_2(size))
    return Plan(unfold_kernel, (cdiv(out, 4), groups), splits, C=groups * size, OUT=out, SIZE=size, AFFINE=affine,
                BK=min(64, 1024 // block), BO=4, BS=block)


@keep
def plan_input_terms(out: int, groups: int, size: int, count: Optional[int], *kinds) -> Plan:
    """Return the plan. `count` is None if the kernel gets it as a tensor."""
    block = min(128, power_of_2(size))
    return Plan(input_terms_kernel, (cdiv(size, 16), groups), *([] if count is None else [count]),
                C=groups * size, OUT=out, SIZE=size, COUNT_IS_TENSOR=count is None,
                BI=16, BO=32 if block > 64 else 64, BS=block, num_warps=8 if block == 64 else 4)


@keep
def plan_input_gradient(positions: int, channels: int, out: int, groups: int, card: Card, *kinds) -> Plan:
    stages, rows, block_o, occupancy, warps = 3, 64, power_of_2(out), 1, 4
    for max_tile in (MAX_TILE, 64):
        cut = tiles(channels, groups, max_tile)
        width = cut['BC']
        shared = 2 * (width * (width + block_o) + stages * rows * (width + block_o))
        if block_o <= 256 and cut['WIDTH'] <= width and shared <= card.shared:
            break
    else:  # too large to keep the weight and A
        cut = tiles(channels, groups)
        if cut['WIDTH'] % 2:
            cut = tiles(channels, groups, 64)
        occupancy, warps = None, 8 if cut['BC'] > 32 else 4
        # A group in several tiles takes more shared memory; an odd width or a GPU before Hopper takes more registers.
        small = cut['WIDTH'] > cut['BC'] or cut['WIDTH'] % 2 or card.shared < 200 * 1024
        stages, rows, block_o = (2, 64, 32) if small else (3, 128, 64)
    n_tiles = cdiv(channels, cut['WIDTH']) * cdiv(cut['WIDTH'], cut['BC'])
    grid = persistent_grid(positions, n_tiles, rows, occupancy, card)
    return Plan(input_gradient_kernel, grid, positions, C=channels, OUT=out, SIZE=channels // groups, **cut,
                BP=rows, BO=block_o, num_warps=warps, num_stages=stages)


# ---------------------------------------------------------------------------------------------------------------------
# Operators. Each launches the kernel of its name. A sum over positions takes two launches: one computes the parts, the
# next adds them. Both are in one operator, because torch.compile could not know the number of parts.

def kinds(*tensors: Tensor) -> list:
    """Return the dtypes and devices of tensors that the user made.

    Those of all other tensors follow from `x`; autograd ensures this for gradients.
    """
    return [*map(attrgetter('dtype'), tensors), *map(Tensor.get_device, tensors)]


LIBRARY = torch.library.Library('timm_finet', 'FRAGMENT')


def operator(*outputs):
    """Turn a function that launches kernels into an operator that is opaque to torch.compile.

    Eager code calls the function itself. `outputs` are the names of the arguments that the function writes to.
    """
    def wrap(function):
        # `torch.library.custom_op` would do the same, but each call would take several times the host time.
        name = function.__name__
        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=outputs))
        for device in 'CPU', 'CUDA':
            LIBRARY.impl(name, function, device)
        torch.library.register_fake(f'timm_finet::{name}', lambda *args: None, lib=LIBRARY)
        op = getattr(torch.ops.timm_finet, name).default

        def call(*args):
            (op if torch.compiler.is_compiling() else function)(*args)
        return call
    return wrap


def sizes(x: Tensor) -> Tuple[int, int]:
    """Return the numbers of positions and channels."""
    n, channels, height, width = x.shape
    return n * height * width, channels


def empty_activation(x: Tensor, channels: int) -> Tensor:
    """Return an empty tensor with the positions of `x`, in channels_last."""
    n, _, height, width = x.shape
    # Inductor fills the tensors that `torch.empty` makes in that format, and `empty_permuted` takes more host time.
    return x.new_empty_strided((n, channels, height, width), (height * width * channels, 1, width * channels, channels))


@operator('shift', 'shifted_mean', 'cov')
def triton_moments(x: Tensor, shift: Tensor, shifted_mean: Tensor, cov: Tensor) -> None:
    groups, size, _ = cov.shape
    moments, covariances, splits = plan_moments(*sizes(x), groups, card(x.device), x.dtype, x.device)
    products, sums = cov.new_empty(splits, x.shape[1], size), cov.new_empty(splits, x.shape[1])
    moments.launch(x, shift, products, sums)
    covariances.launch(products, sums, shifted_mean, cov)


@operator('folded', 'bias', 'mean', 'var', 'batches', 'inv_std', 'w_cov')
def triton_fold(
        weight: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor], shift: Tensor, shifted_mean: Tensor,
        cov: Tensor, folded: Tensor, bias: Tensor, mean: Tensor, var: Tensor, batches: Optional[Tensor],
        inv_std: Tensor, w_cov: Tensor, eps: float, momentum: float, unbiased: float,
) -> None:
    affine, track = gamma is not None, batches is not None
    if not affine:
        gamma = beta = shift  # not read by the kernel
    if not track:
        batches = shift
    plan_fold(*w_cov.shape, affine, track, *kinds(weight, gamma, beta, folded, mean, var, batches)).launch(
        weight.contiguous(), gamma.contiguous(), beta.contiguous(), shift, shifted_mean, cov, folded, bias, mean, var,
        batches, inv_std, w_cov, floats=(float(eps), float(momentum), unbiased))


@operator('y')
def triton_convolve(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, y: Tensor) -> None:
    out, groups = weight.shape[0], bias.shape[0]
    plan_convolve(*sizes(x), out, groups, relu, card(x.device), x.dtype, x.device).launch(x, weight, bias, y)


def weight_gradient_parts(grad_y: Tensor, x: Tensor) -> Tensor:
    """Return `sum dy x^T` `(out, C)` followed by `sum dy` `(out,)`, as one row for each split of the positions."""
    (positions, channels), out = sizes(x), grad_y.shape[1]
    plan, splits = plan_weight_gradient(positions, channels, out, card(x.device), x.dtype, x.device)
    parts = x.new_empty(splits, out * channels + out, dtype=torch.float32)
    plan.launch(grad_y, x, parts)
    return parts


@operator('grad_weight', 'grad_gamma', 'grad_beta', 'grad_var', 'grad_bias')
def triton_unfold(
        weight: Tensor, gamma: Optional[Tensor], shift: Tensor, shifted_mean: Tensor, inv_std: Tensor, w_cov: Tensor,
        grad_y: Tensor, x: Tensor, grad_weight: Tensor, grad_gamma: Tensor, grad_beta: Tensor, grad_var: Tensor,
        grad_bias: Tensor) -> None:
    parts = weight_gradient_parts(grad_y, x)
    affine, gamma = gamma is not None, shift if gamma is None else gamma.contiguous()  # shift is not read
    plan_unfold(parts.shape[0], *w_cov.shape, affine, *kinds(weight, gamma)).launch(
        weight.contiguous(), gamma, shift, shifted_mean, inv_std, w_cov, parts,
        grad_weight, grad_gamma, grad_beta, grad_var, grad_bias)


@operator('a', 'b')
def triton_input_terms(
        weight: Tensor, folded: Tensor, shift: Tensor, shifted_mean: Tensor, grad_var: Tensor, grad_bias: Tensor,
        count_tensor: Optional[Tensor], count: int, a: Tensor, b: Tensor) -> None:
    groups, size, _ = a.shape
    counts, count = ([], count) if count_tensor is None else ([count_tensor], None)
    plan_input_terms(weight.shape[0], groups, size, count, *kinds(weight, folded, *counts)).launch(
        weight.contiguous(), folded, shift, shifted_mean, grad_var, grad_bias, a, b, *counts)


@operator('grad_x')
def triton_input_gradient(grad_y: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, grad_x: Tensor) -> None:
    plan = plan_input_gradient(*sizes(x), weight.shape[0], a.shape[0], card(x.device), x.dtype, x.device)
    plan.launch(grad_y, x, weight, a, b, grad_x)


def adds_up(device: torch.device) -> bool:
    """Whether a kernel compiles, launches through Triton and directly, and computes mean and variance of 1 and 3."""
    products, sums = torch.tensor([[1.], [9.]], device=device), torch.tensor([[1.], [3.]], device=device)
    mean, cov = torch.empty(2, 4, device=device).unbind()
    plan = Plan(covariances_kernel, (1, 1), 2, 2, C=1, SIZE=1, BK=16, BS=16)
    results = []
    for _ in range(2):
        plan.launch(products, sums, mean.zero_(), cov.zero_())
        results.append((mean[0].item(), cov[0].item()))
    return results == [(2., 1.), (2., 1.)]


# ---------------------------------------------------------------------------------------------------------------------
# The interfaces of TorchPasses and TorchAlgebra

class TritonPasses:
    """The passes over one layer's input `x`, channels_last and not empty; arguments as for `TorchPasses`."""

    def __init__(
            self,
            x: Tensor,
            shift: Optional[Tensor] = None,
            grad_y: Optional[Tensor] = None,
            y: Optional[Tensor] = None,
    ):
        self.x = x
        if grad_y is not None:
            grad_y = grad_y.contiguous(memory_format=torch.channels_last)
            # A separate launch takes less time than computing this in both passes that read the result.
            self.grad_y = grad_y if y is None else relu_gradient(grad_y, y)

    def moments(self, groups: int, dtype: torch.dtype) -> Tuple[Tensor, Tensor, Tensor]:
        """Return `shift`, `shifted_mean` and `cov` as `TorchPasses` does, but always in float32."""
        channels = self.x.shape[1]
        new = partial(self.x.new_empty, dtype=torch.float32)
        moments = new(channels), new(channels), new(groups, channels // groups, channels // groups)
        triton_moments(self.x, *moments)
        return moments

    def convolve(self, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        """Return `W' x + b'`, or its ReLU; the bias is `(G, out)`, as `TritonAlgebra.fold` returns it."""
        y = empty_activation(self.x, weight.shape[0])
        triton_convolve(self.x, weight, bias, relu, y)
        return y

    def weight_gradient(self, out: int, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        """Return `dy` and `x`.

        `TritonAlgebra.unfold` computes the sums from them, because one operator must make the parts and add them.
        """
        return self.grad_y, self.x

    def input_gradient(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return `W'^T dy + A x + b`."""
        grad_x = empty_activation(self.x, self.x.shape[1])
        triton_input_gradient(self.grad_y, self.x, weight, a, b, grad_x)
        return grad_x


class TritonAlgebra:
    """The algebra of `TorchAlgebra` with one launch a method, for passes that take `x` itself, not `c`.

    The biases therefore account for the whole mean `m`, not only for `shifted_mean`.
    """

    @staticmethod
    def fold(weight, gamma, beta, shift, shifted_mean, cov, eps, dtype, running, count):
        out, (groups, size, _) = weight.shape[0], cov.shape
        folded = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        bias, inv_std, w_cov = cov.new_empty(groups, out), cov.new_empty(groups, out), cov.new_empty(out, groups, size)
        mean, var, momentum, batches = running or (None, None, 0., None)
        in_kernel = (
            batches is not None and batches.device == cov.device and not isinstance(count, Tensor)
            and torch.float64 not in (mean.dtype, var.dtype) and mean.is_contiguous() and var.is_contiguous())
        unbiased = count / (count - 1) if in_kernel else 1.
        if not in_kernel:
            mean, var, batches = torch.empty_like(bias), torch.empty_like(bias), None
        triton_fold(weight, gamma, beta, shift, shifted_mean, cov, folded, bias, mean, var, batches, inv_std, w_cov,
                    eps, momentum, unbiased)
        if running is not None and not in_kernel:
            track(running, mean, var * (count / (count - 1)))
        return folded, bias, mean, var, inv_std, w_cov

    @staticmethod
    def unfold(weight, gamma, shift, shifted_mean, inv_std, w_cov, sums):
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        like = inv_std if gamma is None else gamma
        grad_gamma, grad_beta = like.new_empty(inv_std.numel()), like.new_empty(inv_std.numel())
        grad_var, grad_bias = torch.empty_like(inv_std), inv_std.new_empty(weight.shape[0])
        triton_unfold(weight, gamma, shift, shifted_mean, inv_std, w_cov, *sums,
                      grad_weight, grad_gamma, grad_beta, grad_var, grad_bias)
        if gamma is None:  # the kernel has not written them
            grad_gamma = grad_beta = None
        return grad_weight, grad_gamma, grad_beta, grad_var, grad_bias

    @staticmethod
    def input_terms(weight, folded, shift, shifted_mean, grad_var, grad_bias, count):
        groups, size = grad_var.shape[0], weight.shape[1] // grad_var.shape[0]
        a, b = folded.new_empty(groups, size, size), torch.empty_like(shifted_mean)
        count_tensor, count = (count, 0) if isinstance(count, Tensor) else (None, count)
        triton_input_terms(weight, folded, shift, shifted_mean, grad_var, grad_bias, count_tensor, count, a, b)
        return a, b
