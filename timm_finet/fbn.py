"""Fine-grained Batch Normalization (FBN), arXiv 2005.06828, equation (4).

A convolution's input is split into G groups of channels; each group's partial sum is batch-normalised, then all are added:

    y = sum_g [ gamma_g (z_g - mu_g) / sqrt(var_g + eps) + beta_g ],    z_g = W_g x_g

`mu_g` and `var_g` are the mean and biased variance of `z_g` over the batch. Three exact ways to compute it:

* reference: a grouped convolution to G * out channels, BatchNorm, sum over groups (the paper's Figure 3a);
* folded: with known statistics it is one plain convolution with bias (equations 8 and 9);
* moment: `z_g` is linear in `x_g`, so `mu_g = W_g E[x_g]` and `var_g = diag(W_g Cov(x_g) W_g^T)`. Fold those and
  convolve once: nothing G times wide is ever written. Kernels larger than 1x1 go group by group instead: one `z_g` at a
  time, made again in the backward pass.
"""
from contextlib import contextmanager
from typing import Optional, Tuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

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


# These two are operators of their own so that the precision is set when they run, not when torch.compile traces them.
@torch.library.custom_op('timm_finet::bmm', mutates_args=())
def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.bmm` in full precision."""
    with full_precision(a.device):
        return torch.bmm(a, b)


@bmm.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2])


def moments_dtype(x: torch.Tensor, groups: int) -> torch.dtype:
    """Float32 at least; float64 where so few positions leave some z_g next to no variance, a difference of large terms.

    Only synchronised layers take moments of so few (`FBNConv2d.forward`).
    """
    few = x.shape[0] * x.shape[2] * x.shape[3] < 4 * x.shape[1] // groups
    return torch.float64 if few and x.device.type != 'mps' else torch.promote_types(x.dtype, torch.float32)


@torch.library.custom_op('timm_finet::moments', mutates_args=())
def moments(x: torch.Tensor, groups: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean `(G, C/G, 1)` and covariance `(G, C/G, C/G)` of the channels of a dense `x` `(N, C, H, W)`, at least float32.

    The mean is subtracted first, as BatchNorm does: un-centred second moments cancel where it is far above the deviation.
    """
    n, c, h, w = x.shape
    count, size, dtype = n * h * w, c // groups, moments_dtype(x, groups)
    mean = x.mean((2, 3), dtype=dtype).mean(0)  # in two steps, for the same reason as the covariance below
    if is_channels_last(x):  # x is a matrix of positions by channels already
        t = (x.permute(0, 2, 3, 1) - mean).view(count, c).t()
    else:  # make it one of channels by positions in the same pass
        t = mean.new_empty(c, n, h, w)
        torch.sub(x.transpose(0, 1), mean[:, None, None, None], out=t)
        t = t.view(c, count)
    # A product sums its long side one by one: rounding grows with it. Sum parts, then the parts.
    parts = next(k for k in range(max(1, count // max(1024, 4 * size)), 0, -1) if count % k == 0)
    cov = []
    with full_precision(x.device):
        for group in t.unflatten(1, (parts, -1)).transpose(0, 1).chunk(groups, 1):
            cov.append(torch.bmm(group, group.mT).sum(0))
    return mean.view(groups, size, 1), torch.stack(cov) / count


@moments.register_fake
def _(x, groups):
    size, dtype = x.shape[1] // groups, moments_dtype(x, groups)
    return x.new_empty(groups, size, 1, dtype=dtype), x.new_empty(groups, size, size, dtype=dtype)


def is_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def add_affine(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`out += weight_g @ x_g + bias` in place, for `weight` `(G, C/G, C/G)`, `bias` `(C,)` and one dense layout."""
    n, c = x.shape[:2]
    if is_channels_last(x):
        for o, t, w in zip(*(v.permute(0, 2, 3, 1).view(-1, c).chunk(len(weight), 1) for v in (out, x)), weight):
            o.addmm_(t, w.mT)
    else:
        for o, t, w in zip(*(v.view(n, c, -1).chunk(len(weight), 1) for v in (out, x)), weight):
            o.baddbmm_(w.expand(n, -1, -1), t)
    return out.add_(bias.view(-1, 1, 1))


def pool(count: int, mean: torch.Tensor, cov: torch.Tensor, process_group) -> Tuple[torch.Tensor, ...]:
    """Join counts, means `(..., n, 1)` and covariances `(..., n, n)` of all processes; without a group they are joined."""
    local = total = mean.new_full((), count)
    if process_group is not None:
        sums = all_reduce(torch.cat((mean.flatten() * local, local[None])), process_group)
        total = sums[-1]
        pooled = sums[:-1].view_as(mean) / total
        shift = mean - pooled
        cov = all_reduce((cov + shift * shift.mT) * (local / total), process_group)
        mean = pooled
    return total, mean, cov


def all_reduce(x: torch.Tensor, process_group) -> torch.Tensor:
    """The sum over the processes, sent in float64, as a process with few positions may hold another dtype than the rest."""
    if process_group is None:
        return x
    total = x.double()
    dist.all_reduce(total, group=process_group)
    return total.to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """`all_reduce`, whose gradient is one as well."""

    @staticmethod
    def forward(ctx, x, process_group):
        ctx.process_group = process_group
        return all_reduce(x, process_group)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.process_group), None


class _MomentStatistics(torch.autograd.Function):
    """Mean and biased variance `(G, out)` of `z_g = W_g x_g` from the moments of `x`; `weight` is `(G, out, C/G)`.

    `x` passes through: what the statistics add to its gradient goes, in place, into the buffer that the convolution
    behind has made. Saved are `x`, which that convolution saves too, and small tensors.
    """

    @staticmethod
    def forward(ctx, x, weight, process_group):
        mean, cov = moments(x, len(weight))
        count, mean, cov = pool(x.numel() // x.shape[1], mean, cov, process_group)
        weight_dtype, weight = weight.dtype, weight.to(cov.dtype)
        weight_cov, weight_mean = bmm(weight, torch.cat((cov, mean), 2)).split((cov.shape[2], 1), 2)
        ctx.save_for_backward(x, weight, mean, weight_cov, count)
        ctx.mark_non_differentiable(count)
        ctx.process_group, ctx.weight_dtype = process_group, weight_dtype
        return x.view_as(x), weight_mean.squeeze(2), (weight_cov * weight).sum(2).clamp_min(0), count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_mean, grad_var, _):
        x, weight, mean, weight_cov, count = ctx.saved_tensors
        grads = torch.stack((grad_mean, grad_var))[..., None]
        grad_weight = torch.baddbmm(weight_cov * (2 * grads[1]), grads[0], mean.mT)
        grad_mean, grad_var = all_reduce(grads, ctx.process_group) / count
        # count dmean/dx = W, count dvar/dx = 2 W^T W (x - mean)
        a = bmm((weight * (2 * grad_var)).mT, weight)
        b = bmm(weight.mT, grad_mean) - bmm(a, mean)
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        grad = grad.contiguous(memory_format=layout)
        grad_weight = grad_weight.to(ctx.weight_dtype)
        return add_affine(grad, x, a.to(x.dtype), b.flatten().to(x.dtype)), grad_weight, None


def sync_batch_norm(x, mean, var, gamma, beta, eps, process_group):
    """`F.batch_norm` over all processes with momentum 1, for `x` `(N, C, ...)`. (torch's own refuses the CPU.)"""
    dims, shape = [0, *range(2, x.ndim)], (-1,) + (1,) * (x.ndim - 2)
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = _AllReduce.apply(torch.cat((z.sum(dims), z.new_full((1,), z.numel() // z.shape[1]))), process_group)
    total = sums[-1].detach()
    z = z - (sums[:-1] / total).view(shape)
    biased = _AllReduce.apply(z.square().sum(dims), process_group) / total
    with torch.no_grad():
        mean.copy_(sums[:-1] / total)
        var.copy_(biased * total / (total - 1))
    scale = torch.rsqrt(biased + eps)
    z = z * (scale if gamma is None else scale * gamma).view(shape)
    return (z if beta is None else z + beta.view(shape)).to(x.dtype)


@register_notrace_module
class FBNConv2d(nn.Conv2d):
    """Convolution with Fine-grained Batch Normalization: a drop-in for `nn.Conv2d(bias=False)` + `nn.BatchNorm2d`.

    The weight is a plain convolution's, `(out, in, k, k)`; `bn` holds the `fbn_groups * out` statistics and affine pairs,
    group-major. Training takes the moment form for unpadded 1x1 kernels and goes group by group for others; where that is
    cheaper, as for few positions, it takes the reference form. In eval mode the running statistics are folded on the fly.
    Statistics are computed in at least float32. Eager, `torch.compile`, fx (as a leaf); TorchScript trains in the reference
    form. A `bn` made a SyncBatchNorm synchronises the statistics. The moment form has no second derivatives.

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

    # 'auto' takes the cheapest form. 'reference', G times the memory for the same result, is for tests.
    form = 'auto'

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
        group = self._process_group()
        # Not so with a process group: all processes have to go one way, whatever their share of the batch.
        if self.form == 'reference' or group is None and self._is_cheap(x):
            return self._reference(x)
        if self.kernel_size == (1, 1) and self.padding == (0, 0):
            return self._moment(x, group)
        return self._group_by_group(x, group)

    @torch.jit.unused
    def _is_cheap(self, x: torch.Tensor) -> bool:
        """Whether the reference form writes nothing G times wide, or nothing that is large beside the weight."""
        positions = x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        return self.fbn_groups == 1 or self.fbn_groups * positions < 4 * self.weight[0].numel()

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
    def _process_group(self):
        """The processes that share statistics: those of a child that has become a SyncBatchNorm."""
        if isinstance(self.bn, nn.SyncBatchNorm) and self.bn.training and dist.is_available() and dist.is_initialized():
            group = self.bn.process_group or dist.group.WORLD
            return group if dist.get_world_size(group) > 1 else None
        return None

    @torch.jit.unused
    def _moment(self, x: torch.Tensor, process_group) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))  # one copy for the statistics and for the convolution
        layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
        with torch.autocast(x.device.type, enabled=False):
            x = x[:, :, ::self.stride[0], ::self.stride[1]].contiguous(memory_format=layout)
            weight = self.weight.flatten(1).unflatten(1, (self.fbn_groups, -1)).transpose(0, 1)  # (G, out, in / G)
            x, mean, var, count = _MomentStatistics.apply(x, weight, process_group)
            mean, var = mean.flatten(), var.flatten()
            self._track(mean, var * (count / (count - 1)))
            weight, bias = fold(self.weight, mean, var, self.bn.weight, self.bn.bias, self.bn.eps)
            return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype))

    @torch.jit.unused
    def _group_by_group(self, x: torch.Tensor, process_group) -> torch.Tensor:
        bn, out = self.bn, self.out_channels
        like = self.weight if bn.running_mean is None else bn.running_mean
        mean, var = torch.zeros(2, bn.num_features, dtype=like.dtype, device=like.device)

        def part(g, x, weight):  # made again in the backward pass, which writes the same mean and variance once more
            norm = [None if v is None else v[g * out:(g + 1) * out] for v in (mean, var, bn.weight, bn.bias)]
            z = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation)
            if process_group is not None:
                return sync_batch_norm(z, *norm, bn.eps, process_group)
            return F.batch_norm(z, *norm, training=True, momentum=1., eps=bn.eps)

        y = None
        for g, (t, w) in enumerate(zip(x.chunk(self.fbn_groups, 1), self.weight.chunk(self.fbn_groups, 1))):
            z = checkpoint(part, g, t, w, use_reentrant=False, preserve_rng_state=False)
            y = z if y is None else y.add_(z)
        self._track(mean, var)
        return y

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, unbiased_var: torch.Tensor) -> None:
        bn = self.bn
        if bn.training and bn.track_running_stats:
            bn.num_batches_tracked.add_(1)
            momentum = 1 / bn.num_batches_tracked if bn.momentum is None else bn.momentum
            bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), momentum)
            bn.running_var.lerp_(unbiased_var.to(bn.running_var.dtype), momentum)

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
