"""Several processes of timm's train.py on the CPU: what its DistributedDataParallel call and torch's SyncBatchNorm refuse.

For rehearsals of a distributed run on a machine without GPUs; on other devices nothing changes.
"""
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

__all__ = ['allow_cpu']

ddp_init = nn.parallel.DistributedDataParallel.__init__
sync_batch_norm = nn.SyncBatchNorm.forward


def init(self, module, device_ids=None, **kwargs):
    """train.py passes `device_ids=[cpu]`, where torch wants None."""
    on_cpu = next(module.parameters()).device.type == 'cpu'
    ddp_init(self, module, None if on_cpu else device_ids, **kwargs)


def forward(self, x):
    """SyncBatchNorm for `x` `(N, C, ...)` on the CPU, statistics in float32 at least; processes' N may differ."""
    if x.device.type != 'cpu' or not self.training or not dist.is_initialized():
        return sync_batch_norm(self, x)
    dims, shape = [0, *range(2, x.ndim)], (-1,) + (1,) * (x.ndim - 2)
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    group = self.process_group or dist.group.WORLD
    count, total = (all_reduce(t, group=group) for t in (z.new_tensor(x.numel() / x.shape[1]), z.sum(dims)))
    mean = total / count
    z = z - mean.view(shape)
    var = all_reduce(z.square().sum(dims), group=group) / count
    if self.track_running_stats:
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)
    z = z * (var + self.eps).rsqrt().view(shape)
    if self.affine:
        z = z * self.weight.view(shape) + self.bias.view(shape)
    return z.to(x.dtype)


def allow_cpu() -> None:
    nn.parallel.DistributedDataParallel.__init__ = init
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None  # raises on the CPU alone
    nn.SyncBatchNorm.forward = forward
