"""Launch a kernel of Triton in little of the host's time: without a graph the host is what a small layer waits for."""
from functools import reduce
from operator import or_
from typing import Sequence, Tuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

__all__ = ['Plan']


class Plan:
    """A kernel with its grid and all by which Triton compiles it: a plan is for tensors of the same dtypes and devices.

    The first launch goes by Triton, which is slow to find the compiled kernel; later ones call what launches that one.
    On NVIDIA's cards Triton compiles anew for other dtypes, for other constants, for whether an integer is 1, large or
    a multiple of 16, and for whether a pointer is a multiple of 16. Pointers that are none, which torch makes only as
    views, always go by Triton, and so does AMD's backend, which looks at sizes too.

    Args:
        kernel: Its arguments are tensors, then integers, then floats, then constants.
        grid: Programs, in one or two dimensions.
        integers: The kernel's, in its order.
        num_warps, num_stages: As Triton has them.
        constants: By name.
    """

    def __init__(self, kernel, grid: Tuple[int, ...], *integers: int, num_warps=4, num_stages=2, **constants):
        self.kernel, self.grid, self.integers, self.constants = kernel, grid, integers, constants
        self.options, self.three = dict(num_warps=num_warps, num_stages=num_stages), (*grid, 1, 1)[:3]
        self.launcher = None

    def launch(self, *tensors: Tensor, floats: Sequence[float] = ()) -> None:
        """Launch it on the current stream of the tensors' device. (For integers as `floats` Triton would compile anew.)
        """
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(*tensors, floats=floats)
        addresses = [*map(Tensor.data_ptr, tensors)]
        aligned = reduce(or_, addresses) % 16 == 0
        if aligned and self.launcher is not None:
            compiled, run, constants = self.launcher
            # Of a number Triton's launcher does not ask the driver, as it does of each tensor, whether it is a pointer.
            run(*self.three, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata,
                None, None, None, *addresses, *self.integers, *floats, *constants)
            return
        compiled = self.kernel[self.grid](*tensors, *self.integers, *floats, **self.constants, **self.options)
        if aligned and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == 'cuda':
            names = self.kernel.arg_names[len(tensors) + len(self.integers) + len(floats):]
            self.launcher = compiled, compiled.run, [self.constants[name] for name in names]
