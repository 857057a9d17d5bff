"""For train.py's `--device-modules timm_finet.cuda_graphs`: forward and backward pass of a classifier as CUDA graphs.

A training step of FBN is some thousand small kernels. Where the host launches them more slowly than the GPU runs them,
a graph, launched as a whole, lets the GPU set the pace. For one process, batches of one size and networks that decide
nothing on the host; DistributedDataParallel, whose gradients a graph would not exchange, is refused. Evaluation is not
captured; without a GPU nothing is.
"""
from typing import Optional

import torch
import torch.nn as nn
from timm.task import ClassificationTask

__all__ = ['captured']

forward = ClassificationTask.forward


def captured(model: nn.Module, x: torch.Tensor, dtype: Optional[torch.dtype] = None) -> nn.Module:
    """`model`, in whose train mode every batch now replays a graph.

    Args:
        model: On the GPU, in train mode, without hooks.
        x: A batch: shape, dtype and memory format of all that follow.
        dtype: Of autocast, if that is to be captured.
    """
    with torch.autocast('cuda', dtype, enabled=dtype is not None, cache_enabled=False):
        return torch.cuda.make_graphed_callables(model, (x.clone(),))


def captured_forward(self, input, target):
    if input.is_cuda and not hasattr(self, 'is_captured'):
        if isinstance(self.trainable_module, nn.parallel.DistributedDataParallel):
            raise ValueError('--device-modules timm_finet.cuda_graphs is for one process: leave it out of several.')
        dtype = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
        captured(self.trainable_module, input, dtype)
        self.is_captured = True
    return forward(self, input, target)


ClassificationTask.forward = captured_forward
