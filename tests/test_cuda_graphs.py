"""How a classifier's step is captured, without a GPU to do so; test_gpu.py has what the graph computes."""
from types import SimpleNamespace

import pytest
import timm
import torch
from timm.task import ClassificationTask

from timm_finet import cuda_graphs


class OnGPU(torch.Tensor):
    is_cuda = True


def test_a_step_without_a_gpu_is_timms(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', None)
    task = ClassificationTask(timm.create_model('finet_small_g4', small_input=True), device=torch.device('cpu'))
    assert task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))['loss'] > 0


def test_a_step_is_captured_once_and_keeps_no_cast_weights(monkeypatch):
    calls = []

    def make_graphed_callables(model, args):
        calls.append((model, args, torch.is_autocast_cache_enabled()))
        return model

    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', make_graphed_callables)
    model, x = torch.nn.Flatten(), torch.randn(2, 3, 32, 32)
    monkeypatch.setattr(cuda_graphs, 'forward', lambda task, x, target: x)

    task = ClassificationTask(model, device=torch.device('cpu'))
    for _ in range(2):
        task(x.as_subclass(OnGPU), None)
    (captured_model, (batch,), keeps_casts), = calls
    assert captured_model is model and batch is not x and batch.shape == x.shape and not keeps_casts


def test_several_processes_whose_gradients_would_not_be_exchanged_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'make_graphed_callables', None)
    DDP = torch.nn.parallel.DistributedDataParallel
    with pytest.raises(ValueError, match='cuda_graphs is for one process'):
        ClassificationTask.forward(
            SimpleNamespace(trainable_module=DDP.__new__(DDP)), torch.zeros(2, 3, 32, 32).as_subclass(OnGPU), None)
