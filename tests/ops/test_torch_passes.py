"""The moment form's passes in torch's operators: their precision, and when Triton's are used instead."""
import runpy
from contextlib import nullcontext
from threading import Event, Thread

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from timm_finet import FBNConv2d
from timm_finet.ops import moment_form
from timm_finet.ops.torch_passes import TorchPasses, full_precision, group_products, memory_format, moments_dtype


@pytest.mark.parametrize('dtype, wide', [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64)])
@pytest.mark.parametrize('shape, groups', [((2, 8, 4, 4), 1), ((1, 24, 3, 8), 4), ((4, 8, 1, 8), 1)])
def test_moments_of_few_positions_are_taken_in_float64(shape, groups, dtype, wide):
    """Few means fewer than four positions for each channel of a group."""
    x = torch.empty(shape, dtype=dtype)
    assert moments_dtype(x, groups) == wide
    assert moments_dtype(x[..., 1:], groups) == torch.float64


@pytest.mark.parametrize('device, backend', [
    ('cpu', torch.backends.mkldnn.matmul), ('cuda', torch.backends.cuda.matmul)])
def test_products_keep_full_precision_whatever_is_switched_on(device, backend):
    before, backend.fp32_precision = backend.fp32_precision, 'tf32'
    try:
        with pytest.raises(KeyError), full_precision(torch.device(device)):
            assert backend.fp32_precision == 'ieee'
            raise KeyError
        assert backend.fp32_precision == 'tf32'
    finally:
        backend.fp32_precision = before


def test_threads_leave_the_precision_as_it_was():
    """nn.DataParallel runs a layer in several threads, which share the setting: one may restore another's value."""
    backend, entered, leave = torch.backends.mkldnn.matmul, Event(), Event()
    before = backend.fp32_precision

    def other():
        with full_precision(torch.device('cpu')):
            entered.set()
            leave.wait(10)
    thread = Thread(target=other)
    try:
        with full_precision(torch.device('cpu')):
            thread.start()
            entered.wait(0.2)
        leave.set()
        thread.join()
        assert backend.fp32_precision == before
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('mean', [0, 1000])
def test_moments_do_not_cancel(mean, layout):
    """Covariances in float32 stay precise where channels have different means of up to a thousand deviations."""
    means = mean * torch.linspace(-1, 1, 12).view(12, 1, 1)
    x = (torch.randn(6, 12, 17, 19) * torch.rand(12, 1, 1) + means).contiguous(memory_format=layout)
    shift, rest, cov = TorchPasses(x).moments(3, torch.float32)
    c = x.double().transpose(0, 1).flatten(1)
    exact = torch.stack([torch.cov(group, correction=0) for group in c.chunk(3)])
    assert (cov.double() - exact).norm() < 1e-6 * exact.norm()
    assert (shift.double() + rest - c.mean(1)).norm() < 1e-6 * c.std(1).norm() + 1e-7 * c.mean(1).norm()
    assert TorchPasses(x).c.is_contiguous(memory_format=memory_format(x)) and memory_format(x) == layout


@pytest.fixture
def factors(monkeypatch):
    """Record the shapes of the products' first factors, and let a CPU return products in another dtype, as GPUs do."""
    bmm, shapes = torch.bmm, []

    def wider(a, b, out_dtype=None):
        shapes.append(tuple(a.shape))
        return bmm(a, b) if out_dtype is None else bmm(a.to(out_dtype), b.to(out_dtype))
    monkeypatch.setattr(torch, 'bmm', wider)
    return shapes


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('groups', [1, 3, 12])
def test_products_within_the_groups(groups, dtype, factors):
    c = torch.randn(3, 12, 15, 14).to(dtype)
    flat = c.double().transpose(0, 1).reshape(groups, 12 // groups, -1)
    found = group_products(c, groups, torch.float32)
    assert found.dtype == torch.float32 and found.is_contiguous()
    torch.testing.assert_close(found.double(), flat @ flat.mT, rtol=1e-5, atol=1e-3)
    assert len(factors) == (groups if dtype == torch.float32 else 1)


@pytest.mark.parametrize('dtype, channels, groups, positions, splits', [
    (torch.float32, 8, 2, 254, 1), (torch.float32, 8, 2, 4096, 16), (torch.float32, 200, 2, 3600, 9),
    (torch.float32, 8, 2, 4110, 15), (torch.float32, 8, 2, 4099, 1),
    (torch.bfloat16, 8, 2, 4096, 16), (torch.bfloat16, 100, 4, 3600, 9), (torch.bfloat16, 8, 2, 64000, 64),
    (torch.bfloat16, 8, 2, 4110, 15)])
def test_sums_of_products_are_split_where_rounding_would_grow(dtype, channels, groups, positions, splits, factors):
    group_products(torch.randn(1, channels, positions, 1).to(dtype), groups, torch.float32)
    width = channels // groups if dtype == torch.float32 else channels
    assert set(factors) == {(splits, width, positions // splits)}


def test_the_shift_is_each_channels_mean_over_a_sixteenth_of_the_positions():
    x = torch.randn(3, 5, 9, 11) + torch.arange(5.).view(5, 1, 1)
    passes = TorchPasses(x)
    torch.testing.assert_close(passes.shift, x[:, :, [0, 4, 8]][..., [0, 4, 8]].mean((0, 2, 3)))
    torch.testing.assert_close(passes.c, x - passes.shift.view(5, 1, 1))


def test_triton_is_for_half_precision_in_channels_last_on_a_gpu_where_it_works(monkeypatch):
    pytest.importorskip('triton', '3.6', reason='Triton 3.6 is missing: it comes with torch for CUDA and ROCm')
    asked = []
    monkeypatch.setattr(moment_form, 'TRITON', None)
    monkeypatch.setattr(moment_form, 'triton_works', lambda device: asked.append(device) or True)

    def passes(dtype=torch.float16, moments=torch.float32, format=torch.channels_last, shape=(2, 8, 3, 3)):
        x = torch.empty(shape, dtype=dtype).to(memory_format=format)
        return moment_form.implementation(x, moments)[0].__name__
    assert passes() == 'TorchPasses' and asked == []
    monkeypatch.setattr(torch.Tensor, 'is_cuda', True)
    assert passes() == passes(torch.bfloat16) == 'TritonPasses'
    assert asked == [torch.device('cpu')] * 2
    for others in (dict(dtype=torch.float32), dict(moments=torch.float64), dict(format=torch.contiguous_format),
                   dict(shape=(0, 8, 3, 3))):
        assert passes(**others) == 'TorchPasses'
    monkeypatch.setattr(moment_form, 'triton_works', lambda device: False)
    assert passes() == 'TorchPasses'
    for switch in (True, False):
        monkeypatch.setattr(moment_form, 'TRITON', switch)
        assert passes() == ('TritonPasses' if switch else 'TorchPasses')


@pytest.fixture
def fake_gpu():
    try:
        with FakeTensorMode():
            torch.empty(1, device='cuda').uniform_()
    except RuntimeError:  # in torch 2.9 with CUDA but no driver
        pytest.skip('this torch cannot pretend to have a GPU')


@pytest.mark.parametrize('switch', [True, None])
def test_tensors_without_memory_take_torchs_passes(switch, fake_gpu, monkeypatch):
    monkeypatch.setattr(moment_form, 'TRITON', switch)
    with FakeTensorMode():
        layer = FBNConv2d(16, 24, fbn_groups=4, device='cuda', dtype=torch.bfloat16)
        x = torch.empty(8, 16, 16, 16, device='cuda', dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        y = layer(x)
    assert y.shape == (8, 24, 16, 16) and y.is_cuda


@pytest.mark.parametrize('capability, hip, installed, fails, works', [
    ((9, 0), None, True, False, True), ((8, 0), None, True, False, False), ((9, 0), '6.4', True, False, False),
    ((9, 0), None, False, False, False), ((9, 0), None, True, True, False)])
def test_triton_works_on_the_cards_that_it_was_tested_on_if_it_can_compile(
        capability, hip, installed, fails, works, monkeypatch):
    triton_passes = pytest.importorskip('timm_finet.ops.triton_passes', reason='triton is missing')

    def adds_up(device):
        if fails:
            raise RuntimeError('no C compiler')
        return True
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    monkeypatch.setattr(torch.version, 'hip', hip)
    monkeypatch.setattr(moment_form, 'HAS_TRITON', installed)
    monkeypatch.setattr(triton_passes, 'adds_up', adds_up)
    with pytest.warns(UserWarning, match='no C compiler') if fails else nullcontext():
        assert moment_form.try_triton.__wrapped__(torch.device('cuda', 0)) == works


@pytest.mark.parametrize('version, correct', [('3.5.1', False), ('3.6.0', True), ('3.10.0+git', True), ('4.0.0', True)])
@pytest.mark.filterwarnings('ignore:.*found in sys.modules')  # it is run a second time
def test_triton_that_miscompiles_a_kernel_is_not_used(version, correct, monkeypatch):
    monkeypatch.setattr(pytest.importorskip('triton', reason='triton is missing'), '__version__', version)
    assert runpy.run_module(moment_form.__name__)['HAS_TRITON'] == correct


def test_the_passes_of_a_gpu_are_compiled_whole(fake_gpu):
    """In a backward pass torch.compile does not know the layout of computed tensors: asking for it is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = [FBNConv2d(12, 16, fbn_groups=4, device='cuda'), FBNConv2d(16, 12, fbn_groups=4, device='cuda')]
        model = torch.compile(torch.nn.Sequential(*layers), backend='eager', fullgraph=True)
        y = model(torch.randn(8, 12, 16, 16, device='cuda').to(memory_format=torch.channels_last))
    assert y.is_cuda and y.is_contiguous(memory_format=torch.channels_last)
