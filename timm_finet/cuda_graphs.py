"""Captures a classifier's forward and backward pass as CUDA graphs.

train.py does so with `--device-modules timm_finet.cuda_graphs`.

A training step of FBN consists of many small kernels. If the host launches them more slowly than the GPU runs them, a
CUDA graph makes the step faster, because it is launched as a whole. Graphs require one process, batches of one size,
and a network that makes no decisions on the host. DistributedDataParallel is refused, because a graph would not
exchange its gradients. Evaluation is not captured. Without a GPU nothing is captured.
"""
from typing import Optional

import torch
import torch.nn as nn
from timm.task import ClassificationTask

__all__ = ['captured']

forward = ClassificationTask.forward


def captured(model: nn.Module, x: torch.Tensor, dtype: Optional[torch.dtype] = None) -> nn.Module:
    """Return `model`, which from now on replays a graph for every batch in train mode.

    Args:
        model: The network, on the GPU, in train mode and without hooks.
        x: A batch with the shape, dtype and memory format of all later batches.
        dtype: The dtype of autocast, or None to capture without autocast.

    Raises:
        Whatever `torch.cuda.make_graphed_callables` raises.
    """
    with torch.autocast('cuda', dtype, enabled=dtype is not None, cache_enabled=False):
        return torch.cuda.make_graphed_callables(model, (x.clone(),))


def captured_forward(self, input, target):
    if input.is_cuda and not hasattr(self, 'is_captured'):
        if isinstance(self.trainable_module, nn.parallel.DistributedDataParallel):
            raise ValueError('--device-modules timm_finet.cuda_graphs is for one process: do not use it with several.')
        dtype = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
        captured(self.trainable_module, input, dtype)
        self.is_captured = True
    return forward(self, input, target)


ClassificationTask.forward = captured_forward
