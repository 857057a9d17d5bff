"""The moment form in Triton for half precision in channels_last: four launches forward, five backward.

triton_kernels.py has the kernels. Here are their grids and block sizes; operators that launch them, into which
torch.compile does not look; and `TritonPasses` and `TritonAlgebra`, which have the interface of torch's.

There is no shifted copy of `x`. What a channel's mean would cost half precision is kept in float32 instead:
`moments_kernel` subtracts the shift from each value as it is loaded, the products that make `y` and `grad_x` get a
float32 bias, and the weight's gradient has the mean's part subtracted from its complete sums.
"""
from functools import lru_cache, partial
from typing import Optional, Tuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from .moment_form import track
from .torch_passes import relu_gradient
from .triton_kernels import (
    add_parts_kernel, convolve_kernel, covariances_kernel, fold_kernel, input_gradient_kernel, input_terms_kernel,
    moments_kernel, unfold_kernel, weight_gradient_kernel)

__all__ = ['TritonAlgebra', 'TritonPasses']


# ---------------------------------------------------------------------------------------------------------------------
# Launching

# By all that Triton would compile a kernel by: what launches the compiled one, and the constants to call it with.
LAUNCHERS = {}
MAX_LAUNCHERS = 4096  # a layer and batch shape takes nine


def launch(kernel, grid, *args, num_warps=4, num_stages=2, **constants):
    """Launch a kernel on the device of its first argument. Tests and scripts replace this to count and to compile."""
    device = args[0].get_device()
    if device < 0 or device == torch.cuda.current_device():
        launch_here(kernel, grid, device, args, constants, num_warps, num_stages)
    else:
        with torch.cuda.device(device):
            launch_here(kernel, grid, device, args, constants, num_warps, num_stages)


def launch_here(kernel, grid, device, args, constants, num_warps, num_stages):
    """Launch on the current device: the first time by Triton, which is slow to find the compiled kernel, then directly.

    On NVIDIA's cards Triton compiles anew for other dtypes and constants, for whether an integer is 1, large, or a
    multiple of 16, and for whether a pointer is a multiple of 16. Integers are in the key by value. Other pointers,
    which torch makes only as views, always go by Triton, and so does AMD's backend, which looks at sizes too.
    """
    addresses, key = 0, [kernel.fn, grid, device, num_warps, num_stages, *constants.items()]
    for value in args:
        if isinstance(value, Tensor):
            addresses |= value.data_ptr()
            key.append(value.dtype)
        else:
            key.append(float if type(value) is float else (type(value), value))
    key = tuple(key)
    aligned = addresses % 16 == 0
    known = LAUNCHERS.get(key) if aligned else None
    if known is not None:
        launcher, constant_args = known
        launcher(*args, *constant_args)
        return
    compiled = kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
    if aligned and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == 'cuda':
        if len(LAUNCHERS) >= MAX_LAUNCHERS:  # training on ever new shapes
            LAUNCHERS.clear()
        # It takes all of the kernel's arguments in order, and three dimensions of a grid.
        constant_args = [constants[name] for name in kernel.arg_names[len(args):]]
        LAUNCHERS[key] = compiled[(*grid, 1, 1)[:3]], constant_args


def operator(*outputs):
    """Make a function that launches kernels an operator, opaque to torch.compile; eager code calls it as it is.

    `outputs` are the names of the arguments that it writes to.
    """
    def wrap(function):
        op = torch.library.custom_op(f'timm_finet::{function.__name__}', function, mutates_args=outputs)

        def call(*args):
            (op if torch.compiler.is_compiling() else function)(*args)
        return call
    return wrap


# ---------------------------------------------------------------------------------------------------------------------
# Grids and blocks. Blocks, warps and stages are the fastest of some 5,000 tried on an H200 with finet_large's layers.

MAX_TILE = 128  # columns


def cdiv(a: int, b: int) -> int:
    """Triton's, made for kernels too, takes thirty times as long; so does its `next_power_of_2`."""
    return -(-a // b)


def power_of_2(n: int, minimum: int = 16) -> int:
    """The block for n columns: `tl.dot` takes 16 or more."""
    return max(minimum, 1 << (n - 1).bit_length())


def tiles(channels: int, groups: int, max_tile: int = MAX_TILE) -> dict:
    """`WIDTH` and `BC`: columns are cut into blocks of whole groups, and these into tiles."""
    size = channels // groups
    if size > max_tile:
        return dict(WIDTH=size, BC=MAX_TILE)
    width = size * min(groups, max_tile // size)
    return dict(WIDTH=width, BC=power_of_2(width))


@lru_cache
def card(device: torch.device) -> Tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may take."""
    if device.type != 'cuda':
        return 2, 2 ** 16
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, 'shared_memory_per_block_optin', properties.shared_memory_per_block)
    return properties.multi_processor_count, shared


def split_positions(positions: int, n_tiles: int, occupancy: int, block: int, device: torch.device) -> Tuple[int, int]:
    """Into how many splits a sum over positions goes, for `occupancy` programs a multiprocessor, and rows of each."""
    splits = max(1, min(cdiv(occupancy * card(device)[0], n_tiles), positions // 128))
    rows = cdiv(cdiv(positions, splits), block) * block
    return cdiv(positions, rows), rows


def persistent_grid(
        positions: int, n_tiles: int, block: int, occupancy: Optional[int], device: torch.device) -> Tuple[int]:
    """Of a pass that writes activations: `occupancy` programs a multiprocessor, or, for None, one a block."""
    blocks = cdiv(positions, block)
    if occupancy is not None:
        blocks = min(blocks, cdiv(occupancy * card(device)[0], n_tiles))
    return n_tiles * blocks,


def count_positions(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def empty_activation(x: Tensor, channels: int) -> Tensor:
    """For each position of `x`, in channels_last. (Inductor fills what `torch.empty` makes in that format.)"""
    n, _, height, width = x.shape
    return torch.empty_permuted((n, channels, height, width), (0, 2, 3, 1), dtype=x.dtype, device=x.device)


# ---------------------------------------------------------------------------------------------------------------------
# Operators. Each launches the kernel of its name; two of them launch another, which adds the partial sums.

@operator('shift', 'shifted_mean', 'cov')
def triton_moments(x: Tensor, shift: Tensor, shifted_mean: Tensor, cov: Tensor) -> None:
    positions, channels, (groups, size, _) = count_positions(x), x.shape[1], cov.shape
    cut = tiles(channels, groups, 64 if size <= 64 else MAX_TILE)
    n_blocks, n_tiles = cdiv(channels, cut['WIDTH']), cdiv(cut['WIDTH'], cut['BC'])
    n_pairs = n_tiles * (n_tiles + 1) // 2
    block, occupancy, warps = (32, 1, 8) if cut['BC'] > 64 else (64, 2, 4)
    splits, split_rows = split_positions(positions, n_blocks * n_pairs, occupancy, block, x.device)
    products, sums = cov.new_empty(splits, channels, size), cov.new_empty(splits, channels)
    launch(moments_kernel, (n_blocks * n_tiles ** 2, splits), x, shift, products, sums, positions, split_rows,
           C=channels, SIZE=size, **cut, BP=block, num_warps=warps, num_stages=3)
    block = min(128, power_of_2(size))
    launch(covariances_kernel, (channels, cdiv(size, block)), products, sums, shifted_mean, cov, splits, positions,
           C=channels, SIZE=size, BK=64, BS=block)


@operator('running_mean', 'running_var', 'folded', 'bias', 'mean', 'var', 'inv_std', 'w_cov')
def triton_fold(
        weight: Tensor, gamma: Optional[Tensor], beta: Optional[Tensor], shift: Tensor, shifted_mean: Tensor,
        cov: Tensor, running_mean: Optional[Tensor], running_var: Optional[Tensor], folded: Tensor, bias: Tensor,
        mean: Tensor, var: Tensor, inv_std: Tensor, w_cov: Tensor, eps: float, momentum: float, unbiased: float,
) -> None:
    out, groups, size = w_cov.shape
    launch(fold_kernel, (cdiv(out, 16), groups), weight.contiguous(), gamma, beta, shift, shifted_mean, cov,
           running_mean, running_var, folded, bias, mean, var, inv_std, w_cov, eps, momentum, unbiased,
           C=groups * size, OUT=out, SIZE=size, AFFINE=gamma is not None, TRACK=running_mean is not None,
           BO=16, BS=min(64, power_of_2(size)), num_warps=8 if 32 < size <= 64 else 4)


@operator('y')
def triton_convolve(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, y: Tensor) -> None:
    positions, channels, out = count_positions(x), x.shape[1], weight.shape[0]
    stages, rows, block_o, block_c = 3, 64, min(128, power_of_2(out)), power_of_2(channels)
    occupancy = 2 if channels <= 128 else 1
    if block_c > 256 or 2 * block_c * (block_o + stages * rows) > card(x.device)[1]:  # the weight cannot be kept
        block_c, occupancy = 64, None
    grid = persistent_grid(positions, cdiv(out, block_o), rows, occupancy, x.device)
    launch(convolve_kernel, grid, x, weight, bias, y, positions, C=channels, OUT=out, G=bias.shape[0], RELU=relu,
           BP=rows, BO=block_o, BC=block_c, num_stages=stages)


@operator('total')
def triton_weight_gradient(grad_y: Tensor, x: Tensor, total: Tensor) -> None:
    positions, channels, out = count_positions(x), x.shape[1], grad_y.shape[1]
    stages, rows, block_o, block_c = 3, 64, min(128, power_of_2(out)), min(128, power_of_2(channels, 32))
    occupancy = 1
    if out * channels > 2 ** 16:
        block_o, occupancy = 64, 3
    elif max(block_o, block_c) <= 64:
        occupancy = 2
    if 2 * stages * rows * (block_o + block_c) > card(x.device)[1]:
        rows = 32
    n_tiles = cdiv(out, block_o) * cdiv(channels, block_c)
    splits, split_rows = split_positions(positions, n_tiles, occupancy, rows, x.device)
    n = total.numel()
    sums = total.new_empty(splits, n)
    launch(weight_gradient_kernel, (n_tiles, splits), grad_y, x, sums, positions, split_rows,
           C=channels, OUT=out, BP=rows, BO=block_o, BC=block_c, num_warps=8 if block_o > 64 else 4, num_stages=stages)
    launch(add_parts_kernel, (cdiv(n, 64),), sums, total, splits, N=n, BK=32, BN=64, num_warps=2)


@operator('grad_weight', 'grad_gamma', 'grad_beta', 'grad_var')
def triton_unfold(
        weight: Tensor, gamma: Optional[Tensor], shift: Tensor, shifted_mean: Tensor, inv_std: Tensor, w_cov: Tensor,
        grad_folded: Tensor, grad_bias: Tensor, grad_weight: Tensor, grad_gamma: Tensor, grad_beta: Tensor,
        grad_var: Tensor) -> None:
    out, groups, size = w_cov.shape
    launch(unfold_kernel, (cdiv(out, 8), groups), weight.contiguous(), gamma, shift, shifted_mean, inv_std, w_cov,
           grad_folded, grad_bias, grad_weight, grad_gamma, grad_beta, grad_var,
           C=groups * size, OUT=out, SIZE=size, AFFINE=gamma is not None, BO=8, BS=min(128, power_of_2(size)))


@operator('a', 'b')
def triton_input_terms(
        weight: Tensor, folded: Tensor, shift: Tensor, shifted_mean: Tensor, grad_var: Tensor, grad_bias: Tensor,
        count_tensor: Optional[Tensor], count: int, a: Tensor, b: Tensor) -> None:
    groups, size, _ = a.shape
    block = min(128, power_of_2(size))
    launch(input_terms_kernel, (cdiv(size, 16), groups), weight.contiguous(), folded, shift, shifted_mean, grad_var,
           grad_bias, a, b, count if count_tensor is None else count_tensor,
           C=groups * size, OUT=weight.shape[0], SIZE=size, COUNT_IS_TENSOR=count_tensor is not None,
           BI=16, BO=32 if block > 64 else 64, BS=block, num_warps=8 if block == 64 else 4)


@operator('grad_x')
def triton_input_gradient(grad_y: Tensor, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, grad_x: Tensor) -> None:
    positions, channels, out, (groups, size, _) = count_positions(x), x.shape[1], weight.shape[0], a.shape
    stages, rows, block_o, occupancy, warps = 3, 64, power_of_2(out), 1, 4
    for max_tile in (MAX_TILE, 64):
        cut = tiles(channels, groups, max_tile)
        width = cut['BC']
        shared = 2 * (width * (width + block_o) + stages * rows * (width + block_o))
        if block_o <= 256 and cut['WIDTH'] <= width and shared <= card(x.device)[1]:
            break
    else:  # weight and A cannot be kept
        cut = tiles(channels, groups)
        if cut['WIDTH'] % 2:
            cut = tiles(channels, groups, 64)
        occupancy, warps = None, 8 if cut['BC'] > 32 else 4
        # A group in several tiles takes more shared memory, odd columns and cards before Hopper more registers.
        small = cut['WIDTH'] > cut['BC'] or cut['WIDTH'] % 2 or card(x.device)[1] < 200 * 1024
        stages, rows, block_o = (2, 64, 32) if small else (3, 128, 64)
    n_tiles = cdiv(channels, cut['WIDTH']) * cdiv(cut['WIDTH'], cut['BC'])
    grid = persistent_grid(positions, n_tiles, rows, occupancy, x.device)
    launch(input_gradient_kernel, grid, grad_y, x, weight, a, b, grad_x, positions,
           C=channels, OUT=out, SIZE=size, **cut, BP=rows, BO=block_o, num_warps=warps, num_stages=stages)


# ---------------------------------------------------------------------------------------------------------------------
# The interface of torch_passes.py and of TorchAlgebra

class TritonPasses:
    """The passes over one layer's input `x`, channels_last and with positions; arguments as for `TorchPasses`."""

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
            # A launch of its own takes less time than inside both passes that read the result.
            self.grad_y = grad_y if y is None else relu_gradient(grad_y, y)

    def moments(self, groups: int, dtype: torch.dtype) -> Tuple[Tensor, Tensor, Tensor]:
        """`shift`, `shifted_mean`, `cov` as from `TorchPasses`, in float32 whatever `dtype` is."""
        channels = self.x.shape[1]
        new = partial(self.x.new_empty, dtype=torch.float32)
        moments = new(channels), new(channels), new(groups, channels // groups, channels // groups)
        triton_moments(self.x, *moments)
        return moments

    def convolve(self, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
        """`W' x + b'`, or its ReLU; the bias `(G, out)` as from `TritonAlgebra.fold`."""
        y = empty_activation(self.x, weight.shape[0])
        triton_convolve(self.x, weight, bias, relu, y)
        return y

    def weight_gradient(self, out: int, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
        """`sum dy x^T` `(out, C)` and `sum dy` `(out,)` in float32."""
        channels = self.x.shape[1]
        total = self.x.new_empty(out * channels + out, dtype=torch.float32)
        triton_weight_gradient(self.grad_y, self.x, total)
        products, sums = total.split((out * channels, out))
        return products.view(out, channels), sums

    def input_gradient(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`W'^T dy + A x + b`."""
        grad_x = empty_activation(self.x, self.x.shape[1])
        triton_input_gradient(self.grad_y, self.x, weight, a, b, grad_x)
        return grad_x


class TritonAlgebra:
    """The algebra of `TorchAlgebra`, a launch a method, for passes that take `x` itself: biases hold its whole mean."""

    @staticmethod
    def fold(weight, gamma, beta, shift, shifted_mean, cov, eps, dtype, running, count):
        out, (groups, size, _) = weight.shape[0], cov.shape
        folded = torch.empty_like(weight, dtype=dtype, memory_format=torch.contiguous_format)
        bias, mean, var, inv_std = [cov.new_empty(groups, out) for _ in range(4)]
        results = folded, bias, mean, var, inv_std, cov.new_empty(out, groups, size)
        in_kernel = running is not None and not isinstance(count, Tensor)
        running_mean, running_var, momentum = running if in_kernel else (None, None, 0.)
        triton_fold(weight, gamma, beta, shift, shifted_mean, cov, running_mean, running_var, *results,
                    eps, momentum, count / (count - 1) if in_kernel else 1.)
        if running is not None and not in_kernel:
            track(running, mean, var, count)
        return results

    @staticmethod
    def unfold(weight, gamma, shift, shifted_mean, inv_std, w_cov, grad_folded, grad_bias):
        grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
        like = inv_std if gamma is None else gamma
        grad_gamma, grad_beta = like.new_empty(inv_std.numel()), like.new_empty(inv_std.numel())
        grad_var = torch.empty_like(inv_std)
        triton_unfold(weight, gamma, shift, shifted_mean, inv_std, w_cov, grad_folded, grad_bias,
                      grad_weight, grad_gamma, grad_beta, grad_var)
        if gamma is None:  # the kernel has not written them
            grad_gamma = grad_beta = None
        return grad_weight, grad_gamma, grad_beta, grad_var

    @staticmethod
    def input_terms(weight, folded, shift, shifted_mean, grad_var, grad_bias, count):
        groups, size = grad_var.shape[0], weight.shape[1] // grad_var.shape[0]
        a, b = folded.new_empty(groups, size, size), torch.empty_like(shifted_mean)
        count_tensor, count = (count, 0) if isinstance(count, Tensor) else (None, count)
        triton_input_terms(weight, folded, shift, shifted_mean, grad_var, grad_bias, count_tensor, count, a, b)
        return a, b
