"""What runs otherwise on a GPU than on the CPU."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from scripts.bench.kernels import SHAPES, errors, exact_layer, inputs, run_layer
from timm_finet import FBNConv2d
from timm_finet.cuda_graphs import captured
from timm_finet.fbn import ReferenceFBNConv2d
from timm_finet.ops import moment_form

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='torch finds no GPU: run it where there is one')


def step(layer, x, grad_y, autocast=None):
    x = x.detach().clone().requires_grad_()
    with torch.autocast('cuda', autocast, enabled=autocast is not None):
        y = layer(x)
    y.backward(grad_y.to(y.dtype))
    return [y, x.grad, *(p.grad for p in layer.parameters()), layer.bn.running_mean, layer.bn.running_var]


@pytest.mark.parametrize('layout', [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize('dtype, autocast, error', [
    (torch.float64, None, 1e-12), (torch.float32, None, 2e-3),  # TF32 in convolutions, torch's default
    (torch.float32, torch.bfloat16, 2e-2), (torch.float32, torch.float16, 4e-3)])
def test_moment_form_is_the_papers_on_a_gpu(dtype, autocast, error, layout):
    torch.manual_seed(0)
    reference = ReferenceFBNConv2d(96, 64, fbn_groups=4, device='cuda', dtype=torch.float64)
    torch.nn.init.normal_(reference.bn.weight, 1, 0.3)
    layer = FBNConv2d(96, 64, fbn_groups=4, device='cuda', dtype=dtype)
    layer.load_state_dict(reference.state_dict())
    x = torch.randn(32, 96, 28, 28, device='cuda', dtype=torch.float64) + 5 * torch.randn(96, 1, 1, device='cuda')
    grad_y = torch.randn(32, 64, 28, 28, device='cuda', dtype=torch.float64)
    x, grad_y = (t.contiguous(memory_format=layout) for t in (x, grad_y))
    for got, expected in zip(step(layer, x.to(dtype), grad_y, autocast), step(reference, x, grad_y)):
        assert (got - expected).norm() <= error * expected.norm()


def test_captured_step_is_the_eager_one():
    torch.manual_seed(0)
    eager = timm.create_model('resnet18_fbn', small_input=True, num_classes=10).cuda().train()
    x, target = torch.randn(16, 3, 32, 32, device='cuda'), torch.randint(10, (16,), device='cuda')
    graph = captured(copy.deepcopy(eager), torch.randn_like(x))
    graph.load_state_dict(eager.state_dict())
    for model in (eager, graph):
        F.cross_entropy(model(x), target).backward()
    for a, b in zip([*eager.buffers(), *(p.grad for p in eager.parameters())],
                    [*graph.buffers(), *(p.grad for p in graph.parameters())]):
        assert (a - b).double().norm() <= 2e-2 * a.double().norm()


@pytest.fixture
def triton_passes(monkeypatch):
    pytest.importorskip('triton', reason='triton is missing: it comes with torch for CUDA and ROCm')
    monkeypatch.setattr(moment_form, 'TRITON', True)


@pytest.mark.parametrize('dtype, error', [(torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize('ratio', [0, 10])
@pytest.mark.parametrize('channels, out, groups', SHAPES + [
    (24, 100, 4), (100, 200, 4), (200, 200, 4), (400, 400, 4), (104, 104, 8), (64, 256, 2), (256, 64, 2),
    (512, 2048, 2)])
def test_triton_passes_are_the_definition_on_a_gpu(channels, out, groups, ratio, dtype, error, triton_passes):
    layer = inputs(channels, out, groups, dtype, ratio, (16, 27, 27), 'cuda')
    found = run_layer(*layer, groups, relu=True)
    y, mean, var, grad_x, *others = errors(found, exact_layer(*layer, groups, relu=found[0] > 0))
    assert max(y, grad_x) < error and max(mean, var, *others) < 2e-4
    again = run_layer(*layer, groups, relu=True)
    assert all(torch.equal(a, b) for a, b in zip(found, again))


@pytest.mark.parametrize('triton', [False, True])
def test_layers_in_a_graph_and_compiled_are_as_exact_as_eager_ones(triton, monkeypatch):
    if triton:
        pytest.importorskip('triton', reason='triton is missing: it comes with torch for CUDA and ROCm')
    monkeypatch.setattr(moment_form, 'TRITON', triton)
    torch.manual_seed(0)
    eager = torch.nn.Sequential(FBNConv2d(100, 100, fbn_groups=4), torch.nn.ReLU(), FBNConv2d(100, 72, fbn_groups=2))
    eager = eager.cuda().to(memory_format=torch.channels_last)
    x = torch.randn(8, 100, 28, 28, device='cuda').to(memory_format=torch.channels_last)
    grad_y = torch.randn(8, 72, 28, 28, device='cuda')
    exact = copy.deepcopy(eager).double()
    graph, compiled = captured(copy.deepcopy(eager), x, torch.bfloat16), torch.compile(copy.deepcopy(eager))
    graph.load_state_dict(eager.state_dict())
    exact(x.double()).backward(grad_y.double())
    errors = []
    for model in (eager, graph, compiled):
        with torch.autocast('cuda', torch.bfloat16):
            y = model(x)
        y.backward(grad_y.to(y.dtype))
        found = zip([*model.buffers(), *(p.grad for p in model.parameters())],
                    [*exact.buffers(), *(p.grad for p in exact.parameters())])
        errors.append([((a - b).double().norm() / b.double().norm()).item() for a, b in found])
    for of_eager, *of_others in zip(*errors):
        assert max(of_others) <= 2 * of_eager + 1e-3


def test_who_takes_triton_unasked(monkeypatch):
    monkeypatch.setattr(moment_form, 'TRITON', None)
    x = torch.randn(2, 8, 4, 4, device='cuda', dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    passes = moment_form.implementation(x, torch.float32)[0].__name__
    assert passes == ('TritonPasses' if torch.cuda.get_device_capability() == (9, 0) else 'TorchPasses')
    compiled = torch.compile(lambda x: (x, moment_form.implementation(x, torch.float32)[0].__name__), fullgraph=True)
    assert compiled(x)[1] == passes


def test_a_card_on_which_triton_fails_takes_torchs_passes(monkeypatch):
    monkeypatch.setattr(moment_form, 'TRITON', None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda *_: (9, 0))
    monkeypatch.setattr('timm_finet.ops.triton_launch.Plan.launch', lambda *_, **__: 1 / 0)
    moment_form.try_triton.cache_clear()
    x = torch.randn(2, 8, 4, 4, device='cuda', dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    try:
        with pytest.warns(UserWarning, match='ZeroDivisionError'):
            assert moment_form.implementation(x, torch.float32)[0].__name__ == 'TorchPasses'
    finally:
        moment_form.try_triton.cache_clear()
