"""For train.py's --device-modules: a classifier's forward and backward pass as two CUDA graphs.

A training step of FBN is some thousand small kernels. Where the host launches them more slowly than the GPU runs them,
a graph, launched as a whole, lets the GPU set the pace. For one process, batches of one size and networks that decide
nothing on the host; evaluation is not captured.
"""
import torch
from timm.task import ClassificationTask

forward = ClassificationTask.forward


def captured(model, x, dtype):
    """`model`, whose training forward now replays a graph, for batches like `x`, under autocast to `dtype` or None."""
    with torch.autocast('cuda', dtype, enabled=dtype is not None, cache_enabled=False):
        return torch.cuda.make_graphed_callables(model, (x.clone(),))


def captured_forward(self, input, target):
    if not hasattr(self, 'is_captured'):
        dtype = torch.get_autocast_dtype('cuda') if torch.is_autocast_enabled('cuda') else None
        captured(self.trainable_module, input, dtype)
        self.is_captured = True
    return forward(self, input, target)


ClassificationTask.forward = captured_forward
