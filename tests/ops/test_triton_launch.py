"""A launch that is not the first goes past Triton's search for the compiled kernel, where that would find the same."""
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('triton', reason='triton is missing: it comes with torch for CUDA and ROCm')

from timm_finet.ops import triton_passes  # noqa: E402


class Compiled(triton_passes.CompiledKernel):
    def __init__(self, calls, backend):
        self.calls, self.metadata = calls, SimpleNamespace(target=SimpleNamespace(backend=backend))

    def __del__(self):
        pass

    def __getitem__(self, grid):
        return lambda *args: self.calls.append(('again', grid, args))


class Kernel:
    """Notes whether a launch came by Triton or by the compiled kernel."""
    arg_names = ['x', 'n', 'eps', 'B', 'A']

    def __init__(self, backend='cuda'):
        self.fn, self.calls, self.backend = object(), [], backend

    def __getitem__(self, grid):
        def run(*args, **options):
            self.calls.append(('triton', grid, args))
            return Compiled(self.calls, self.backend)
        return run


@pytest.fixture(autouse=True)
def no_launchers(monkeypatch):
    monkeypatch.setattr(triton_passes, 'LAUNCHERS', {})


def test_the_second_launch_is_the_compiled_kernels_own():
    kernel, x = Kernel(), torch.zeros(8)
    for _ in range(2):
        triton_passes.launch(kernel, (3, 4), x, 5, 0.5, A=1, B=2)
    triton_passes.launch(kernel, (3, 4), x.clone(), 5, 0.25, A=1, B=2)
    assert [call[0] for call in kernel.calls] == ['triton', 'again', 'again']
    _, grid, args = kernel.calls[2]
    assert grid == (3, 4, 1) and args[1:] == (5, 0.25, 2, 1)  # constants in the kernel's order


@pytest.mark.parametrize('changed', [
    dict(x=torch.zeros(8).half()), dict(x=torch.zeros(9)[1:]), dict(x=None), dict(n=16), dict(n=1), dict(n=2 ** 40),
    dict(eps=1), dict(A=3), dict(num_warps=8), dict(num_stages=3), dict(grid=(9,))])
def test_what_triton_compiles_anew_goes_by_triton(changed):
    kernel = Kernel()
    launch = dict(grid=(3,), x=torch.zeros(8), n=5, eps=0.5, A=1, B=2, num_warps=4, num_stages=2)
    for arguments in (launch, launch, launch | changed):
        arguments = dict(arguments)
        grid, args = arguments.pop('grid'), [arguments.pop(name) for name in ('x', 'n', 'eps')]
        constants = {name: arguments.pop(name) for name in 'AB'}
        triton_passes.launch_here(kernel, grid, -1, args, constants, **arguments)
    assert [call[0] for call in kernel.calls] == ['triton', 'again', 'triton']


def test_other_backends_keep_to_triton():
    kernel = Kernel('hip')
    for _ in range(2):
        triton_passes.launch(kernel, (3,), torch.zeros(8), 5, 0.5, A=1, B=2)
    assert [call[0] for call in kernel.calls] == ['triton', 'triton']


def test_an_unaligned_pointer_goes_by_triton_each_time():
    kernel = Kernel()
    for _ in range(2):
        triton_passes.launch(kernel, (3,), torch.zeros(9)[1:], 5, 0.5, A=1, B=2)
    assert [call[0] for call in kernel.calls] == ['triton', 'triton']


def test_no_more_launches_are_kept_than_so_many(monkeypatch):
    """Training on batches of ever new shapes would fill the memory."""
    monkeypatch.setattr(triton_passes, 'MAX_LAUNCHERS', 4)
    kernel, x = Kernel(), torch.zeros(8)
    for n in range(2, 12):
        triton_passes.launch(kernel, (3,), x, n, 0.5, A=1, B=2)
        triton_passes.launch(kernel, (3,), x, n, 0.5, A=1, B=2)
        assert 1 <= len(triton_passes.LAUNCHERS) <= 4
    assert [call[0] for call in kernel.calls] == 10 * ['triton', 'again']


def test_blocks_are_tritons():
    import triton
    for n in range(1, 300):
        assert triton_passes.power_of_2(n, 1) == triton.next_power_of_2(n)
        assert triton_passes.cdiv(n, 7) == triton.cdiv(n, 7)
