"""Statistics over several processes: sums, moments, and a BatchNorm that also works on the CPU."""
from typing import Optional, Tuple

import torch
import torch.distributed as dist

__all__ = ['all_reduce', 'pool_moments', 'sync_batch_norm']


def all_reduce(x: torch.Tensor, process_group) -> torch.Tensor:
    """Return the sum of `x` over the processes, in the dtype of this process's `x`.

    It is sent in float64, because the dtypes of processes may differ: `moments_dtype` depends on the number of
    positions.
    """
    total = x.double()
    dist.all_reduce(total, group=process_group)
    return total.to(x.dtype)


class _AllReduce(torch.autograd.Function):
    """`all_reduce` with a gradient, which is `all_reduce` again: every process's sum contains every process's `x`."""

    @staticmethod
    def forward(ctx, x, process_group):
        ctx.process_group = process_group
        return all_reduce(x, process_group)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.process_group), None


def pool_moments(
        count: int, mean: torch.Tensor, cov: torch.Tensor, process_group,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the count (a scalar tensor), mean `(C,)` and group covariances `(G, C/G, C/G)` over all processes."""
    count = mean.new_full((), count)
    sums = all_reduce(torch.cat((mean * count, count[None])), process_group)
    pooled_count, pooled_mean = sums[-1], sums[:-1] / sums[-1]
    # A process's second moment about the pooled mean is S + d d^T, where d = its mean - the pooled mean.
    d = (mean - pooled_mean).view(len(cov), -1, 1)
    pooled_cov = all_reduce((cov + d * d.mT) * (count / pooled_count), process_group)
    return pooled_count, pooled_mean, pooled_cov


def sync_batch_norm(
        x: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        gamma: Optional[torch.Tensor],
        beta: Optional[torch.Tensor],
        eps: float,
        process_group,
) -> torch.Tensor:
    """Normalise `x` `(N, C, ...)` by the statistics of all processes, and write them to `mean` and unbiased `var`.

    This is `F.batch_norm` in training with momentum 1. It computes in at least float32, returns the dtype of `x`, and
    is differentiable in `x`, `gamma` and `beta`. (nn.SyncBatchNorm does not run on the CPU.)
    """
    dims = [0, *range(2, x.ndim)]
    per_channel = (-1,) + (1,) * (x.ndim - 2)  # the shape that broadcasts over `x`
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    local_count = z.new_full((1,), z.numel() // z.shape[1])
    sums = _AllReduce.apply(torch.cat((z.sum(dims), local_count)), process_group)
    count = sums[-1].detach()
    batch_mean = sums[:-1] / count
    z = z - batch_mean.view(per_channel)
    biased_var = _AllReduce.apply(z.square().sum(dims), process_group) / count
    with torch.no_grad():
        mean.copy_(batch_mean)
        var.copy_(biased_var * count / (count - 1))
    scale = torch.rsqrt(biased_var + eps)
    if gamma is not None:
        scale = scale * gamma
    z = z * scale.view(per_channel)
    if beta is not None:
        z = z + beta.view(per_channel)
    return z.to(x.dtype)
