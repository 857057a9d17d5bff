"""Launches Triton kernels in little host time, because host time limits small layers outside CUDA graphs."""
from functools import reduce
from operator import or_
from typing import Sequence, Tuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

__all__ = ['Plan']


class Plan:
    """A kernel, its grid and the settings with which Triton compiles it, for tensors of fixed dtypes and devices.

    The first launch goes through Triton, which is slow to find the compiled kernel; later launches call the compiled
    kernel's launcher directly. On NVIDIA's GPUs Triton compiles a kernel again for another dtype, another constant,
    another kind of integer (1, large, or a multiple of 16) and another alignment of a pointer (a multiple of 16 or
    not). In torch only views have pointers that are not a multiple of 16; launches with these always go through Triton.
    So do all launches on AMD's backend, which also looks at the tensors' sizes.

    Args:
        kernel: Its arguments are tensors, then integers, then floats, then constants.
        grid: The number of programs, in one or two dimensions.
        integers: The kernel's integer arguments, in order.
        num_warps, num_stages: As for Triton.
        constants: The kernel's constants, by name.
    """

    def __init__(self, kernel, grid: Tuple[int, ...], *integers: int, num_warps=4, num_stages=2, **constants):
        self.kernel, self.grid, self.integers, self.constants = kernel, grid, integers, constants
        self.options, self.three = dict(num_warps=num_warps, num_stages=num_stages), (*grid, 1, 1)[:3]
        self.launcher = None

    def launch(self, *tensors: Tensor, floats: Sequence[float] = ()) -> None:
        """Launch the kernel on the current stream of the tensors' device.

        The elements of `floats` must be of type `float`: for integers, Triton would compile the kernel again.
        """
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(*tensors, floats=floats)
        addresses = [*map(Tensor.data_ptr, tensors)]
        aligned = reduce(or_, addresses) % 16 == 0
        if aligned and self.launcher is not None:
            compiled, run, constants = self.launcher
            # Addresses save time: for each tensor, Triton's launcher would ask the driver if the GPU can access it.
            run(*self.three, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata,
                None, None, None, *addresses, *self.integers, *floats, *constants)
            return
        compiled = self.kernel[self.grid](*tensors, *self.integers, *floats, **self.constants, **self.options)
        if aligned and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == 'cuda':
            names = self.kernel.arg_names[len(tensors) + len(self.integers) + len(floats):]
            self.launcher = compiled, compiled.run, [self.constants[name] for name in names]
