"""A strided depthwise convolution whose backward pass is fast on the CPU in bfloat16 and float16."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import register_notrace_module

from .tracing import is_exporting

__all__ = ['DepthwiseConv2d']


class _Strided(torch.autograd.Function):
    """A strided depthwise convolution whose input gradient is computed by a convolution of stride 1, which is fast.

    With zeros inserted between its elements, the output's gradient is that of a convolution of stride 1.
    """

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            # At stride 1, an odd kernel with half of its size as padding has as many outputs as inputs.
            dense = torch.zeros_like(x)
            dense[:, :, ::ctx.stride[0], ::ctx.stride[1]] = grad
            grad_x = F.conv2d(dense, weight.flip(2, 3), None, 1, ctx.padding, 1, x.shape[1])
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], x.shape[1], [False, True, False])
        return grad_x, grad_weight, None, None


def convolution_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype of a convolution of `x` on the CPU: autocast's, which leaves float64 alone, or that of `x`."""
    if torch.is_autocast_enabled('cpu') and x.dtype != torch.float64:
        return torch.get_autocast_dtype('cpu')
    return x.dtype


@register_notrace_module
class DepthwiseConv2d(nn.Conv2d):
    """The same as `nn.Conv2d(chs, chs, kernel_size, stride, kernel_size // 2, groups=chs, bias=False)`, but faster.

    `kernel_size` must be odd. In bfloat16 and float16 on a CPU, the input gradient of such a convolution with a stride
    takes 20 to 200 times as long as in float32, because oneDNN has no kernel for it. In this case, in train mode,
    the layer computes the gradient by a convolution of stride 1. Otherwise it does what `nn.Conv2d` does.
    """

    def __init__(self, chs: int, kernel_size: int, stride: int = 1, device=None, dtype=None):
        super().__init__(
            chs, chs, kernel_size, stride, kernel_size // 2, groups=chs, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self._gradient_is_slow(x):
                return self._strided(x)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    @torch.jit.unused
    def _gradient_is_slow(self, x: torch.Tensor) -> bool:
        if not self.training or self.stride == (1, 1) or x.device.type != 'cpu' or not torch.is_grad_enabled():
            return False
        return convolution_dtype(x).itemsize <= 2 and not is_exporting()

    @torch.jit.unused
    def _strided(self, x: torch.Tensor) -> torch.Tensor:
        dtype = convolution_dtype(x)
        with torch.autocast('cpu', enabled=False):
            return _Strided.apply(x.to(dtype), self.weight.to(dtype), self.stride, self.padding)
