"""After the first launch, launches skip Triton's search for the compiled kernel if it would find the same kernel."""
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('triton', reason='triton is missing: it comes with torch for CUDA and ROCm')

from scripts.bench.kernels import by_passes, inputs, on_card, run_layer  # noqa: E402
from timm_finet.ops import triton_launch, triton_passes  # noqa: E402


class Compiled(triton_launch.CompiledKernel):
    function, packed_metadata = 'function', 'metadata'

    def __init__(self, calls, backend):
        self.calls, self.metadata = calls, SimpleNamespace(target=SimpleNamespace(backend=backend))

    def __del__(self):
        pass

    @property
    def run(self):
        return lambda *args: self.calls.append(('again', args))


class Kernel:
    """Records whether a launch went through Triton or directly to the compiled kernel."""
    arg_names = ['x', 'n', 'eps', 'B', 'A']

    def __init__(self, backend='cuda'):
        self.calls, self.backend = [], backend

    def __getitem__(self, grid):
        def run(*args, **options):
            self.calls.append(('triton', grid, args, options))
            return Compiled(self.calls, self.backend)
        return run


@pytest.fixture(autouse=True)
def stream(monkeypatch):
    monkeypatch.setattr(triton_launch, 'driver', SimpleNamespace(active=SimpleNamespace(
        get_current_stream=lambda device: f'stream of {device}')))


def test_the_second_launch_is_the_compiled_kernels_own():
    kernel, x = Kernel(), torch.zeros(8)
    plan = triton_launch.Plan(kernel, (3, 4), 5, A=1, B=2, num_warps=8)
    plan.launch(x, floats=(0.5,))
    plan.launch(other := x.clone(), floats=(1.,))
    first, again = kernel.calls
    assert first == ('triton', (3, 4), (x, 5, 0.5), dict(A=1, B=2, num_warps=8, num_stages=2))
    assert again == ('again', (  # constants in the kernel's order
        3, 4, 1, 'stream of -1', 'function', 'metadata', None, None, None, other.data_ptr(), 5, 1., 2, 1))


def test_unaligned_pointers_for_which_triton_compiles_again_go_through_triton():
    kernel, x = Kernel(), torch.zeros(8)
    plan = triton_launch.Plan(kernel, (3,), 5, A=1, B=2)
    for tensor in (x, x, torch.zeros(9)[1:], x):
        plan.launch(tensor, floats=(0.5,))
    assert [call[0] for call in kernel.calls] == ['triton', 'again', 'triton', 'again']


def test_other_backends_keep_to_triton():
    kernel = Kernel('hip')
    plan = triton_launch.Plan(kernel, (3,), 5, A=1, B=2)
    for _ in range(2):
        plan.launch(torch.zeros(8), floats=(0.5,))
    assert [call[0] for call in kernel.calls] == ['triton', 'triton']


def test_an_unaligned_pointer_goes_through_triton_each_time():
    kernel = Kernel()
    plan = triton_launch.Plan(kernel, (3,), 5, A=1, B=2)
    for _ in range(2):
        plan.launch(torch.zeros(9)[1:], floats=(0.5,))
    assert [call[0] for call in kernel.calls] == ['triton', 'triton']


def test_a_plan_is_for_tensors_of_the_same_dtypes_and_devices(monkeypatch):
    seen = {}
    monkeypatch.setattr(triton_launch.Plan, 'launch', lambda plan, *tensors, floats=(): seen.setdefault(
        plan, set()).add(tuple((tensor.dtype, tensor.device) for tensor in tensors)))
    plain = inputs(24, 40, 4, torch.bfloat16, device='meta')
    with by_passes(triton_passes.TritonPasses, triton_passes.TritonAlgebra), on_card():
        for changed in (None, 0, 1, 2, 3, 5, 6):  # x and grad_y, weight, gamma, beta, running statistics
            tensors = [*plain, *torch.empty(2, 160, device='meta')]
            batches = torch.empty((), dtype=torch.int64, device='meta')
            if changed is not None:
                tensors[changed] = tensors[changed].half()
            *layer, mean, var = tensors
            layer[4] = layer[4].to(layer[0].dtype)
            run_layer(*layer, 4, running=(mean, var, 0.1, batches))
    assert len(seen) > 8 and [len(tensors) for tensors in seen.values()] == [1] * len(seen)


def test_a_shape_has_one_plan_and_the_number_of_plans_is_limited():
    """Without a limit, training on batches of ever new shapes would fill the memory."""
    card, limit = triton_passes.Card(132, 227 * 1024), triton_passes.plan_convolve.cache_info().maxsize
    assert triton_passes.plan_convolve(128, 24, 8, 2, True, card) is triton_passes.plan_convolve(
        128, 24, 8, 2, True, card)
    for positions in range(128, 128 + limit + 10):
        triton_passes.plan_convolve(positions, 24, 8, 2, True, card)
    assert triton_passes.plan_convolve.cache_info().currsize == limit


def test_block_sizes_are_tritons():
    import triton
    for n in range(1, 300):
        assert triton_passes.power_of_2(n, 1) == triton.next_power_of_2(n)
        assert triton_passes.cdiv(n, 7) == triton.cdiv(n, 7)
