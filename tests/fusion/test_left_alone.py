"""What stays as it was: the network that is copied, its wrapper, state, flags and random numbers, and its example."""
import random
import types
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from nets import SMALL, X, Net, norms, pair
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn


def test_fusing_is_idempotent_and_leaves_the_original(randomise):
    model = randomise(timm.create_model('finet_small_se_g2').double()).eval()
    before = deepcopy(model.state_dict())
    fused = fuse_fbn(model, X)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    again = fuse_fbn(fused, X)
    assert list(again.state_dict()) == list(fused.state_dict())
    torch.testing.assert_close(again(X), fused(X), rtol=0, atol=0)
    assert fuse_fbn(model, X, inplace=True) is model and norms(model) == 0


class Counts(nn.Module):
    """Counts its calls in a buffer and draws random numbers; its output depends on both."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer('count', torch.zeros((), dtype=torch.long))
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.calls = []

    def train(self, mode=True):
        self.scale.data += 1 if mode else -1  # as networks do that merge adapters
        return super().train(mode)

    def forward(self, x):
        self.count += 1
        self.scale.mul_(2)
        self.calls.append(random.random() + np.random.rand())
        return self.bn(self.conv(x)) * self.scale + self.count + torch.rand(()) + self.calls[-1]


@pytest.mark.parametrize('inplace', [False, True])
def test_the_runs_leave_the_network_and_random_states_as_they_were(inplace, randomise):
    model = randomise(Counts().double()).train()
    model.bn.eval()
    scale = model.scale.item()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[2]
    for change in (fuse_fbn, convert_fbn):
        rewritten = change(deepcopy(model), example_inputs=SMALL, inplace=inplace)
        assert isinstance(rewritten.bn, nn.Identity)
        assert model.count == rewritten.count == 0 and model.calls == rewritten.calls == []
        assert model.scale == rewritten.scale == scale
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[2]) == states[1:]


def test_examples_of_any_kind_are_left_as_they_are(randomise):
    def forward(net, batch):
        assert batch.x.requires_grad
        return net.bn(net.conv(batch.__dict__.pop('x').mul_(2)))

    batch = types.SimpleNamespace(x=SMALL.clone().requires_grad_() * 1)
    fused = fuse_fbn(randomise(Net(forward, **pair()).double()).eval(), (batch,))
    assert isinstance(fused.bn, nn.Identity) and torch.equal(batch.x, SMALL)


@pytest.mark.parametrize('wrap, name', [
    (nn.DataParallel, 'module'), (nn.parallel.DistributedDataParallel, 'module'),
    (lambda model: torch.compile(model, backend='eager'), '_orig_mod'), (ModelEma, 'ema'), (ModelEmaV2, 'module'),
    (ModelEmaV3, 'module')])
def test_what_a_wrapper_wraps_is_rewritten(wrap, name, process_group, randomise):
    model = randomise(timm.create_model('test_resnet')).eval()
    x = torch.randn(2, 3, 64, 64)
    for change in (fuse_fbn, lambda *args, **kwargs: convert_fbn(*args, fbn_groups=2, **kwargs)):
        wrapped = wrap(deepcopy(model))
        getattr(wrapped, name).eval()
        before = norms(getattr(wrapped, name))
        rewritten = change(wrapped, example_inputs=x)
        assert type(rewritten) is type(wrapped) and norms(getattr(wrapped, name)) == before
        assert any(isinstance(m, nn.Identity) for m in getattr(rewritten, name).layer1.modules())
        with torch.no_grad():
            torch.testing.assert_close(getattr(rewritten, name)(x), model(x), rtol=1e-3, atol=1e-3)
        if change is not fuse_fbn and wrap is nn.parallel.DistributedDataParallel:
            with pytest.raises(ValueError, match='convert the network before you wrap it'):
                change(wrapped, example_inputs=x, inplace=True)
        else:
            assert change(wrapped, example_inputs=x, inplace=True) is wrapped
            assert any(isinstance(m, nn.Identity) for m in getattr(wrapped, name).layer1.modules())


@pytest.mark.parametrize('inplace', [False, True])
@pytest.mark.parametrize('change', [fuse_fbn, convert_fbn])
def test_a_network_in_a_wrapper_runs_on_the_example_and_is_copied_or_not(change, inplace, randomise):
    network = randomise(Net(lambda net, x: net.bn(net.conv(x)), **pair()).double()).eval()
    rewritten = change(nn.DataParallel(network), example_inputs=SMALL, inplace=inplace).module
    assert isinstance(rewritten.bn, nn.Identity) and (rewritten is network) == inplace


def test_root_layer_fuses(randomise):
    layer = randomise(FBNConv2d(8, 4)).eval()
    assert type(fuse_fbn(layer)) is nn.Conv2d
    layer.register_forward_hook(lambda module, args, out: -out)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fuse_fbn(layer)(x), layer(x))


def test_an_fbn_layer_that_is_compiled_by_itself_fuses(randomise):
    model = randomise(nn.Sequential(FBNConv2d(4, 4, 1, fbn_groups=2), nn.ReLU()).double()).eval()
    expected = model(SMALL)
    model[0] = torch.compile(model[0], backend='eager')
    for fused in (
            fuse_fbn(model, SMALL), fuse_fbn(torch.compile(model, backend='eager'), SMALL), fuse_fbn(model[0], SMALL),
            fuse_fbn(model[0], SMALL, inplace=True)):
        torch.testing.assert_close(fused(SMALL).relu(), expected)
        fused.requires_grad_(False)
        for parameter in fused.parameters():
            parameter.zero_()
        assert norms(fused) == 0 and fused(SMALL).count_nonzero() == 0  # the old layer is not called


CACHE = {}


class Caches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        if 'ones' not in CACHE:
            CACHE['ones'] = x.new_ones(1)
        return self.bn(self.conv(x)) * CACHE['ones']


def test_nothing_but_tensors_is_left_in_a_cache(randomise):
    CACHE.clear()
    model = randomise(Caches().double()).eval()
    fused = fuse_fbn(model, SMALL)
    assert type(CACHE['ones']) is torch.Tensor
    torch.testing.assert_close(fused(SMALL), model(SMALL))
