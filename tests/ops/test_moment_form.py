"""The moment form against the definition in float64, also with ReLU inside and with a process without images."""
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run_processes

from timm_finet.ops import moment_form
from timm_finet.ops.moment_form import MomentForm, TorchAlgebra, implementation
from timm_finet.ops.reference import fbn_reference
from timm_finet.ops.torch_passes import TorchPasses, group_products

SPLIT = (0, 3)  # images in each process


def layer(channels, out, groups, images):
    x = torch.randn(images, channels, 5, 4, dtype=torch.float64) * 2 + 3
    weight = torch.randn(out, channels, 1, 1, dtype=torch.float64)
    gamma, beta = torch.rand(groups * out, dtype=torch.float64) + 0.5, torch.randn(groups * out, dtype=torch.float64)
    return x, weight, gamma, beta


def gradients(y, grad_y, inputs):
    return torch.autograd.grad(y, [v for v in inputs if v is not None], grad_y)


def test_the_definition_at_one_group_is_a_convolution_and_batchnorm():
    x, weight = torch.randn(3, 4, 7, 6, dtype=torch.float64), torch.randn(5, 4, 3, 3, dtype=torch.float64)
    y, mean, var = fbn_reference(x, weight, None, None, 1, 0.1)
    z = F.conv2d(x, weight)
    torch.testing.assert_close((mean, var), (z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)))
    torch.testing.assert_close(y, F.batch_norm(z, None, None, training=True, eps=0.1))


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_agrees_with_the_definition(layout, affine, relu):
    x, *rest = layer(12, 10, 3, 4)
    inputs = [v.requires_grad_() for v in (x.contiguous(memory_format=layout), *(rest if affine else rest[:1]))]
    inputs += [None, None][:4 - len(inputs)]
    y, mean, var, count = MomentForm.apply(*inputs, 3, 1e-5, None, relu)
    expected, expected_mean, expected_var = fbn_reference(*inputs, 3, 1e-5)
    if relu:
        expected = expected.relu()
    grad_y = torch.randn_like(y)
    torch.testing.assert_close((y, mean, var), (expected, expected_mean, expected_var))
    torch.testing.assert_close(gradients(y, grad_y, inputs), gradients(expected, grad_y, inputs))
    assert count == 80 and y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_running_statistics_move_in_their_own_dtype(dtype):
    x, *rest = layer(12, 10, 3, 4)
    running = torch.zeros(30, dtype=dtype), torch.ones(30, dtype=dtype)
    _, mean, var, _ = MomentForm.apply(x, *rest, 3, 1e-5, None)
    MomentForm.apply(x, *rest, 3, 1e-5, None, False, (*running, 0.3, batches := torch.tensor(6)))
    assert batches == 7
    torch.testing.assert_close(running, ((0.3 * mean).to(dtype), (0.7 + 0.3 * var * 80 / 79).to(dtype)))


def test_relu_inside_keeps_no_second_output():
    x, *rest = (v.requires_grad_() for v in layer(12, 10, 3, 4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, *_ = MomentForm.apply(x, *rest, 3, 1e-5, None, True)
    large = {t.data_ptr() for t in saved if t is not None and t.numel() >= y.numel()}
    assert large == {x.data_ptr(), y.data_ptr()}


def test_no_positions_have_no_products():
    assert torch.equal(group_products(torch.empty(0, 6, 4, 4), 2, torch.float32), torch.zeros(2, 3, 3))


@pytest.mark.parametrize('triton', [True, False])
@pytest.mark.parametrize('change, taken', [
    (dict(), True), (dict(dtype=torch.bfloat16), True), (dict(dtype=torch.float32), True), (dict(images=0), False),
    (dict(layout=torch.contiguous_format), False), (dict(moments=torch.float64), False), (dict(device='meta'), False)])
def test_which_inputs_take_tritons_passes(change, taken, triton, monkeypatch):
    """Triton's interpreter also takes float32; a GPU takes only half precision."""
    passes = SimpleNamespace(TritonPasses=object(), TritonAlgebra=object())
    monkeypatch.setitem(sys.modules, 'timm_finet.ops.triton_passes', passes)
    monkeypatch.setattr(moment_form, 'TRITON', triton)
    monkeypatch.setattr(moment_form, 'INTERPRETED', True)
    case = dict(dict(dtype=torch.float16, images=2, layout=torch.channels_last, moments=torch.float32, device='cpu'),
                **change)
    x = torch.empty(case['images'], 8, 6, 6, dtype=case['dtype'], device=case['device'])
    x = x.contiguous(memory_format=case['layout'])
    expected = (passes.TritonPasses, passes.TritonAlgebra) if taken and triton else (TorchPasses, TorchAlgebra)
    assert implementation(x, case['moments']) == expected
    monkeypatch.setattr(moment_form, 'INTERPRETED', False)
    assert implementation(x, case['moments']) == (TorchPasses, TorchAlgebra)


def worker(rank, folder):
    x, grad_y, *rest = torch.load(f'{folder}/job.pt')
    inputs = [v.requires_grad_() for v in (x.split(SPLIT)[rank].clone(), *rest)]
    y, mean, var, count = MomentForm.apply(*inputs, 2, 1e-5, dist.group.WORLD)
    torch.save((y.detach(), mean, var, count, gradients(y, grad_y.split(SPLIT)[rank], inputs)), f'{folder}/{rank}.pt')


@pytest.mark.slow  # it starts processes
def test_a_process_without_images_joins_the_others(tmp_path):
    x, *rest = layer(8, 6, 2, sum(SPLIT))
    grad_y = torch.randn(sum(SPLIT), 6, 5, 4, dtype=torch.float64)
    torch.save((x, grad_y, *rest), tmp_path / 'job.pt')
    run_processes(worker, tmp_path)
    (y0, *statistics0, grads0), (y1, *statistics1, grads1) = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    inputs = [v.requires_grad_() for v in (x, *rest)]
    expected, mean, var = fbn_reference(*inputs, 2, 1e-5)
    torch.testing.assert_close(torch.cat((y0, y1)), expected.detach())
    for found in (statistics0, statistics1):
        torch.testing.assert_close(found, [mean.detach(), var.detach(), torch.tensor(60.).double()])
    grad_x, *others = gradients(expected, grad_y, inputs)
    torch.testing.assert_close(torch.cat((grads0[0], grads1[0])), grad_x)
    for mine, theirs, whole in zip(grads0[1:], grads1[1:], others):
        torch.testing.assert_close(mine + theirs, whole)
