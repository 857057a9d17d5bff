"""The moment form's passes over the activations in torch's own operators, for any device, layout and dtype."""
from contextlib import contextmanager, nullcontext
from threading import Lock
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

__all__ = [
    'TorchPasses', 'has_autocast', 'memory_format', 'moments_dtype', 'relu_gradient', 'without_autocast']


@torch.compiler.assume_constant_result  # torch 2.9 cannot trace the call
def has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def without_autocast(x: torch.Tensor):
    """Return a context without autocast on the device of `x`, in which a backward pass keeps its forward pass's dtypes.

    Autocast may be on in a backward pass: some people call `backward()` inside it, and torch.compile traces the
    backward pass under the autocast that surrounds the layer.
    """
    device = x.device.type
    if has_autocast(device) and (torch.compiler.is_compiling() or torch.is_autocast_enabled(device)):
        return torch.autocast(device, enabled=False)
    return nullcontext()


PRECISION = Lock()  # shared by all threads; nn.DataParallel runs one for each GPU


@contextmanager
def full_precision(device: torch.device):
    """Compute float32 matrix products in float32, even if TF32 or bfloat16 is switched on for them."""
    backend = torch.backends.cuda.matmul if device.type == 'cuda' else torch.backends.mkldnn.matmul
    with PRECISION:
        previous = backend.fp32_precision
        backend.fp32_precision = 'ieee'
        try:
            yield
        finally:
            backend.fp32_precision = previous


def memory_format(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def moments_dtype(x: torch.Tensor, groups: int) -> torch.dtype:
    """Return the dtype of the moments of `x` `(N, C, H, W)`: at least float32.

    It is float64 if there are so few positions that some partial sums hardly vary: their variance is then a small
    difference of large terms. `FBNConv2d` seldom computes moments of so few positions, unless processes share
    statistics.
    """
    few = x.shape[0] * x.shape[2] * x.shape[3] < 4 * x.shape[1] // groups
    return torch.float64 if few and x.device.type != 'mps' else torch.promote_types(x.dtype, torch.float32)


def rows(x: torch.Tensor) -> torch.Tensor:
    """Reshape `(N, C, H, W)` to `(N * H * W, C)`; the result is a view if the layout is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def shifted(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return `c = x - shift`."""
    # Broadcasting `shift` itself would be slow, because of short inner loops over channels or pixels.
    image = shift.view(-1, 1, 1).expand(x.shape[1:])[None]
    return x - image.contiguous(memory_format=memory_format(x))


def group_products(c: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Return `sum c_g c_g^T` over the positions of `c` `(N, C, H, W)`, in `dtype`: `(G, C/G, C/G)`."""
    c = rows(c)
    positions, channels = c.shape
    size = channels // groups
    same_dtype = c.dtype == dtype
    # A matrix product adds up the positions one by one, so its rounding error grows with their number. Therefore the
    # positions are cut into equal splits of at least `minimum`.
    minimum = max(256, 4 * size) if same_dtype else max(256, 4 * channels, positions // 64)
    splits = max(1, positions // minimum)
    while positions % splits:
        splits -= 1
    c = c.view(splits, positions // splits, channels)
    if same_dtype:
        with full_precision(c.device):
            return torch.stack([torch.bmm(c_g.mT, c_g).sum(0) for c_g in c.chunk(groups, 2)])
    # In half precision on a GPU, tensor cores compute the products of all channels in less time than the host takes to
    # launch a product for each group. Only the groups' blocks on the diagonal are kept.
    products = torch.bmm(c.mT, c, out_dtype=dtype).sum(0)
    blocks = products.view(groups, size, groups, size).diagonal(dim1=0, dim2=2)  # (C/G, C/G, G)
    return blocks.permute(2, 0, 1).contiguous()


# A custom operator for torch.compile, so that the precision is set when it runs, not when it is traced.
group_products_op = torch.library.custom_op('timm_finet::group_products', group_products, mutates_args=())


@group_products_op.register_fake
def _(c, groups, dtype):
    return c.new_empty(groups, c.shape[1] // groups, c.shape[1] // groups, dtype=dtype)


def convolution_gradients(
        grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, mask: List[bool]) -> Tuple[torch.Tensor, ...]:
    """Return the gradients of a 1x1 convolution's input, weight and bias, each only if `mask` is true for it.

    (The functions of `torch.nn.grad` expand a number to the input's shape and lose channels_last.)
    """
    return torch.ops.aten.convolution_backward(
        grad_y, x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask)


def relu_gradient(grad_y: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return the gradient of a ReLU's input from its output `y`, in one launch."""
    return torch.ops.aten.threshold_backward(grad_y, y, 0)


class TorchPasses:
    """The passes over one layer's input and its output's gradient, all with the shifted copy `c = x - shift`.

    Args:
        x: `(N, C, H, W)`, channels_last or contiguous; without images if other processes hold the whole batch.
        shift: `(C,)`, as returned by `moments`; None in the forward pass.
        grad_y: `(N, out, H, W)`, in the backward pass.
        y: The layer's output if it comes from a ReLU; `grad_y` then counts as zero where `y` is zero.
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
        self.c = shifted(x, shift)
        # In a backward pass torch.compile knows the layout of saved tensors, not of tensors computed from them.
        self.memory_format = memory_format(x)
        if grad_y is not None:
            grad_y = grad_y.contiguous(memory_format=self.memory_format)
            self.grad_y = grad_y if y is None else relu_gradient(grad_y, y)

    def moments(self, groups: int, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `shift` `(C,)`, and in `dtype` `shifted_mean = E[c]` `(C,)` and covariances `S_g` `(G, C/G, C/G)`."""
        c = self.c
        # CUDA can sum and return half-precision products in float32. ROCm, where `is_cuda` is true too, cannot.
        if not (c.is_cuda and not torch.version.hip and dtype == torch.float32):
            c = c.to(dtype)
        # The mean takes two steps, because rounding errors grow with the length of a sum. It is zero without positions.
        shifted_mean = c.mean((2, 3), dtype=dtype).sum(0) / max(1, len(c))
        products = group_products_op if torch.compiler.is_compiling() else group_products
        count = max(1, c.numel() // c.shape[1])
        # S_g = sum c_g c_g^T / count - E[c_g] E[c_g]^T
        m = shifted_mean.view(groups, -1, 1)
        cov = torch.baddbmm(products(c, groups, dtype), m, m.mT, beta=1 / count, alpha=-1)
        return self.shift, shifted_mean, cov

    def convolve(self, weight: torch.Tensor, bias: torch.Tensor, relu: bool) -> torch.Tensor:
        """Return `W' c + b'`, or its ReLU, `(N, out, H, W)`; `weight` is `(out, C, 1, 1)`."""
        y = F.conv2d(self.c, weight, bias.to(self.c.dtype))
        return y.relu_() if relu else y

    def weight_gradient(self, out: int, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return `sum dy c^T` `(out, C)` and `sum dy` `(out,)` over all positions, in `dtype`."""
        weight = self.c.new_empty(out, self.c.shape[1], 1, 1)  # only its shape is read
        _, products, _ = convolution_gradients(self.grad_y, self.c, weight, [False, True, False])
        return products.flatten(1).to(dtype), self.grad_y.sum((0, 2, 3)).to(dtype)

    def input_gradient(self, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return `W'^T dy + A c + b`, shaped as `x`; `a` is `(G, C/G, C/G)` and symmetric, `b` is `(C,)`.

        This must be the last pass, because it frees `c`.
        """
        c = self.c
        del self.c
        a, b = a.to(c.dtype), b.to(c.dtype)
        if c.device.type == 'cpu':
            grad_x = F.conv2d(c, a.view(c.shape[1], -1, 1, 1), b, groups=len(a))
            del c  # so that its memory can be reused
            grad_x += convolution_gradients(self.grad_y, grad_x, weight, [True, False, False])[0]
            return grad_x
        grad_x = torch.addmm(b, rows(self.grad_y), weight.flatten(1)).addmm_(rows(c), torch.block_diag(*a))
        n, _, height, width = c.shape
        grad_x = grad_x.view(n, height, width, -1).permute(0, 3, 1, 2)
        return grad_x.contiguous(memory_format=self.memory_format)
