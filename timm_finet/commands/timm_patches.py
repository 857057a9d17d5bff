"""What `timm-finet run` changes in timm and torch while one of timm's scripts runs.

One function a defect; each says whose it is.
"""
import ctypes
import math
import sys
from pathlib import Path

import timm.utils
import torch
import torch.distributed as dist
from torch import nn

from ..fbn import KNOWN_FORWARDS
from ..hub.checkpoint import one_line
from ..ops.sync import sync_batch_norm

__all__ = ['delete_torn_checkpoints', 'fuse_in_eval_mode', 'keep_buffers', 'stop_at_nan', 'train_on_several_cpus']

ddp_init = nn.parallel.DistributedDataParallel.__init__
sync_forward = nn.SyncBatchNorm.forward


def fuse_in_eval_mode() -> None:
    """For `--reparam`. The scripts of timm 1.0.31 fuse before they call `.eval()`, which `fuse_fbn` refuses.

    See docs/upstream.md.
    """
    fuse = timm.utils.reparameterize_model
    timm.utils.reparameterize_model = timm.utils.model.reparameterize_model = (
        lambda model, inplace=False: fuse(model.eval(), inplace))


def stop_at_nan() -> None:
    """train.py of timm 1.0.31 goes on with a loss that is NaN, to the last epoch."""
    update = timm.utils.AverageMeter.update

    def update_or_stop(self, val, n=1):
        if math.isnan(val):
            raise SystemExit('The loss is nan: resume from the last checkpoint with a lower --lr, or without float16.')
        update(self, val, n)

    timm.utils.AverageMeter.update = update_or_stop


def delete_torn_checkpoints() -> None:
    """CheckpointSaver of timm 1.0.31 leaves its half-written file behind where the disk is full."""
    save = timm.utils.CheckpointSaver._save

    def save_or_delete(self, save_path, *args, **kwargs):
        try:
            save(self, save_path, *args, **kwargs)
        except BaseException as error:
            Path(save_path).unlink(missing_ok=True)
            if isinstance(error, (OSError, RuntimeError)):
                raise SystemExit(
                    f'{save_path} cannot be written, the checkpoint before it is whole: {one_line(error)}') from error
            raise

    timm.utils.CheckpointSaver._save = save_or_delete


def train_on_several_cpus() -> None:
    """train.py of timm 1.0.31 gives DistributedDataParallel `device_ids=[cpu]`, where torch wants None.

    And torch's SyncBatchNorm wants a GPU. On other devices nothing changes.
    """
    nn.parallel.DistributedDataParallel.__init__ = init_without_devices
    # It raises, on the CPU alone.
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
    nn.SyncBatchNorm.forward = sync_forward_on_cpu
    KNOWN_FORWARDS.append(sync_forward_on_cpu)  # FBN layers go on without calling it


def init_without_devices(self, module, device_ids=None, **kwargs):
    on_cpu = next(module.parameters()).device.type == 'cpu'
    ddp_init(self, module, None if on_cpu else device_ids, **kwargs)


def sync_forward_on_cpu(self, x):
    """SyncBatchNorm for `x` `(N, C, ...)` on the CPU, statistics in float32 at least; processes' N may differ."""
    if x.device.type != 'cpu' or not self.training or not dist.is_initialized():
        return sync_forward(self, x)
    mean, var = torch.zeros(2, self.num_features, dtype=torch.promote_types(x.dtype, torch.float32))
    y = sync_batch_norm(x, mean, var, self.weight, self.bias, self.eps, self.process_group or dist.group.WORLD)
    if self.track_running_stats:
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
    return y


def keep_buffers() -> None:
    """By default glibc hands large buffers back to the system, and torch's every step on a CPU faults them in again."""
    if sys.platform == 'linux' and hasattr(ctypes.CDLL(None), 'gnu_get_libc_version'):
        mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
        ctypes.CDLL(None).mallopt(mmap_max, 0)
        ctypes.CDLL(None).mallopt(trim_threshold, 2 ** 31 - 1)
