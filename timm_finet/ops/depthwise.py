"""A strided depthwise convolution whose backward pass is fast on the CPU in bfloat16."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import register_notrace_module

from .tracing import is_exporting

__all__ = ['DepthwiseConv2d']


class _Strided(torch.autograd.Function):
    """With zeros between its elements, a strided output's gradient is a dense convolution's, which is fast."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, x.shape[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            dense = torch.zeros_like(x)  # an odd kernel with half of it as padding: as many outputs as inputs
            dense[:, :, ::ctx.stride[0], ::ctx.stride[1]] = grad
            grad_x = F.conv2d(dense, weight.flip(2, 3), None, 1, ctx.padding, 1, x.shape[1])
        grad_weight = torch.ops.aten.convolution_backward(
            grad, x, weight, None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], x.shape[1], [False, True, False])[1]
        return grad_x, grad_weight, None, None


@register_notrace_module
class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d(chs, chs, kernel_size, stride, kernel_size // 2, groups=chs, bias=False)` in all but speed.

    For odd kernels. oneDNN has no kernel of its own for the input gradient of a strided one in bfloat16 or float16: it
    takes 20 to 200 times as long as in float32. Training on a CPU goes another way; everything else is `nn.Conv2d`.
    """

    def __init__(self, chs: int, kernel_size: int, stride: int = 1, device=None, dtype=None):
        super().__init__(
            chs, chs, kernel_size, stride, kernel_size // 2, groups=chs, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self.training and self.stride != (1, 1) and x.device.type == 'cpu' and torch.is_grad_enabled():
                return self._strided(x)
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def _strided(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        if dtype.itemsize > 2 or x.dtype == torch.float64 or is_exporting():
            return self._conv_forward(x, self.weight, self.bias)
        with torch.autocast('cpu', enabled=False):
            return _Strided.apply(x.to(dtype), self.weight.to(dtype), self.stride, self.padding)
