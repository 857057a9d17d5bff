"""Rounding of the moment form beside the paper's own form, both against float64."""

import pytest
import torch

from scripts.bench.numerics import measure

ROWS = {row['input']: row for row in measure()}
HARD = 'first image constant'  # equal products, summed
LIMITS = [('output', 6), ('grad_x', 5), ('grad_weight', 4), ('grad_gamma', 7)]


@pytest.mark.parametrize('what, times', LIMITS)
@pytest.mark.parametrize('name', [name for name in ROWS if name != HARD])
def test_error_is_of_the_reference_forms_size(name, what, times):
    row = ROWS[name]
    assert row[f'fbn_{what}'] <= times * row[f'reference_{what}']
    assert row['fbn_variance'] <= 1e-5 or row['fbn_variance'] <= row['reference_variance']


@pytest.mark.parametrize('what', [what for what, _ in LIMITS])
def test_error_stays_near_the_reference_forms_with_a_flat_image(what):
    assert ROWS[HARD][f'fbn_{what}'] <= min(10 * ROWS[HARD][f'reference_{what}'], 1e-6)


@pytest.mark.parametrize('ratio', [0, 3, 100])
def test_gammas_gradient_is_as_exact_as_the_reference_forms(ratio):
    row = ROWS[f'16 channels, mean {ratio}']
    assert row['fbn_grad_gamma'] <= 4 * row['reference_grad_gamma']


@pytest.mark.parametrize('precision', ['high', 'medium'])
def test_reduced_precision_switches_do_not_reach_the_statistics(precision):
    """Where the processor has them, 'medium' makes float32 products bfloat16; timm's train.py allows TF32 globally."""
    from timm_finet.ops.torch_passes import group_products
    x = torch.randn(8, 256, 16, 16)
    before = torch.get_float32_matmul_precision()
    expected = group_products(x, 4, x.dtype)
    torch.set_float32_matmul_precision(precision)
    try:
        torch.testing.assert_close(group_products(x, 4, x.dtype), expected, rtol=1e-5, atol=1e-5)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
