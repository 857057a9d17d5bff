"""Synchronised statistics, forms and layers against the joined batch in one process.

Threads replace the processes here, so that a test takes milliseconds; test_distributed.py uses real processes.
"""
import threading
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from timm_finet.fbn import FBNConv2d, as_reference
from timm_finet.ops.moment_form import MomentForm
from timm_finet.ops.recomputed import RecomputedNorm
from timm_finet.ops.reference import fbn_reference
from timm_finet.ops.sync import pool_moments, sync_batch_norm
from timm_finet.ops.torch_passes import moments_dtype

GROUP = 'a process group of their own'
SPLIT = (3, 0, 1, 5)  # images in each process


@pytest.fixture
def processes(monkeypatch):
    """Run a function of the rank in threads, one for each part of `SPLIT`; `dist.all_reduce` sums over the threads."""
    barrier, handed = threading.Barrier(len(SPLIT), timeout=30), {}

    def all_reduce(tensor, group):
        assert group == GROUP
        handed[threading.get_ident()] = tensor.clone()
        barrier.wait()
        total = sum(handed.values())
        barrier.wait()
        tensor.copy_(total)

    def run_one(work, rank):
        try:
            return work(rank)
        except BaseException:
            barrier.abort()  # the others would wait for this one
            raise

    def run(work):
        handed.clear()
        barrier.reset()
        with ThreadPoolExecutor(len(SPLIT)) as pool:
            futures = [pool.submit(run_one, work, rank) for rank in range(len(SPLIT))]
        errors = [future.exception() for future in futures if future.exception()]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]
    monkeypatch.setattr(dist, 'all_reduce', all_reduce)
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda group: len(SPLIT) if group == GROUP else 1)
    return run


def leaves(*values):
    return [None if v is None else v.detach().clone().requires_grad_() for v in values]


def gradients(y, grad_y, inputs):
    return torch.autograd.grad(y, [v for v in inputs if v is not None], grad_y)


def joined(found):
    """Join all processes' outputs, statistics and gradients (the input's first) to those of one batch."""
    outputs, statistics, grads = zip(*found)
    for each in statistics:
        torch.testing.assert_close(each, statistics[0])
    grad_x, *others = zip(*grads)
    return [torch.cat(outputs), *statistics[0], torch.cat(grad_x), *map(sum, others)]


def whole(channels, out, groups, affine=True, kernel=1, size=(5, 4)):
    x = torch.randn(sum(SPLIT), channels, *size, dtype=torch.float64) * 2 + 3
    weight = torch.randn(out, channels, kernel, kernel, dtype=torch.float64)
    gamma, beta = torch.rand(2, groups * out, dtype=torch.float64) + 0.5
    return x, weight, *((gamma, beta) if affine else (None, None))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_pooled_moments_are_those_of_the_joined_batch(dtype, processes):
    x = torch.randn(sum(SPLIT), 6, 5, 4, dtype=dtype) * torch.rand(6, 1, 1) + 3

    def moments(x):
        c = x.transpose(0, 1).flatten(1)
        mean = c.mean(1) if c.numel() else torch.zeros(6, dtype=dtype)
        c = (c - mean[:, None]).view(2, 3, -1)
        return c.shape[2], mean, c @ c.mT / max(c.shape[2], 1)
    count, *expected = moments(x)
    for total, *found in processes(lambda rank: pool_moments(*moments(x.split(SPLIT)[rank]), GROUP)):
        assert total == count
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('eps', [1e-5, 0.7])
@pytest.mark.parametrize('size', [(), (5,), (5, 4)])
def test_batch_norm_is_that_of_the_joined_batch(size, eps, affine, processes):
    x, _, gamma, beta = whole(4, 2, 2, affine)
    x = x.flatten(2)[:, :, 0] if not size else x[:, :, :, 0] if len(size) == 1 else x
    grad_y = torch.randn_like(x)

    def work(rank):
        inputs, mean, var = leaves(x.split(SPLIT)[rank], gamma, beta), *x.new_empty(2, 4)
        y = sync_batch_norm(inputs[0], mean, var, *inputs[1:], eps, GROUP)
        return y.detach(), (mean, var), gradients(y, grad_y.split(SPLIT)[rank], inputs)
    inputs, mean, var = leaves(x, gamma, beta), *x.new_empty(2, 4)
    y = F.batch_norm(inputs[0], mean, var, *inputs[1:], True, 1., eps)
    torch.testing.assert_close(joined(processes(work)), [y.detach(), mean, var, *gradients(y, grad_y, inputs)])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_has_float32_statistics(dtype, processes):
    """Float16 sums of squares overflow at 65504."""
    x = (torch.randn(sum(SPLIT), 4, 16, 16) * 10 + 50).to(dtype)

    def work(rank):
        mean, var = torch.empty(2, 4)
        return sync_batch_norm(x.split(SPLIT)[rank], mean, var, None, None, 1e-5, GROUP), mean, var
    exact = x.double()
    for part, (y, mean, var) in zip(x.split(SPLIT), processes(work)):
        torch.testing.assert_close((mean.double(), var.double()), (exact.mean((0, 2, 3)), exact.var((0, 2, 3))),
                                   rtol=1e-5, atol=0)
        assert y.dtype == dtype and y.shape == part.shape
        expected = (part.double() - exact.mean((0, 2, 3), True)) / exact.std((0, 2, 3), correction=0, keepdim=True)
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('eps', [1e-5, 0.7])
def test_moment_form_is_the_definition_on_the_joined_batch(eps, affine, relu, processes):
    x, *rest = whole(12, 10, 3, affine)
    grad_y = torch.randn(sum(SPLIT), 10, 5, 4, dtype=torch.float64)

    def work(rank):
        inputs = leaves(x.split(SPLIT)[rank], *rest)
        running = torch.zeros(30).double(), torch.ones(30).double(), 0.3, None
        MomentForm.apply(*inputs, 3, eps, GROUP, relu, running)
        y, mean, var, count = MomentForm.apply(*inputs, 3, eps, GROUP, relu)
        assert count == sum(SPLIT) * 20 and not mean.requires_grad and not var.requires_grad
        return y.detach(), (mean, var, *running[:2]), gradients(y, grad_y.split(SPLIT)[rank], inputs)
    inputs = leaves(x, *rest)
    y, mean, var = fbn_reference(*inputs, 3, eps)
    y = y.relu() if relu else y
    mean, var = mean.detach(), var.detach()
    statistics = mean, var, 0.3 * mean, 0.7 + 0.3 * var * 180 / 179
    torch.testing.assert_close(joined(processes(work)), [y.detach(), *statistics, *gradients(y, grad_y, inputs)])


CONVOLUTIONS = [((1, 1), (0, 0), (1, 1)), ((2, 1), (1, 2), (1, 2))]


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('conv', CONVOLUTIONS)
@pytest.mark.parametrize('eps', [1e-5, 0.7])
def test_recomputed_form_is_the_definition_on_the_joined_batch(eps, conv, affine, processes):
    x, *rest = whole(4, 3, 1, affine, 3, (7, 9))
    grad_y = torch.randn_like(F.conv2d(x, rest[0], None, *conv))

    def work(rank):
        inputs = leaves(x.split(SPLIT)[rank], *rest)
        y, mean, var = RecomputedNorm.apply(*inputs, eps, conv, torch.contiguous_format, GROUP)
        assert not mean.requires_grad and not var.requires_grad
        return y.detach(), (mean, var), gradients(y, grad_y.split(SPLIT)[rank], inputs)
    inputs = leaves(x, *rest)
    y, mean, var = fbn_reference(*inputs, 1, eps, *conv)
    count = y.numel() // 3
    statistics = mean.detach(), var.detach() * count / (count - 1)
    torch.testing.assert_close(joined(processes(work)), [y.detach(), *statistics, *gradients(y, grad_y, inputs)])


class NoGradient(torch.autograd.Function):
    """The identity, without a gradient for its input."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize('form', ['moments', 'recomputed'])
def test_a_process_that_is_handed_no_gradient_joins_the_others(form, processes):
    x, *rest = whole(6, 4, 1)
    grad_y = torch.randn(sum(SPLIT), 4, 5, 4, dtype=torch.float64)
    grad_y[:SPLIT[0]] = 0

    def apply(x, weight, gamma, beta, group):
        if form == 'moments':
            return MomentForm.apply(x, weight, gamma, beta, 1, 1e-5, group)
        return RecomputedNorm.apply(x, weight, gamma, beta, 1e-5, CONVOLUTIONS[0], torch.contiguous_format, group)

    def work(rank):
        inputs = leaves(x.split(SPLIT)[rank], *rest)
        y = apply(*inputs, GROUP)[0]
        return y.detach(), (), gradients(y if rank else NoGradient.apply(y), grad_y.split(SPLIT)[rank], inputs)
    inputs = leaves(x, *rest)
    y = fbn_reference(*inputs, 1, 1e-5)[0]
    torch.testing.assert_close(joined(processes(work)), [y.detach(), *gradients(y, grad_y, inputs)])
    for grad in gradients(NoGradient.apply(apply(*inputs, None)[0]), y.detach(), inputs):  # without a group
        assert grad.eq(0).all()


LAYERS = {
    '1x1': dict(), '1x1, strided': dict(stride=2), 'momentum None': dict(momentum=None),
    'not affine': dict(affine=False), 'eps': dict(eps=0.7), '3x3': dict(kernel_size=3, padding=1),
    '3x3, eps': dict(kernel_size=3, eps=0.7), 'one group': dict(fbn_groups=1, save_memory=True)}


@pytest.mark.parametrize('dtype, autocast', [
    (torch.float64, None), (torch.float64, torch.bfloat16), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize('name', LAYERS)
def test_layer_is_that_of_the_joined_batch(name, dtype, autocast, processes):
    layer = FBNConv2d(**{**dict(in_channels=8, out_channels=6, fbn_groups=2), **LAYERS[name]}, dtype=dtype)
    x, grad_y = torch.randn(sum(SPLIT), 8, 6, 5, dtype=dtype) + 2, torch.randn(sum(SPLIT), 6, 6, 5, dtype=dtype)

    def train(layer, x, grad_y, autocast=None):
        inputs = [*leaves(x), *layer.parameters()]
        with torch.autocast('cpu', autocast, enabled=autocast is not None):
            layer(x + 1)
            y = layer(inputs[0])
        grad_y = grad_y[:, :, :y.shape[2], :y.shape[3]].to(y)
        return y.detach(), tuple(layer.bn.buffers()), torch.autograd.grad(y, inputs, grad_y)

    def work(rank):
        mine = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(layer), GROUP)
        return train(mine, x.split(SPLIT)[rank], grad_y.split(SPLIT)[rank], autocast)
    exact = as_reference(deepcopy(layer).double())
    (y, statistics, grads), error = train(exact, x.double(), grad_y.double()), 1e-9
    found = processes(work)
    if dtype != torch.float64:
        error = 0.03
        assert all(part.dtype == autocast for part, *_ in found)
    for a, b in zip(joined(found), [y, *statistics, *grads], strict=True):
        assert (a.double() - b).norm() <= error * b.double().norm()


def test_processes_of_the_split_compute_moments_in_different_dtypes(processes):
    """A process with few positions uses float64; all processes have to send the same dtype."""
    assert len({moments_dtype(part, 2) for part in torch.empty(sum(SPLIT), 60, 6, 5).split(SPLIT)}) == 2


@pytest.mark.parametrize('kernel, message', [
    (1, 'once_differentiable'), (3, '^FBN with synchronised statistics has no second derivatives.$')])
def test_second_derivatives_are_refused(kernel, message, processes):
    layer = FBNConv2d(8, 6, kernel, fbn_groups=2)
    nn.SyncBatchNorm.convert_sync_batchnorm(layer, GROUP)

    def work(rank):
        x = torch.randn(2, 8, 6, 6, requires_grad=True)
        (grad,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        grad.sum().backward()
    with pytest.raises(RuntimeError, match=message):
        processes(work)


def test_without_running_statistics_evaluation_takes_those_of_its_own_batch(processes):
    """torch's SyncBatchNorm does the same, without communication."""
    layer = FBNConv2d(8, 6, fbn_groups=2).double()
    layer.bn = nn.SyncBatchNorm(12, track_running_stats=False, process_group=GROUP, dtype=torch.float64)
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64)
    expected = fbn_reference(x, layer.weight, layer.bn.weight, layer.bn.bias, 2, 1e-5)[0]
    torch.testing.assert_close(layer.eval()(x), expected)
