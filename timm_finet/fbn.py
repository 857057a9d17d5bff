"""Fine-grained Batch Normalization (FBN), arXiv 2005.06828, equation (4).

A convolution's input is split into G groups of channels; each group's partial sum is batch-normalised, then all are added:

    y = sum_g [ gamma_g (z_g - mu_g) / sqrt(var_g + eps) + beta_g ],    z_g = W_g x_g

`mu_g` and `var_g` are the mean and biased variance of `z_g` over the batch. Three exact ways to compute it:

* reference: a grouped convolution to G * out channels, BatchNorm, sum over groups (the paper's Figure 3a);
* folded: with known statistics it is one plain convolution with bias (equations 8 and 9);
* moment: `z_g` is linear in `x_g`, so `mu_g = W_g E[x_g]` and `var_g = diag(W_g Cov(x_g) W_g^T)`. Fold those and
  convolve once: nothing G times wide is ever written.
"""
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from timm.layers import register_notrace_module

__all__ = ['FBNConv2d']


def fold(
        weight: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        gamma: Optional[torch.Tensor],
        beta: Optional[torch.Tensor],
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Fold statistics into a convolution (equations 8 and 9).

    Args:
        weight: `(out, in, kh, kw)`.
        mean, var: `(G * out,)`, the statistics of each group's partial sum, group-major.
        gamma, beta: `(G * out,)` or None.

    Returns:
        The weight, shaped as before, and the bias `(out,)`, both in the dtype of `mean`.
    """
    out = weight.shape[0]
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma.to(scale.dtype)
    bias = -mean * scale
    if beta is not None:
        bias = bias + beta.to(scale.dtype)
    scale = scale.view(-1, out).t()[:, :, None, None, None]
    weight = weight.to(scale.dtype).unflatten(1, [scale.shape[1], -1]) * scale
    return weight.flatten(1, 2), bias.view(-1, out).sum(0)


def moments(x: torch.Tensor, groups: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean `(G, C/G, 1)` and covariance `(G, C/G, C/G)` of the channels of `x` `(N, C, H, W)`, in at least float32.

    One sample's mean is subtracted first: un-centred second moments cancel where the mean is far above the deviation.
    """
    x = x.transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))
    pilot = x[:, :x.shape[1] // 1].mean(1, keepdim=True)
    x = (x - pilot).unflatten(0, (groups, -1))
    shift = x.mean(2, keepdim=True)
    cov = x @ x.mT / x.shape[2] - shift @ shift.mT
    return pilot.unflatten(0, (groups, -1)) + shift, cov


class _Moments(torch.autograd.Function):
    """`x` and its moments. `x` passes through so that their gradient is added, in place, to the one that comes for `x`."""

    @staticmethod
    def forward(ctx, x, groups):
        mean, cov = moments(x, groups)
        ctx.save_for_backward(x, mean)
        return x.view_as(x), mean, cov

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_mean, grad_cov):
        x, mean = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        # d cov / dx = (x - mean) / count, twice; d mean / dx = 1 / count
        weight = (grad_cov + grad_cov.mT) / count
        bias = grad_mean / count - weight @ mean
        weight = weight.flatten(0, 1)[:, :, None, None].to(x.dtype)
        return grad.add_(F.conv2d(x, weight, bias.flatten().to(x.dtype), groups=len(mean))), None


@register_notrace_module
class FBNConv2d(nn.Conv2d):
    """Convolution with Fine-grained Batch Normalization: a drop-in for `nn.Conv2d(bias=False)` + `nn.BatchNorm2d`.

    The weight is a plain convolution's, `(out, in, k, k)`; `bn` holds the `fbn_groups * out` statistics and affine pairs,
    group-major. Training on batch statistics uses the moment form for unpadded 1x1 kernels, else the reference form;
    otherwise the running statistics are folded on the fly. Statistics are computed in at least float32, outside
    autocast. Eager, `torch.compile`, fx (as a leaf); TorchScript trains in the reference form.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: As for `nn.Conv2d`.
        fbn_groups: G, into how many groups the *input channels* are split for normalisation. It has nothing to do with a
            grouped convolution; 1 is plain BatchNorm, and runs as such.
        affine, eps, momentum: As for `nn.BatchNorm2d`; gamma and beta are per intermediate channel.

    Raises:
        ValueError: `fbn_groups` does not divide `in_channels`; or, when training, one value per channel.

    Shape:
        `(N, in, H, W)` to `(N, out, H', W')`, dtype as for `nn.Conv2d`.
    """

    form = 'moment'  # 'reference' is for tests and benchmarks: G times the memory, the same result

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int = 1,
            stride: int = 1,
            padding: int = 0,
            dilation: int = 1,
            fbn_groups: int = 4,
            affine: bool = True,
            eps: float = 1e-5,
            momentum: Optional[float] = 0.1,
            device=None,
            dtype=None,
    ):
        if fbn_groups < 1 or in_channels % fbn_groups:
            raise ValueError(f'fbn_groups={fbn_groups} must divide in_channels={in_channels}.')
        dd = {'device': device, 'dtype': dtype}
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=False, **dd)
        self.fbn_groups = fbn_groups
        self.bn = nn.BatchNorm2d(fbn_groups * out_channels, eps, momentum, affine, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._reference(x) if self.bn.training else self._folded(x)
        if not self._uses_batch_statistics():
            return self._folded(x)
        if self.form == 'moment' and self.fbn_groups > 1 and self.kernel_size == (1, 1) and self.padding == (0, 0):
            return self._moment(x)
        return self._reference(x)

    @torch.jit.ignore
    def _uses_batch_statistics(self) -> bool:
        # A frozen BatchNorm (torchvision's, timm's) is no _BatchNorm; one in eval mode is a common way to fine-tune.
        return isinstance(self.bn, _BatchNorm) and (self.bn.training or self.bn.running_mean is None)

    def _reference(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.unflatten(1, [self.fbn_groups, -1]).transpose(0, 1).flatten(0, 1)
        z = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.fbn_groups)
        return self.bn(z).unflatten(1, [self.fbn_groups, -1]).sum(1)

    def _folded(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._folded_weight()
        return F.conv2d(x, weight.to(self.weight.dtype), bias.to(self.weight.dtype), self.stride, self.padding, self.dilation)

    def _folded_weight(self) -> Tuple[torch.Tensor, torch.Tensor]:
        bn = self.bn
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return fold(self.weight, bn.running_mean.to(dtype), bn.running_var.to(dtype), bn.weight, bn.bias, bn.eps)

    @torch.jit.unused
    def _moment(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # one copy for the moments and for the convolution
        x = x[:, :, ::self.stride[0], ::self.stride[1]]
        count = x.numel() // x.shape[1]
        if count == 1:
            raise ValueError(f'Expected more than 1 value per channel when training, got input size {tuple(x.shape)}')
        with torch.autocast(x.device.type, enabled=False):
            x, mean, cov = _Moments.apply(x, self.fbn_groups)
            w = self.weight.to(cov.dtype).flatten(1).unflatten(1, (self.fbn_groups, -1)).transpose(0, 1)  # (G, out, in / G)
            mean = (w @ mean).flatten()
            var = ((w @ cov) * w).sum(2).flatten().clamp_min(0)
            self._track(mean.detach(), var.detach() * (count / (count - 1)))
            weight, bias = fold(self.weight, mean, var, self.bn.weight, self.bn.bias, self.bn.eps)
        return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype))

    def _track(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        bn = self.bn
        if not (bn.training and bn.track_running_stats):
            return
        bn.num_batches_tracked.add_(1)
        momentum = 1 / bn.num_batches_tracked if bn.momentum is None else bn.momentum
        bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), momentum)
        bn.running_var.lerp_(var.to(bn.running_var.dtype), momentum)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The plain convolution with bias that this layer is in eval mode; device, dtype, layout, `requires_grad` stay.

        Raises:
            RuntimeError: In train mode, where the statistics are the batch's.
        """
        if self._uses_batch_statistics():
            raise RuntimeError('An FBNConv2d in train mode has no fixed statistics to fuse: call .eval() first.')
        weight, bias = self._folded_weight()
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, device='meta')
        conv.weight = nn.Parameter(torch.empty_like(self.weight).copy_(weight), self.weight.requires_grad)
        conv.bias = nn.Parameter(bias.to(self.weight.dtype), self.weight.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return super().extra_repr() + f', fbn_groups={self.fbn_groups}'
