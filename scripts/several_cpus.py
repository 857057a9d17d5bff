"""For train.py's `--device-modules scripts.several_cpus`: DistributedDataParallel and `--sync-bn` on CPUs, by torchrun.

train.py of timm 1.0.31 passes `device_ids=[cpu]` to DistributedDataParallel, where torch requires None, and torch's
SyncBatchNorm requires a GPU. Importing this module changes both classes, without effect on other devices.
"""
import torch
import torch.distributed as dist
from torch import nn

from timm_finet.fbn import KNOWN_FORWARDS
from timm_finet.ops.sync import sync_batch_norm

ddp_init = nn.parallel.DistributedDataParallel.__init__
sync_forward = nn.SyncBatchNorm.forward


def init_without_devices(self, module, device_ids=None, **kwargs):
    on_cpu = next(module.parameters()).device.type == 'cpu'
    ddp_init(self, module, None if on_cpu else device_ids, **kwargs)


def sync_forward_on_cpu(self, x):
    """SyncBatchNorm of `x` `(N, C, ...)` on the CPU, with statistics in at least float32; N may differ by process."""
    if x.device.type != 'cpu' or not self.training or not dist.is_initialized():
        return sync_forward(self, x)
    mean, var = torch.zeros(2, self.num_features, dtype=torch.promote_types(x.dtype, torch.float32))
    y = sync_batch_norm(x, mean, var, self.weight, self.bias, self.eps, self.process_group or dist.group.WORLD)
    if self.track_running_stats:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
    return y


nn.parallel.DistributedDataParallel.__init__ = init_without_devices
# All that this method does is to raise for a SyncBatchNorm on a CPU.
nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
nn.SyncBatchNorm.forward = sync_forward_on_cpu
KNOWN_FORWARDS.append(sync_forward_on_cpu)  # FBN layers need not call it
