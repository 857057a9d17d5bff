"""Launch a kernel of Triton in little of the host's time: without a graph the host is what a small layer waits for."""
from typing import Sequence, Tuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

__all__ = ['Plan']


class Plan:
    """A kernel with its grid and all by which Triton compiles it, but for its tensors' dtypes.

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
        self.launchers = {}  # by device and dtypes

    def launch(self, tensors: Sequence[Tensor], floats: Sequence[float] = ()) -> None:
        """Launch it on the current stream of the tensors' device."""
        device, floats = tensors[0].get_device(), [*map(float, floats)]  # of an integer Triton would compile anew
        if device < 0 or device == torch.cuda.current_device():
            self.launch_here(device, tensors, floats)
        else:
            with torch.cuda.device(device):
                self.launch_here(device, tensors, floats)

    def launch_here(self, device: int, tensors: Sequence[Tensor], floats: Sequence[float]) -> None:
        addresses = [tensor.data_ptr() for tensor in tensors]
        aligned = not any([address % 16 for address in addresses])
        # All devices, as it is Triton that notices a tensor of another one.
        key = *[tensor.dtype for tensor in tensors], *[tensor.get_device() for tensor in tensors]
        launcher = self.launchers.get(key) if aligned else None
        if launcher is not None:
            compiled, run, constants = launcher
            # Of a number Triton's launcher does not ask the driver, as it does of each tensor, whether it is a pointer.
            run(*self.three, driver.active.get_current_stream(device), compiled.function, compiled.packed_metadata,
                None, None, None, *addresses, *self.integers, *floats, *constants)
            return
        compiled = self.kernel[self.grid](*tensors, *self.integers, *floats, **self.constants, **self.options)
        if aligned and isinstance(compiled, CompiledKernel) and compiled.metadata.target.backend == 'cuda':
            names = self.kernel.arg_names[len(tensors) + len(self.integers) + len(floats):]
            self.launchers[key] = compiled, compiled.run, [self.constants[name] for name in names]
