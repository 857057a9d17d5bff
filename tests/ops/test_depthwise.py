"""DepthwiseConv2d: nn.Conv2d's results with another backward pass."""
from copy import deepcopy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_finet import fuse_fbn
from timm_finet.ops.depthwise import DepthwiseConv2d, _Strided


def twin(layer):
    conv = nn.Conv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, groups=layer.groups,
        bias=False)
    conv.load_state_dict(layer.state_dict())
    return conv.to(layer.weight.dtype)


def names(y):
    return {y.grad_fn.name()} | {node.name() for node, _ in y.grad_fn.next_functions if node}


@pytest.mark.parametrize('kernel, stride, size', [
    (3, (2, 2), (8, 8)), (3, (2, 2), (7, 9)), (5, (2, 2), (9, 8)), (3, (3, 3), (10, 11)), (3, (2, 1), (8, 9))])
def test_gradients_equal_conv2ds_in_float64(kernel, stride, size):
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, kernel, kernel, dtype=torch.float64, requires_grad=True)
    fast = _Strided.apply(x, weight, stride, (kernel // 2, kernel // 2))
    slow = F.conv2d(x, weight, None, stride, kernel // 2, 1, 6)
    grad = torch.randn_like(slow)
    torch.testing.assert_close(
        torch.autograd.grad(fast, (x, weight), grad), torch.autograd.grad(slow, (x, weight), grad))


@pytest.mark.parametrize('stride', [(2, 2), (2, 3)])
def test_second_derivatives_are_right(stride):
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, weight: _Strided.apply(x, weight, stride, (1, 1)), (x, weight))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_bfloat16_training_takes_the_fast_way_and_equals_conv2d(memory_format):
    layer = DepthwiseConv2d(8, 3, 2).to(memory_format=memory_format)
    other = twin(layer).to(memory_format=memory_format)
    grads = []
    for net in (layer, other):
        x = torch.linspace(-1, 1, 2 * 8 * 9 * 8).view(2, 8, 9, 8)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        with torch.autocast('cpu', torch.bfloat16):
            y = net(x)
        assert ('_StridedBackward' in names(y)) == (net is layer)
        assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=memory_format)
        y.backward(torch.ones_like(y))
        assert net.weight.grad.dtype == torch.float32
        grads.append((y.float(), x.grad, net.weight.grad))
    torch.testing.assert_close(*grads, rtol=0.01, atol=0.01)


@pytest.mark.parametrize('dtype, autocast, stride, training, is_fast', [
    (torch.float32, torch.bfloat16, 2, True, True), (torch.bfloat16, None, 2, True, True),
    (torch.float16, None, 2, True, True), (torch.float32, torch.float16, 3, True, True),
    (torch.float32, None, 2, True, False), (torch.float64, torch.bfloat16, 2, True, False),
    (torch.float32, torch.bfloat16, 1, True, False), (torch.float32, torch.bfloat16, 2, False, False)])
def test_the_fast_way_is_for_training_with_a_stride_in_16_bits(dtype, autocast, stride, training, is_fast):
    layer = DepthwiseConv2d(8, 3, stride, dtype=dtype).train(training)
    x, other = torch.randn(2, 8, 8, 8).to(dtype), twin(layer)
    with torch.autocast('cpu', autocast, enabled=autocast is not None):
        y, expected = layer(x), other(x)
    assert ('_StridedBackward' in names(y)) == is_fast
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-2)  # and the same dtype


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kernel', [3, 5, 7])
def test_only_strided_training_takes_the_fast_way(kernel, stride, training):
    layer = DepthwiseConv2d(8, kernel, stride).train(training)
    assert layer.padding == (kernel // 2, kernel // 2) and layer.bias is None
    x = torch.randn(2, 8, 9, 8)
    with torch.autocast('cpu', torch.bfloat16):
        y, expected = layer(x), twin(layer)(x)
    assert ('_StridedBackward' in names(y)) == (training and stride > 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_arguments_are_conv2ds():
    layer = DepthwiseConv2d(8, 3, device='meta', dtype=torch.float16)
    assert layer.stride == (1, 1) and layer.weight.is_meta and layer.weight.dtype == torch.float16


def test_exported_and_scripted_it_is_conv2d():
    x = torch.randn(2, 8, 8, 8)
    layer = DepthwiseConv2d(8, 3, 2).eval()
    exported = torch.export.export(layer, (x,))
    assert [n.target for n in exported.graph.nodes if n.op == 'call_function'] == [torch.ops.aten.conv2d.default]
    torch.testing.assert_close(torch.jit.script(deepcopy(layer))(x), layer(x))
    assert list(layer.state_dict()) == ['weight']
    in_training = torch.export.export(DepthwiseConv2d(8, 3, 2, dtype=torch.bfloat16), (x.bfloat16(),))
    assert torch.ops.aten.conv2d.default in [node.target for node in in_training.graph.nodes]


def test_frozen_layers_and_images_get_no_gradient():
    x, layer = torch.randn(2, 8, 8, 8, dtype=torch.bfloat16), DepthwiseConv2d(8, 3, 2, dtype=torch.bfloat16)
    layer(x).sum().backward()
    assert layer.weight.grad is not None and x.grad is None
    layer.requires_grad_(False)
    layer.weight.grad = None
    layer(x.requires_grad_()).sum().backward()
    assert layer.weight.grad is None and x.grad is not None


def test_fused_it_is_a_plain_convolution(randomise):
    net = randomise(nn.Sequential(DepthwiseConv2d(8, 3, 2), nn.BatchNorm2d(8))).eval()
    fused = fuse_fbn(net)
    x = torch.randn(2, 8, 8, 8)
    assert type(fused[0]) is nn.Conv2d and isinstance(fused[1], nn.Identity)
    torch.testing.assert_close(fused(x), net(x))


def test_compiled_training_takes_the_fast_way():
    torch.compiler.reset()
    layer = DepthwiseConv2d(8, 3, 2)
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    grads = []
    for net in (layer, torch.compile(layer, backend='aot_eager', fullgraph=True)):
        with torch.autocast('cpu', torch.bfloat16):
            y = net(x)
        grads.append(torch.autograd.grad(y.float().square().sum(), (x, layer.weight)))
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)
