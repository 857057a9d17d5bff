"""The proof: a rewritten network must give the same outputs as the network, up to rounding."""
import collections
import math
import time
import types
from copy import deepcopy

import pytest
import torch
import torch.nn as nn
from nets import SMALL, Net, pair

from timm_finet import convert_fbn, fuse_fbn
from timm_finet.fusion import folding, plan, proof


class Outputs(dict):
    """A container that torch's pytree does not know."""


def cyclic(y):
    outputs = dict(y=y)
    outputs['outputs'] = outputs
    return outputs


OF_ANY_KIND = [
    lambda y: Outputs(y=y), lambda y: types.SimpleNamespace(y=y), lambda y: collections.deque([y.numpy()]),
    lambda y: y * 1j, lambda y: y.to_sparse(), lambda y: torch.quantize_per_tensor(y.float(), 1e-4, 0, torch.qint32),
    lambda y: (1e4 * y).long(), lambda y: torch.cat((torch.full_like(y, math.inf), (1e4 * y).round())),
    lambda y: 1e8 * y, cyclic]
BESIDE_WHAT_PROVES_NOTHING = [
    lambda y: (y.flatten()[:8].softmax(0).sum() - 1, y),  # rounding alone
    lambda y: dict(seconds=time.perf_counter(), y=y),
    lambda y: (torch.rand(2, generator=GENERATOR), y),
    lambda y: torch.cat((torch.full_like(y, torch.finfo(y.dtype).min), y)),
    lambda y: (torch.where(y > y.median(), math.inf, -math.inf), y),
    lambda y: ({y}, y)]
GENERATOR = torch.Generator()


@pytest.mark.parametrize('pack', OF_ANY_KIND + BESIDE_WHAT_PROVES_NOTHING, ids=[
    'dict', 'object', 'numpy', 'complex', 'sparse', 'quantised', 'whole', 'whole or infinite', 'large', 'cyclic',
    'rounding', 'time', 'noise', 'filled', 'infinite', 'set'])
def test_outputs_of_any_kind_are_compared_even_beside_some_that_prove_nothing(pack, randomise, monkeypatch):
    model = randomise(Net(lambda net, x: pack(net.bn(net.conv(x))), **pair()).double()).eval()
    assert isinstance(fuse_fbn(model, SMALL).bn, nn.Identity)
    give = folding.set_folded
    monkeypatch.setattr(folding, 'set_folded', lambda layer, weight, bias: give(layer, weight, bias + 1e-3))
    with pytest.raises(RuntimeError, match='values that differ by'):
        fuse_fbn(model, SMALL)


@pytest.mark.parametrize('coarse', [
    lambda y: y.bfloat16(), lambda y: (y * 1e3).round() / 1e3, lambda y: y.flatten().topk(50).indices,
    lambda y: (50 * y).to(torch.uint8)], ids=['bfloat16', 'rounded', 'indices', 'uint8'])
def test_coarse_outputs_are_not_refused(coarse, randomise):
    for seed in range(20):
        torch.manual_seed(seed)
        model = Net(lambda net, x: coarse(net.bn(net.conv(x))), **pair())
        assert isinstance(fuse_fbn(randomise(model).eval(), torch.randn(2, 4, 16, 16)).bn, nn.Identity)


def test_rounding_is_tried_on_all_that_is_folded(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))).eval()
    found = plan.Plan(pairs=[('0', '1')], rounding=2 ** -23)
    noisy = proof._with_noise(model, found, seed=0).state_dict()
    for name, value in model.state_dict().items():
        moves = value.is_floating_point() and not name.startswith('2')
        assert value.equal(noisy[name]) != moves
        torch.testing.assert_close(noisy[name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_other_outputs_are_an_error_that_says_by_how_much_and_nothing_changes(dtype, randomise, monkeypatch):
    model = randomise(Net(lambda net, x: net.bn(net.conv(x)), **pair())).to(dtype).eval()
    before, x = deepcopy(model.state_dict()), SMALL.to(dtype)
    give = folding.set_folded
    monkeypatch.setattr(folding, 'set_folded', lambda layer, weight, bias: give(layer, weight, bias + 1e-3))
    for inplace in (False, True):
        with pytest.raises(RuntimeError, match=r'values that differ by \d\.\de-0\d of the largest'):
            fuse_fbn(model, x, inplace)
        assert isinstance(model.bn, nn.BatchNorm2d)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_outputs_that_become_nan_are_an_error(randomise, monkeypatch):
    model = randomise(Net(lambda net, x: net.bn(net.conv(x)), **pair()).double()).eval()
    give = folding.set_folded
    monkeypatch.setattr(folding, 'set_folded', lambda layer, weight, bias: give(layer, weight, bias * math.nan))
    with pytest.raises(RuntimeError, match='values that differ by inf of the largest'):
        fuse_fbn(model, SMALL)


def test_outputs_of_another_structure_are_an_error(randomise):
    def forward(net, x):
        y = net.bn(net.conv(x))
        return (y, y) if isinstance(net.bn, nn.BatchNorm2d) else y

    model = randomise(Net(forward, **pair()).double()).eval()
    for change in (fuse_fbn, convert_fbn):
        with pytest.raises(RuntimeError, match='another structure'):
            change(model, example_inputs=SMALL, inplace=True)
    assert isinstance(model.bn, nn.BatchNorm2d)


def test_a_network_that_no_longer_runs_is_an_error(randomise):
    def forward(net, x):
        if not isinstance(net.bn, nn.BatchNorm2d):
            raise KeyError('no norm')
        return net.bn(net.conv(x))

    model = randomise(Net(forward, **pair()).double()).eval()
    with pytest.raises(RuntimeError, match='does not run once rewritten.*no norm'):
        fuse_fbn(model, SMALL, inplace=True)
    assert isinstance(model.bn, nn.BatchNorm2d)


@pytest.mark.parametrize('scale', [1, 1e-4])
def test_networks_that_multiply_rounding_are_not_refused(scale, randomise):
    """The forward turns float32's rounding into a difference of a percent."""
    def forward(net, x):
        y = net.bn(net.conv(x))
        return (y * 1e4).sin() * scale

    model = randomise(Net(forward, **pair())).eval()
    assert isinstance(fuse_fbn(model, SMALL.float()).bn, nn.Identity)


@pytest.mark.parametrize('pack, example, parts', [
    (lambda y: y, SMALL[:0], '1 of the 1'), (lambda y: y, SMALL * math.nan, '1 of the 1'),
    (lambda y: {y}, SMALL, '1 of the 1'), (lambda y: 0 * y, SMALL, '1 of the 1'),
    # Rounding decides the outputs, like the order and the number of a detector's finds with almost equal scores.
    (lambda y: (y * 1e17).long(), SMALL, '1 of the 1'),
    (lambda y: y[(y * 1e17).long() % 2 == 0], SMALL, '1 of the 1'),
    (lambda y: ({y}, y * math.nan, y * math.inf, y), SMALL, '3 of the 4'),
], ids=['empty', 'nan', 'set', 'without the weights', 'rounding', 'structure', 'several'])
def test_a_warning_counts_the_outputs_that_prove_nothing(pack, example, parts, randomise, caplog):
    model = randomise(Net(lambda net, x: pack(net.bn(net.conv(x))), **pair()).double()).eval()
    assert isinstance(fuse_fbn(model, example).bn, nn.Identity)
    assert f'{parts} outputs of Net prove nothing' in caplog.text


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_where_precision_is_too_low_to_prove_anything_the_way_out_is_told(dtype, randomise, caplog):
    model = randomise(Net(lambda net, x: (1e10 * net.bn(net.conv(x))).sin(), **pair())).to(dtype).eval()
    fuse_fbn(model, SMALL.to(dtype))
    assert 'prove nothing' in caplog.text
    assert ('Fuse in float32, then cast.' in caplog.text) == (dtype == torch.bfloat16)


@pytest.mark.parametrize('pack', [lambda y: y, lambda y: (y, torch.ones(3))], ids=['weights', 'and a constant'])
def test_a_complete_proof_logs_nothing(pack, randomise, caplog):
    model = randomise(Net(lambda net, x: pack(net.bn(net.conv(x))), **pair()).double()).eval()
    assert isinstance(fuse_fbn(model, SMALL).bn, nn.Identity) and not caplog.records
