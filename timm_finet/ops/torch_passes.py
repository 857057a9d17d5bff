"""The moment form's passes over the activations, in torch's own operators: any device, layout and dtype."""
from contextlib import contextmanager, nullcontext
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

__all__ = ['TorchPasses', 'has_autocast', 'memory_format', 'moments_dtype', 'without_autocast']


@torch.compiler.assume_constant_result  # torch 2.9 cannot trace the call
def has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def without_autocast(x: torch.Tensor):
    """For backward passes, whose dtypes are those of the forward pass.

    torch.compile would trace them under the autocast that surrounds the layer; some people call `backward()` in it.
    """
    device = x.device.type
    if has_autocast(device) and (torch.compiler.is_compiling() or torch.is_autocast_enabled(device)):
        return torch.autocast(device, enabled=False)
    return nullcontext()


@contextmanager
def full_precision(device: torch.device):
    """No TF32 or bfloat16 inside float32 products, whatever is switched on."""
    backend = torch.backends.cuda.matmul if device.type == 'cuda' else torch.backends.mkldnn.matmul
    previous = backend.fp32_precision
    backend.fp32_precision = 'ieee'
    try:
        yield
    finally:
        backend.fp32_precision = previous


def rows(x: torch.Tensor) -> torch.Tensor:
    """`(N, C, H, W)` as `(N * H * W, C)`: a view where the layout is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def group_products(c: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """`sum c_g c_g^T` over the positions of `c` `(N, C, H, W)`, in `dtype`: `(G, C/G, C/G)`."""
    c = rows(c)
    count, size = len(c), c.shape[1] // groups
    # A product sums its long side one by one: rounding grows with it. So parts are summed, then the parts.
    least = max(256, 4 * size) if c.dtype == dtype else max(256, 4 * c.shape[1], count // 64)
    parts = next(k for k in range(max(1, count // least), 0, -1) if count % k == 0)
    c = c.view(parts, count // parts, c.shape[1])
    if c.dtype != dtype:  # tensor cores take the products of all channels sooner than the host starts G of groups
        products = torch.bmm(c.mT, c, out_dtype=dtype).sum(0)
        return products.view(groups, size, groups, size).diagonal(0, 0, 2).permute(2, 0, 1).contiguous()
    with full_precision(c.device):
        return torch.stack([torch.bmm(part.mT, part).sum(0) for part in c.chunk(groups, 2)])


# An operator of its own for torch.compile, so that the precision is set when it runs, not when it is traced.
group_products_op = torch.library.custom_op('timm_finet::group_products', group_products, mutates_args=())


@group_products_op.register_fake
def _(c, groups, dtype):
    return c.new_empty(groups, c.shape[1] // groups, c.shape[1] // groups, dtype=dtype)


def memory_format(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def centred(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`x - shift`, by a whole image of `shift`: short inner loops over channels or pixels are slow."""
    return x - shift.view(-1, 1, 1).expand(x.shape[1:])[None].contiguous(memory_format=memory_format(x))


def moments_dtype(x: torch.Tensor, groups: int) -> torch.dtype:
    """Float32 at least; float64 where so few positions leave some z_g next to no variance, a difference of large terms.

    Only synchronised layers take moments of so few (`FBNConv2d`).
    """
    few = x.shape[0] * x.shape[2] * x.shape[3] < 4 * x.shape[1] // groups
    return torch.float64 if few and x.device.type != 'mps' else torch.promote_types(x.dtype, torch.float32)


def convolution_gradients(grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask):
    """Those of a 1x1 convolution. (`torch.nn.grad`'s expand a number to the input's shape, and lose channels_last.)"""
    return torch.ops.aten.convolution_backward(
        grad_y, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)


class TorchPasses:
    """The passes over one layer's input, and over its output's gradient, all with the centred copy `c = x - shift`.

    Args:
        x: `(N, C, H, W)`, channels_last or contiguous; of no images where other processes hold the batch.
        shift: `(C,)`, as `moments` has returned it; None in the forward pass.
        grad_y: `(N, out, H, W)`, in the backward pass.
        y: The layer's output, if a ReLU has made it: where it is zero, `grad_y` counts as zero.
    """

    def __init__(
            self,
            x: torch.Tensor,
            shift: Optional[torch.Tensor] = None,
            grad_y: Optional[torch.Tensor] = None,
            y: Optional[torch.Tensor] = None,
    ):
        if shift is None:  # the mean of every sixteenth position
            shift = x[:, :, ::4, ::4].mean((2, 3)).mean(0) if len(x) else x.new_zeros(x.shape[1])
        self.shift = shift
        self.c = centred(x, shift)
        if grad_y is not None:
            grad_y = grad_y.contiguous(memory_format=memory_format(x))
            self.grad_y = grad_y if y is None else torch.ops.aten.threshold_backward(grad_y, y, 0)

    def moments(self, groups: int, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`shift` `(C,)`, `rest = E[c]` `(C,)` and the covariances `S_g` `(G, C/G, C/G)`, the last two in `dtype`."""
        c = self.c
        # CUDA sums half precision's products in float32 by itself; ROCm, which calls itself CUDA, does not.
        wide = c if c.is_cuda and not torch.version.hip and dtype == torch.float32 else c.to(dtype)
        # In two steps, as rounding grows with the length of a sum; no mean at all without positions.
        rest = wide.mean((2, 3), dtype=dtype).sum(0) / max(1, len(c))
        m = rest.view(groups, -1, 1)
        products = group_products_op if torch.compiler.is_compiling() else group_products
        count = max(1, c.numel() // c.shape[1])
        cov = torch.baddbmm(products(wide, groups, dtype), m, m.mT, beta=1 / count, alpha=-1)
        return self.shift, rest, cov

    def convolve(self, weight: torch.Tensor, bias: torch.Tensor, relu: bool) -> torch.Tensor:
        """`W' c + b'`, or its ReLU: `(N, out, H, W)`; `weight` `(out, C, 1, 1)`."""
        y = F.conv2d(self.c, weight, bias.to(self.c.dtype))
        return y.relu_() if relu else y

    def weight_gradient(self, out: int, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        """`sum dy c^T` `(out, C)` and `sum dy` `(out,)` over all positions, in `dtype`."""
        weight = self.c.new_empty(out, self.c.shape[1], 1, 1)  # for its shape
        products = convolution_gradients(self.grad_y, self.c, weight, [False, True, False])[1]
        return products.flatten(1).to(dtype), self.grad_y.sum((0, 2, 3)).to(dtype)

    def input_gradient(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`W'^T dy + A c + b`, shaped as `x`; `a` `(G, C/G, C/G)`, symmetric. The last pass: it gives the copy up."""
        c = self.c
        del self.c
        a, b = a.to(c.dtype), b.to(c.dtype)
        if c.device.type == 'cpu':
            grad_x = F.conv2d(c, a.view(c.shape[1], -1, 1, 1), b, groups=len(a))
            del c  # its memory is used again
            grad_x += convolution_gradients(self.grad_y, grad_x, weight, [True, False, False])[0]
            return grad_x
        grad_x = torch.addmm(b, rows(self.grad_y), weight.flatten(1)).addmm_(rows(c), torch.block_diag(*a))
        grad_x = grad_x.view(*c.shape[:1], *c.shape[2:], -1).permute(0, 3, 1, 2)
        return grad_x.contiguous(memory_format=memory_format(c))
