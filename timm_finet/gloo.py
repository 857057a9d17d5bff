"""Several processes of timm's train.py on the CPU: what its DistributedDataParallel call and torch's SyncBatchNorm refuse.

For rehearsals of a distributed run on a machine without GPUs; on other devices nothing changes.
"""
import torch
import torch.distributed as dist
from torch import nn

from .sync import sync_batch_norm

__all__ = ['allow_cpu']

ddp_init = nn.parallel.DistributedDataParallel.__init__
torchs_forward = nn.SyncBatchNorm.forward


def init(self, module, device_ids=None, **kwargs):
    """train.py passes `device_ids=[cpu]`, where torch wants None."""
    on_cpu = next(module.parameters()).device.type == 'cpu'
    ddp_init(self, module, None if on_cpu else device_ids, **kwargs)


def forward(self, x):
    """SyncBatchNorm for `x` `(N, C, ...)` on the CPU, statistics in float32 at least; processes' N may differ."""
    if x.device.type != 'cpu' or not self.training or not dist.is_initialized():
        return torchs_forward(self, x)
    mean, var = torch.zeros(2, self.num_features, dtype=torch.promote_types(x.dtype, torch.float32))
    y = sync_batch_norm(x, mean, var, self.weight, self.bias, self.eps, self.process_group or dist.group.WORLD)
    if self.track_running_stats:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
    return y


def allow_cpu() -> None:
    nn.parallel.DistributedDataParallel.__init__ = init
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None  # raises on the CPU alone
    nn.SyncBatchNorm.forward = forward
