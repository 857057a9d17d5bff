"""The Triton passes in Triton's interpreter, on the CPU, against float64; test_triton_passes.py runs these tests.

The interpreter must be switched on before Triton is imported, so these tests run in a separate process. Memory that a
pass allocates is filled with NaN. `bfloat16_values` replaces wrong functions of the interpreter.
"""
import os

os.environ.update(TRITON_INTERPRET='1', TIMM_FINET_TRITON='1')

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from scripts.bench.kernels import (  # noqa: E402
    bfloat16_values, errors, exact_layer, inputs, recorded_launches, run_layer)
from timm_finet.ops import triton_passes  # noqa: E402
from timm_finet.ops.moment_form import MomentForm, TorchAlgebra, implementation  # noqa: E402
from timm_finet.ops.torch_passes import TorchPasses  # noqa: E402
from timm_finet.ops.triton_passes import TritonPasses  # noqa: E402

ROUNDING = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of a result of that dtype
STATISTICS = 5e-5  # of float32 sums of half precision
LAYERS = [  # channels, out, G, positions, dtype: tiles of several groups, one group, half a group
    (6, 24, 1, (2, 5, 7), torch.float16), (12, 6, 2, (2, 5, 7), torch.float32), (25, 10, 1, (2, 9, 11), torch.float32),
    (100, 40, 4, (2, 9, 11), torch.float16), (50, 50, 1, (2, 11, 13), torch.float16),
    (100, 130, 1, (2, 11, 19), torch.float16), (200, 30, 8, (2, 9, 11), torch.float32),
    (200, 24, 1, (2, 19, 22), torch.float16)]


@pytest.fixture(autouse=True)
def poisoned():
    torch.use_deterministic_algorithms(True)  # fills allocated memory with NaN
    assert torch.empty(3).isnan().all()
    with bfloat16_values():
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('channels, out, groups, shape, dtype', LAYERS)
def test_layer_is_the_definition(channels, out, groups, shape, dtype):
    layer = inputs(channels, out, groups, dtype, shape=shape)
    with recorded_launches() as launches:
        found = run_layer(*layer, groups)
    assert len(launches) == 8  # four forward, four backward
    y, mean, var, grad_x, *others = errors(found, exact_layer(*layer, groups))
    assert max(y, grad_x) < ROUNDING[dtype] and max(mean, var, *others) < STATISTICS


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('ratio', [1, 10, 100])
def test_a_mean_of_many_deviations_costs_nothing(ratio, dtype):
    layer = inputs(24, 40, 4, dtype, ratio, (4, 14, 15))
    y, mean, var, grad_x, *others = errors(run_layer(*layer, 4), exact_layer(*layer, 4))
    assert max(y, grad_x) < ROUNDING[dtype] + 1e-7 * ratio and max(mean, var, *others) < STATISTICS


@pytest.mark.parametrize('affine', [True, False])
def test_relu_inside_and_no_affine_terms(affine):
    x, weight, gamma, beta, grad_y = inputs(24, 40, 4, torch.float16)
    layer = (x, weight, gamma, beta, grad_y) if affine else (x, weight, None, None, grad_y)
    found = run_layer(*layer, 4, relu=True)
    y, mean, var, grad_x, *others = errors(found, exact_layer(*layer, 4, relu=found[0] > 0))
    assert 0.2 < (found[0] == 0).float().mean() < 0.8 and not found[0].lt(0).any()
    assert max(y, grad_x) < ROUNDING[torch.float16] and max(mean, var, *others) < STATISTICS


@pytest.mark.parametrize('shape', [(1, 4, 6), (24, 1, 1), (2, 8, 8), (3, 7, 19)])
def test_any_number_of_positions(shape):
    layer = inputs(12, 20, 2, torch.float32, shape=shape)
    for found, exact in zip(run_layer(*layer, 2), exact_layer(*layer, 2)):
        torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-4)


def test_the_output_may_be_changed_in_place():
    """An in-place ReLU does so. Autograd would refuse it if the function returned a view."""
    x, *rest, grad_y = inputs(12, 20, 2, torch.float16)
    leaves = [v.detach().requires_grad_() for v in (x, *rest)]
    y = MomentForm.apply(*leaves, 2, 1e-5, None)[0].relu_()
    for found, inside in zip(torch.autograd.grad(y, leaves, grad_y), run_layer(x, *rest, grad_y, 2, relu=True)[3:]):
        torch.testing.assert_close(found, inside, rtol=0, atol=0)


def test_nan_stays_nan():
    x, *rest = inputs(12, 20, 2, torch.float16)
    x[0, 3, 2, 1] = float('nan')
    y, mean, var, *grads = run_layer(x, *rest, 2, relu=True)
    assert y.isnan().all() and mean[:20].isnan().all() and var[:20].isnan().all() and grads[0].isnan().any()


def test_running_statistics_move_in_the_same_launches():
    x, weight, gamma, beta, grad_y = inputs(24, 40, 4, torch.float16)
    mean, var, batches = torch.zeros(160), torch.ones(160), torch.tensor(6)
    with recorded_launches() as launches:
        run_layer(x, weight, gamma, beta, grad_y, 4, running=(mean, var, 0.3, batches))
    assert len(launches) == 8 and batches == 7
    count, found = x.numel() / 24, run_layer(x, weight, gamma, beta, grad_y, 4)
    torch.testing.assert_close(mean, 0.3 * found[1])
    torch.testing.assert_close(var, 0.7 + 0.3 * count / (count - 1) * found[2])


def test_statistics_of_several_processes(tmp_path):
    """One process that shares them with itself takes the same path: counts and sums are returned as tensors."""
    x, weight, gamma, beta, grad_y = inputs(24, 40, 4, torch.float16)
    leaves = [v.detach().requires_grad_() for v in (x, weight, gamma, beta)]
    mean, var, batches = torch.zeros(160), torch.ones(160), torch.tensor(6)
    dist.init_process_group('gloo', init_method=(tmp_path / 'store').as_uri(), rank=0, world_size=1)
    try:
        with recorded_launches() as launches:
            MomentForm.apply(*leaves, 4, 1e-5, dist.group.WORLD, False, (mean, var, 0.3, batches))
            del launches[:]
            y, *statistics, count = MomentForm.apply(*leaves, 4, 1e-5, dist.group.WORLD)
            found = [y.detach(), *statistics, *torch.autograd.grad(y, leaves, grad_y)]
    finally:
        dist.destroy_process_group()
    assert len(launches) == 8 and count == x.numel() / 24 and batches == 7
    y, *statistics, grad_x, a, b, c = errors(found, exact_layer(x, weight, gamma, beta, grad_y, 4))
    assert max(y, grad_x) < ROUNDING[torch.float16] and max(*statistics, a, b, c) < STATISTICS
    torch.testing.assert_close(mean, 0.3 * found[1])
    torch.testing.assert_close(var, 0.7 + 0.3 * count / (count - 1) * found[2])


def test_affine_terms_and_running_statistics_that_are_views_with_gaps():
    x, weight, gamma, beta, grad_y = inputs(24, 40, 4, torch.float16)
    mean, var, batches = torch.zeros(160), torch.ones(160), torch.tensor(6)
    expected = run_layer(x, weight, gamma, beta, grad_y, 4, running=(mean, var, 0.3, batches))
    gaps = [torch.stack([v, v + 9], 1)[:, 0] for v in (gamma, beta, torch.zeros(160), torch.ones(160))]
    for found, value in zip(run_layer(x, weight, *gaps[:2], grad_y, 4, running=(*gaps[2:], 0.3, batches)), expected):
        torch.testing.assert_close(found, value, rtol=0, atol=0)
    assert batches == 8
    for found, value in zip(gaps[2:], (mean, var)):
        torch.testing.assert_close(found, value)


def test_running_statistics_in_float64_stay_precise():
    *layer, grad_y = inputs(24, 40, 4, torch.float16)
    mean, var, batches = torch.zeros(160).double(), torch.full((160,), 1 + 1e-10, dtype=torch.float64), torch.tensor(6)
    run_layer(*layer, grad_y, 4, running=(mean, var, 0., batches))
    assert batches == 7 and var.eq(1 + 1e-10).all()


def test_weight_in_half_precision():
    x, weight, gamma, beta, grad_y = inputs(24, 40, 4, torch.float16)
    layer = x, weight.half(), gamma, beta, grad_y
    y, mean, var, grad_x, grad_weight, *others = errors(run_layer(*layer, 4), exact_layer(*layer, 4))
    assert max(y, grad_x, grad_weight) < ROUNDING[torch.float16] and max(mean, var, *others) < STATISTICS


@pytest.mark.parametrize('channels, groups', [(25, 1), (100, 4), (150, 1)])
def test_moments(channels, groups):
    x = inputs(channels, 1, groups, torch.float16, 1)[0]
    shift, shifted_mean, cov = TritonPasses(x).moments(groups, torch.float32)
    exact_shift, exact_shifted_mean, exact_cov = TorchPasses(x.double()).moments(groups, torch.float64)
    mean, exact_mean = shift + shifted_mean, exact_shift + exact_shifted_mean
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cov.double(), exact_cov, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('relu', [False, True])
def test_convolve(relu):
    x, weight, *_ = inputs(100, 150, 2, torch.float16)
    bias = torch.randn(2, 150)
    y = TritonPasses(x).convolve(weight.half(), bias, relu)
    exact = F.conv2d(x.double(), weight.half().double(), bias.double().sum(0))
    torch.testing.assert_close(y.double(), exact.relu() if relu else exact, rtol=1e-3, atol=1e-3)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('relu', [False, True])
def test_gradients(relu):
    x, weight, _, _, grad_y = inputs(150, 140, 1, torch.float16)
    shift, y = torch.randn(150).half().float(), torch.randn_like(grad_y).relu_() if relu else None
    passes = TritonPasses(x, shift, grad_y, y)
    exact = TorchPasses(x.double(), shift.double(), grad_y.double(), None if y is None else y.double())
    exact = TorchPasses(x.double(), torch.zeros(150).double(), exact.grad_y)  # its products are those of `x` itself
    parts = triton_passes.weight_gradient_parts(*passes.weight_gradient(140, torch.float32)).sum(0)
    for found, expected in zip(parts.split((140 * 150, 140)), exact.weight_gradient(140, torch.float64)):
        assert (found - expected.flatten()).norm() < 1e-5 * expected.norm()
    a, b = torch.randn(1, 150, 150) / 12, torch.randn(150)
    a = (a + a.mT).half()
    found, expected = passes.input_gradient(weight.half(), a, b), exact.input_gradient(
        weight.half().double(), a.double(), b.double())
    assert (found - expected).norm() < 5e-4 * expected.norm()


def test_which_inputs_take_tritons_passes():
    x = torch.randn(2, 8, 6, 6).half()
    last = x.contiguous(memory_format=torch.channels_last)
    assert implementation(last, torch.float32)[0] is TritonPasses
    assert implementation(x, torch.float32) == (TorchPasses, TorchAlgebra)
    assert implementation(last, torch.float64) == (TorchPasses, TorchAlgebra)
    assert implementation(last[:0], torch.float32) == (TorchPasses, TorchAlgebra)


@pytest.mark.parametrize('device_count', [2, 5])
def test_sums_do_not_depend_on_how_they_are_split(device_count, monkeypatch):
    layer = inputs(24, 40, 4, torch.float32, shape=(4, 14, 15))
    monkeypatch.setattr(triton_passes, 'card', lambda device: triton_passes.Card(device_count, 2 ** 16))
    for found, exact in zip(run_layer(*layer, 4), exact_layer(*layer, 4)):
        assert (found - exact).norm() < 1e-5 * exact.norm()


def test_compiled_as_operators():
    """torch.compile sees their shapes, layouts and gradients, and nothing inside."""
    x, weight, gamma, beta, grad_y = inputs(12, 6, 2, torch.float16)
    leaves = [v.detach().requires_grad_() for v in (x, weight, gamma, beta)]

    def layer(*leaves):
        return MomentForm.apply(*leaves, 2, 1e-5, None, True)[0]
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True)
    for run in (layer, compiled):
        y = run(*leaves)
        found = [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]
        if run is layer:
            expected = found
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.stride() == b.stride()


class Recorded(TorchDispatchMode):
    """Records the calls of this package's operators."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'timm_finet':
            self.calls.append((func, [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]))
        return func(*args, **(kwargs or {}))


def test_operators_name_all_that_they_write_to(monkeypatch):
    """Else torch.compile would use what these arguments held before."""
    running = torch.zeros(12), torch.ones(12), 0.1, torch.tensor(0)
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: True)
    with Recorded() as recorded:
        run_layer(*inputs(12, 6, 2, torch.float16), 2, True, running)
    monkeypatch.undo()
    assert [func._opname for func, _ in recorded.calls] == [
        'triton_moments', 'triton_fold', 'triton_convolve', 'triton_unfold', 'triton_input_terms',
        'triton_input_gradient']
    for func, args in recorded.calls:
        torch.library.opcheck(func, tuple(args), test_utils=('test_schema', 'test_faketensor'))
