"""Statistics over several processes: sums, moments and a BatchNorm that also works on the CPU."""
import torch
import torch.distributed as dist

__all__ = ['all_reduce', 'pool_moments', 'sync_batch_norm']


def all_reduce(x: torch.Tensor, process_group) -> torch.Tensor:
    """The sum over the processes, sent in float64: one with few positions may hold another dtype than the rest."""
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


def pool_moments(count: int, mean: torch.Tensor, cov: torch.Tensor, process_group):
    """Join the counts, means `(C,)` and group covariances `(G, C/G, C/G)` of all processes."""
    local = mean.new_full((), count)
    sums = all_reduce(torch.cat((mean * local, local[None])), process_group)
    total, pooled = sums[-1], sums[:-1] / sums[-1]
    shift = (mean - pooled).view(len(cov), -1, 1)
    return total, pooled, all_reduce((cov + shift * shift.mT) * (local / total), process_group)


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
