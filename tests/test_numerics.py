"""Rounding of the moment form beside nn.BatchNorm2d's own, both against float64."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / 'scripts'))
from numerics import measure  # noqa: E402

ROWS = {row['input']: row for row in measure()}
BEYOND = ('mean/deviation 1000', 'mean/deviation 10000', 'first picture constant')  # the last: equal products, summed


@pytest.mark.parametrize('name', [name for name in ROWS if name not in BEYOND])
def test_error_is_of_batchnorms_size(name):
    row = ROWS[name]
    assert row['fbn_output'] <= 4 * row['bn_output']
    assert row['fbn_variance'] <= 1e-5


@pytest.mark.parametrize('name', BEYOND)
def test_error_stays_finite_and_near_batchnorms_beyond(name):
    row = ROWS[name]
    assert row['fbn_output'] <= 10 * row['bn_output'] < 0.01


@pytest.mark.parametrize('precision', ['high', 'medium'])
def test_reduced_precision_switches_do_not_reach_the_statistics(precision):
    """Where the processor has them, 'medium' makes float32 products bfloat16; timm's train.py allows TF32 globally."""
    from timm_finet.fbn import bmm, moments
    x = torch.randn(8, 256, 16, 16)
    a = torch.randn(4, 64, 64)
    before = torch.get_float32_matmul_precision()
    expected = moments(x, 4), bmm(a, a)
    torch.set_float32_matmul_precision(precision)
    try:
        torch.testing.assert_close((moments(x, 4), bmm(a, a)), expected, rtol=1e-5, atol=1e-5)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
