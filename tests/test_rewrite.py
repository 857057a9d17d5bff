"""fuse_fbn and convert_fbn on networks of all kinds."""
import collections
import contextlib
import io
import logging
import math
import random
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, StdConv2d
from timm.models import reparameterize_model
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization
from torchvision.ops import FrozenBatchNorm2d

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn, rewrite

X = torch.randn(2, 3, 64, 64, dtype=torch.float64)
SMALL = torch.randn(2, 4, 5, 5, dtype=torch.float64)


def norms(model):
    return sum(isinstance(m, (_BatchNorm, FBNConv2d)) for m in model.modules())


class Net(nn.Module):
    """Layers, and a forward that is given with them."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def pair(**kwargs):
    return dict(conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4, **kwargs))


def rewrites(model, example):
    return fuse_fbn(model, example), convert_fbn(model, 2, example_inputs=example)


# networks whose every BatchNorm stands behind a convolution; BatchNormAct2d in all but resnet
@pytest.mark.parametrize('name', [
    'resnet10t', 'efficientnet_lite0', 'mobilenetv3_small_050', 'regnetx_002', 'hardcorenas_a'])
def test_any_timm_network_fuses_without_a_trace_of_norm(name, randomise):
    model = randomise(timm.create_model(name).double()).eval()
    fused = fuse_fbn(model, X)
    assert norms(model) > 10 and norms(fused) == 0
    assert type(fused) is type(model) and fused.pretrained_cfg == model.pretrained_cfg
    torch.testing.assert_close(fused(X), model(X))
    torch.testing.assert_close(fused.forward_features(X), model.forward_features(X))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_timms_networks_need_no_example_in_any_dtype(dtype, randomise):
    model = randomise(timm.create_model('test_resnet')).to(dtype).eval()
    assert norms(fuse_fbn(model)) == 0 < norms(convert_fbn(model, 2))


def test_timms_networks_fuse_on_the_meta_device():
    model = timm.create_model('test_resnet', device='meta', in_chans=1).eval()
    fused = fuse_fbn(model)
    assert norms(fused) == 0 and all(p.is_meta for p in fused.parameters())


# --- modules that a network also reaches past its registered children


class Steps(nn.Module):
    """Calls its layers by a list of its own."""

    def __init__(self, *layers):
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f'layer{i}', layer)
        self.steps = list(layers)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


@pytest.mark.parametrize('layers', [
    lambda: (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
    lambda: (FBNConv2d(4, 4, 1, fbn_groups=2), nn.BatchNorm2d(4)),
], ids=['conv', 'fbn'])
def test_layers_also_held_in_a_list_stay(layers, randomise, caplog):
    model = randomise(Steps(*layers()).double()).eval()
    fused = fuse_fbn(model, SMALL)
    torch.testing.assert_close(fused(SMALL), model(SMALL))
    assert norms(fused) == norms(model) and 'called where no replacement reaches: ' in caplog.text
    with pytest.raises(ValueError, match='no convolution'):
        convert_fbn(model, 2, example_inputs=SMALL)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize('inplace', [False, True])
def test_networks_whose_copy_is_not_independent_are_refused_and_left(inplace, randomise):
    model = Net(lambda net, x: net.after(net.bn(net.conv(x)).relu()), **pair(affine=False))
    model.after = lambda x: model.bn(x)  # in a copy of the network it still calls this network's
    swallows = Net(lambda net, x: (net.bn(net.conv(x)), net.after(x))[0], **pair())

    def after(x):
        with contextlib.suppress(RuntimeError):
            swallows.bn(x)

    swallows.after = after
    shares = nn.Sequential(Shared(), nn.BatchNorm2d(4))
    for network in (model, swallows, shares):
        randomise(network.double())
        before = deepcopy(list(network.state_dict().values()))
        for change in (fuse_fbn, convert_fbn):
            with pytest.raises(RuntimeError, match='of the network itself|has the same 0'):
                change(network.train(change is convert_fbn), example_inputs=SMALL, inplace=inplace)
            torch.testing.assert_close(list(network.state_dict().values()), before, rtol=0, atol=0)


def test_an_fbn_layer_that_is_compiled_by_itself_fuses(randomise):
    model = randomise(nn.Sequential(FBNConv2d(4, 4, 1, fbn_groups=2), nn.ReLU()).double()).eval()
    expected = model(SMALL)
    model[0] = torch.compile(model[0], backend='eager')
    for fused in (fuse_fbn(model, SMALL), fuse_fbn(model[0], SMALL), fuse_fbn(model[0], SMALL, inplace=True)):
        torch.testing.assert_close(fused(SMALL).relu(), expected)
        fused.requires_grad_(False)
        for parameter in fused.parameters():
            parameter.zero_()
        assert norms(fused) == 0 and fused(SMALL).count_nonzero() == 0  # the old layer is not called


# --- what a run shows and a symbolic trace does not


class Asks(nn.Module):
    """A convolution that is also read without its norm, as Python decides."""

    def __init__(self, question):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.question = question

    def forward(self, x, y=None):
        c = self.conv(x)
        try:
            return self.bn(c) + c if self.question(x, c, y) else self.bn(c)
        except Exception:
            return self.bn(c)


@pytest.mark.parametrize('question', [
    lambda x, c, y: y is None,
    lambda x, c, y: isinstance(c, torch.Tensor),
    lambda x, c, y: int(x.shape[1]) == 4,
], ids=['is None', 'isinstance', 'int'])
def test_python_that_asks_what_a_tensor_is_gets_the_right_answer(question, randomise):
    model = randomise(Asks(question).double()).eval()
    for example in (SMALL, dict(x=SMALL)):
        torch.testing.assert_close(fuse_fbn(model, example)(SMALL), model(SMALL))
    with pytest.raises(ValueError, match='no convolution'):
        convert_fbn(model, 2, example_inputs=SMALL)


def test_networks_that_check_their_input_fuse(randomise):
    def forward(net, x):
        assert x.dim() == 4 and x.shape[1] == net.conv.weight.shape[1]
        return torch.cat(list(net.bn(net.conv(x.to(net.conv.weight.dtype))).chunk(2, 1)), 1)

    model = randomise(Net(forward, **pair()).double()).eval()
    for rewritten in rewrites(model, SMALL):
        assert isinstance(rewritten.bn, nn.Identity)
        torch.testing.assert_close(rewritten(SMALL), model(SMALL))


class Outputs(dict):
    """A container that torch's pytree does not know."""


OF_ANY_KIND = [
    lambda y: Outputs(y=y), lambda y: types.SimpleNamespace(y=y), lambda y: collections.deque([y.numpy()]),
    lambda y: y * 1j]
BESIDE_WHAT_PROVES_NOTHING = [
    lambda y: (y.flatten()[:8].softmax(0).sum() - 1, y),  # rounding alone
    lambda y: dict(seconds=time.perf_counter(), y=y),
    lambda y: (torch.rand(2, generator=GENERATOR), y),
    lambda y: torch.cat((torch.full_like(y, torch.finfo(y.dtype).min), y)),
    lambda y: (torch.where(y > y.median(), math.inf, -math.inf), y),
    lambda y: ({y}, y)]
GENERATOR = torch.Generator()


@pytest.mark.parametrize('pack', OF_ANY_KIND + BESIDE_WHAT_PROVES_NOTHING, ids=[
    'dict', 'object', 'numpy', 'complex', 'rounding', 'time', 'noise', 'filled', 'infinite', 'set'])
def test_outputs_are_compared_of_any_kind_and_beside_what_proves_nothing(pack, randomise, monkeypatch):
    model = randomise(Net(lambda net, x: pack(net.bn(net.conv(x))), **pair()).double()).eval()
    assert isinstance(fuse_fbn(model, SMALL).bn, nn.Identity)
    give = rewrite._give
    monkeypatch.setattr(rewrite, '_give', lambda layer, weight, bias: give(layer, weight, bias + 1e-3))
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
    found = rewrite._Found(pairs=[('0', '1')], rounding=2 ** -23)
    noisy = rewrite._with_noise(model, found, seed=0).state_dict()
    for name, value in model.state_dict().items():
        moves = value.is_floating_point() and not name.startswith('2')
        assert value.equal(noisy[name]) != moves
        torch.testing.assert_close(noisy[name], value, rtol=1e-6, atol=0)


def test_outputs_that_do_not_know_the_weights_prove_nothing(randomise, caplog):
    fuse_fbn(randomise(Net(lambda net, x: 0 * net.bn(net.conv(x)), **pair())).eval(), SMALL.float())
    assert '1 of the 1 outputs of Net prove nothing' in caplog.text


@pytest.mark.parametrize('pack, example', [
    (lambda y: y, SMALL[:0]), (lambda y: y, SMALL * math.nan), (lambda y: {y}, SMALL)], ids=['empty', 'nan', 'set'])
def test_that_nothing_is_proven_is_said(pack, example, randomise, caplog):
    fuse_fbn(randomise(Net(lambda net, x: pack(net.bn(net.conv(x))), **pair()).double()).eval(), example)
    assert '1 of the 1 outputs of Net prove nothing' in caplog.text


@pytest.mark.parametrize('name', ['conv', 'bn'])
def test_layers_whose_forward_is_patched_stay(name, randomise, caplog):
    model = randomise(Asks(lambda x, c, y: False).double()).eval()
    layer = model.get_submodule(name)
    layer.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), layer)
    fused = fuse_fbn(model, SMALL)
    torch.testing.assert_close(fused(SMALL), model(SMALL))
    assert isinstance(fused.bn, nn.BatchNorm2d) and 'patched: bn' in caplog.text


def test_a_layer_with_an_attribute_named_as_a_method_fuses(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double()).eval()
    model[0].type = 'stem'
    assert norms(fuse_fbn(model, SMALL)) == 0


def test_a_convolution_whose_computation_is_patched_stays(randomise, monkeypatch, caplog):
    def circular(self, x, weight, bias):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode='circular'), weight, bias)

    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)).double()).eval()
    model[0]._conv_forward = types.MethodType(circular, model[0])
    with pytest.raises(ValueError, match='no convolution'):
        convert_fbn(model, 2, affine=False, example_inputs=SMALL)
    del model[0]._conv_forward
    monkeypatch.setattr(nn.Conv2d, '_conv_forward', circular)
    for example in (None, SMALL, SMALL.to('meta')):
        network = model.to('meta') if example is not None and example.is_meta else model
        assert norms(fuse_fbn(network, example)) == 1
    assert 'behind a layer that is patched: 1' in caplog.text


@pytest.mark.parametrize('example', [None, SMALL])
def test_a_norm_whose_class_has_another_forward_stays(example, randomise, monkeypatch):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()).eval()
    monkeypatch.setattr(nn.BatchNorm2d, 'forward', lambda self, x: F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(fuse_fbn(model, example)(SMALL), model(SMALL))


@torch.jit.script
def scripted(x):
    return x.clamp(min=3.).sub(3.)


def in_a_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


STATISTICS = [(torch.zeros(4).double(), torch.ones(4).double()), (torch.ones(4).double(), 2 * torch.ones(4).double())]


def swaps_statistics(net, x):
    net.bn.running_mean, net.bn.running_var = STATISTICS[int(x.mean() > 0)]
    return net.bn(net.conv(x))


def sets_eps(net, x):
    net.bn.eps = x.var().item()
    return net.bn(net.conv(x))


def sets_gamma(net, x):
    net.bn.weight = x.mean((0, 2, 3))
    return net.bn(net.conv(x))


def brings_a_weight(net, x):
    return net.bn(torch.func.functional_call(net.conv, dict(weight=net.conv.weight * x.mean()), (x,)))


@pytest.mark.parametrize('forward, reason', [
    (lambda net, x: (lambda y: net.bn(y) + scripted(y))(net.conv(x)), 'behind a layer that is read elsewhere'),
    (lambda net, x: in_a_thread(net.bn, net.conv(x)), 'called in another thread'),
    (swaps_statistics, 'changed by the forward'),
    (sets_eps, 'changed by the forward'),
    (sets_gamma, 'changed by the forward'),
    (brings_a_weight, 'behind a layer that is looked into'),
], ids=['scripted', 'thread', 'statistics', 'eps', 'gamma', 'weight'])
def test_layers_that_others_read_or_change_unseen_by_python_stay(forward, reason, randomise, caplog):
    model = randomise(Net(forward, **pair()).double()).eval()
    if forward is sets_gamma:
        del model.bn.weight
        model.bn.weight = torch.ones(4).double()
    example = -SMALL.abs() / 10  # it takes the other way
    fused = fuse_fbn(model, example)
    torch.testing.assert_close(fused(SMALL.abs() * 10), model(SMALL.abs() * 10))
    assert f'{reason}: bn' in caplog.text


class OwnForward(FBNConv2d):
    def forward(self, x):
        return super().forward(x).relu()


class OwnStart(FBNConv2d):
    def __init__(self):
        super().__init__(4, 4, fbn_groups=2)


def test_of_fbn_layers_only_those_with_a_forward_of_their_own_stay(randomise, caplog):
    for example in (None, SMALL):
        model = randomise(nn.Sequential(OwnForward(4, 4, fbn_groups=2), OwnStart()).double()).eval()
        fused = fuse_fbn(model, example)
        torch.testing.assert_close(fused(SMALL), model(SMALL))
        assert type(fused[0]) is OwnForward and type(fused[1]) is nn.Conv2d
        assert type(fuse_fbn(model[0], example)) is OwnForward
    assert 'of class OwnForward: 0' in caplog.text


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        self.kept = self.conv(x)
        return self.bn(self.kept)


def test_modules_that_look_at_each_other_see_what_they_saw(randomise, caplog):
    model = randomise(Net(lambda net, x: net.keeps(x) + net.keeps.kept, keeps=Keeps()).double()).eval()
    model(SMALL)  # leaves a tensor that deepcopy would refuse
    fused = fuse_fbn(model, SMALL)
    torch.testing.assert_close(fused(SMALL), model(SMALL))
    assert 'read elsewhere: keeps.bn' in caplog.text
    fused = fuse_fbn(Net(lambda net, x: net.keeps(x), keeps=model.keeps), SMALL)
    assert 'returned or kept: keeps.bn' in caplog.text and isinstance(fused.keeps.bn, nn.BatchNorm2d)


def test_intermediates_stay_too(randomise):
    """ghostnet's are taken in front of its first norm, which forward does not tell."""
    model = randomise(timm.create_model('ghostnet_050').double()).eval()
    fused = fuse_fbn(model, X)
    assert norms(fused) == 1
    for a, b in zip(fused.forward_intermediates(X)[1], model.forward_intermediates(X)[1], strict=True):
        torch.testing.assert_close(a, b)


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


# --- what is folded


@pytest.mark.parametrize('flat', [
    lambda x: x.flatten(1), lambda x: x.view(x.shape[0], -1), lambda x: x.mean((2, 3)), lambda x: x[..., 0, 0],
    lambda x: x.amax(3, keepdim=True).amax(2, keepdim=True).squeeze()])
def test_linear_and_batchnorm_fuse_on_whatever_is_a_matrix(flat, randomise):
    width = flat(SMALL).shape[1]
    model = randomise(Net(
        lambda net, x: net.layers(flat(x)),
        layers=nn.Sequential(
            nn.Linear(width, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4),
            nn.BatchNorm1d(4))).double()).eval()
    fused = fuse_fbn(model, SMALL)
    assert norms(fused) == 0 and fused.layers[0].bias.requires_grad
    torch.testing.assert_close(fused(SMALL), model(SMALL))


@pytest.mark.parametrize('layer, norm, shape', [
    (nn.Linear(4, 6), nn.BatchNorm1d(6), (2, 6, 4)),  # the channels of the norm are the rows of the linear layer
    (nn.Linear(4, 6), nn.BatchNorm2d(6), (2, 6, 3, 4)),
    (nn.Linear(4, 6), nn.SyncBatchNorm(6), (2, 6, 4)),
    (nn.Conv2d(4, 6, 1), nn.BatchNorm1d(6), (4, 6, 5)),  # without a batch
    (nn.Conv1d(6, 6, 1), nn.BatchNorm1d(4), (6, 4)),
])
def test_batchnorm_of_another_dimension_stays(layer, norm, shape, randomise, caplog):
    model = randomise(nn.Sequential(layer, norm).double()).eval()
    x = torch.randn(shape, dtype=torch.float64)
    if isinstance(layer, nn.Conv2d):
        norm.__init__(shape[1] if shape[1] == 6 else 5)
        randomise(norm.double()).eval()
    fused = fuse_fbn(model, x)
    assert norms(fused) == 1 and "another dimension than its layer's channels: 1" in caplog.text
    torch.testing.assert_close(fused(x), model(x))


@pytest.mark.parametrize('norm_kwargs', [{}, dict(affine=False), dict(bias=False)])
@pytest.mark.parametrize('conv_kwargs', [dict(groups=1), dict(groups=2, bias=False)])
@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('kind', ['Conv', 'ConvTranspose'])
def test_convolutions_of_every_kind_fuse(kind, dims, conv_kwargs, norm_kwargs, randomise):
    conv = getattr(nn, f'{kind}{dims}d')(4, 6, 3, stride=2, **conv_kwargs)
    norm = getattr(nn, f'BatchNorm{dims}d')(6, **norm_kwargs).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
    model = nn.Sequential(conv, norm).double().eval()
    x = torch.randn(2, 4, *[5] * dims, dtype=torch.float64)
    for fused in (fuse_fbn(model, x), fuse_fbn(model)):
        assert norms(fused) == 0 and type(fused[0]) is type(conv)
        torch.testing.assert_close(fused(x), model(x))


def test_frozen_norms_fuse(randomise):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 1), FrozenBatchNormAct2d(4))
    for norm in model[1::2]:
        norm.running_mean.normal_()
        norm.weight.normal_()
    model = model.double().eval()
    fused = fuse_fbn(model, X)
    assert [type(m) for m in fused] == [nn.Conv2d, nn.Identity, nn.Conv2d, nn.ReLU]
    torch.testing.assert_close(fused(X), model(X))


class SelfPadding(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Squared(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.square(), self.bias)


class Masked(nn.Conv2d):
    """Gives nothing where there is nothing, not even a bias."""

    def forward(self, x):
        return super().forward(x) * (x.abs().amax(1, keepdim=True) > 0)


class MaskedFarAway(nn.Conv2d):
    def forward(self, x):
        filled = F.max_pool2d((x.abs().amax(1, keepdim=True) > 0).to(x.dtype), 3, 1, 1)
        return super().forward(x) * filled


class Clamped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class Scaled(nn.Conv2d):
    def forward(self, x, scale=1.):
        return super().forward(x) * scale


class Notes(nn.Conv2d):
    """Keeps a statistic of what it gives."""

    def forward(self, x):
        y = super().forward(x)
        self.largest = y.abs().max()
        return y


@pytest.mark.parametrize('conv, forward, reason', [
    (Scaled, lambda net, x: net.bn(net.conv(x, 1.)), 'called with more than its input'),
    (Notes, lambda net, x: net.bn(net.conv(x)), 'changed by the forward')])
def test_layers_of_other_classes_that_a_probe_does_not_show_stay(conv, forward, reason, randomise, caplog):
    model = randomise(Net(forward, conv=conv(4, 4, 1), bn=nn.BatchNorm2d(4)).double()).eval()
    assert norms(fuse_fbn(model, SMALL)) == 1
    assert f'behind a layer that is {reason}: bn' in caplog.text


@pytest.mark.parametrize('cls', [SelfPadding, StdConv2d, Squared, Masked, MaskedFarAway, Clamped])
def test_convolutions_of_other_classes_fuse_in_place_where_that_is_right(cls, randomise, caplog):
    model = randomise(nn.Sequential(cls(4, 4, 1), nn.BatchNorm2d(4)).double()).eval()
    fused = fuse_fbn(model, SMALL)
    assert type(fused[0]) is cls
    torch.testing.assert_close(fused(SMALL), model(SMALL))
    if cls is SelfPadding:
        assert isinstance(fused[1], nn.Identity)
    else:
        assert isinstance(fused[1], nn.BatchNorm2d)
        assert f'a {cls.__name__}, which does otherwise with a folded weight: 1' in caplog.text


def test_calls_by_keyword_fuse(randomise):
    model = randomise(Net(
        lambda net, image: net.act(x=net.conv2(net.bn(input=net.conv(input=image)))), **pair(),
        conv2=nn.Conv2d(4, 4, 1), act=BatchNormAct2d(4)).double()).eval()
    fused = fuse_fbn(model, dict(image=SMALL))
    assert isinstance(fused.bn, nn.Identity) and isinstance(fused.act, BatchNormAct2d)  # nn.ReLU takes no x=
    torch.testing.assert_close(fused(SMALL), model(SMALL))
    with pytest.raises(ValueError, match='no convolution'):
        convert_fbn(model, 2, example_inputs=dict(image=SMALL))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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
            with pytest.raises(ValueError, match='convert the network before it is wrapped'):
                change(wrapped, example_inputs=x, inplace=True)
        else:
            assert change(wrapped, example_inputs=x, inplace=True) is wrapped


# --- what is proven


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_other_outputs_are_an_error_that_says_by_how_much_and_nothing_changes(dtype, randomise, monkeypatch):
    model = randomise(Net(lambda net, x: net.bn(net.conv(x)), **pair())).to(dtype).eval()
    before, x = deepcopy(model.state_dict()), SMALL.to(dtype)
    give = rewrite._give
    monkeypatch.setattr(rewrite, '_give', lambda layer, weight, bias: give(layer, weight, bias + 1e-3))
    for inplace in (False, True):
        with pytest.raises(RuntimeError, match=r'values that differ by \d\.\de-0\d of the largest'):
            fuse_fbn(model, x, inplace)
        assert isinstance(model.bn, nn.BatchNorm2d)
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


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


def test_networks_that_multiply_rounding_are_not_refused(randomise):
    """Here float32's rounding becomes a difference of a percent."""
    def forward(net, x):
        y = net.bn(net.conv(x))
        return (y * 1e4).sin()

    model = randomise(Net(forward, **pair())).eval()
    assert isinstance(fuse_fbn(model, SMALL.float()).bn, nn.Identity)


def test_outputs_that_rounding_alone_decides_are_said_to_prove_nothing(randomise, caplog):
    """As of a detector that sorts by almost equal scores."""
    model = randomise(Net(lambda net, x: (net.bn(net.conv(x)) * 1e17).long(), **pair()).double()).eval()
    assert isinstance(fuse_fbn(model, SMALL).bn, nn.Identity)
    assert '1 of the 1 outputs of Net prove nothing' in caplog.text


class Refuses(nn.Module):
    """Has what cannot be copied."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.lock = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), threading.Lock()

    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize('model, example, error, message', [
    (lambda: {}, SMALL, TypeError, 'model=dict must be a torch.nn.Module'),
    (lambda: torch.jit.script(nn.Conv2d(4, 4, 1)), SMALL, TypeError, 'scripted or traced: fuse the network'),
    (lambda: nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)), SMALL, ValueError, '0.weight.* has no shape yet'),
    (Refuses, SMALL, TypeError, 'Refuses cannot be copied.*lock'),
    (lambda: nn.Conv2d(4, 4, 1), (2, 4, 5, 5), TypeError, r'\(2, 4, 5, 5\) is a shape: give a tensor, torch.rand'),
    (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), ((x for x in ()),), TypeError,
     'example_inputs cannot be copied.*generator')])
def test_what_cannot_be_rewritten_is_refused_in_words(model, example, error, message):
    model = model()
    with pytest.raises(error, match=message):
        fuse_fbn(model.eval() if isinstance(model, nn.Module) else model, example)


def test_fbn_groups_given_as_something_else_are_refused():
    with pytest.raises(ValueError, match='fbn_groups=a Tensor must be an integer of at least 1'):
        convert_fbn(nn.Conv2d(4, 4, 1), SMALL)


class Remembers(nn.Module):
    """Its forward leaves tensors with a history in a container and a buffer."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.seen = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), {}
        self.register_buffer('average', torch.zeros(4))

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.seen['y'] = [2 * y]
        self.average = 0.9 * self.average + y.mean((0, 2, 3))
        return torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y - 1, (y,))


def test_networks_with_a_history_and_with_control_flow_fuse(randomise):
    model = randomise(Remembers().double()).eval()
    model(SMALL)
    expected = model(SMALL)
    torch.testing.assert_close(fuse_fbn(model, SMALL)(SMALL), expected)


def test_a_synchronised_norm_with_a_group_of_its_own_fuses(process_group, randomise):
    group = torch.distributed.new_group([0])
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4, process_group=group)).double()).eval()
    torch.testing.assert_close(fuse_fbn(model, SMALL)(SMALL), model(SMALL))


def test_layers_with_a_weight_that_is_no_parameter_stay(randomise, caplog):
    held = Net(lambda net, x: net.bn(net.conv(x)), **pair())
    weight = held.conv.weight.detach().clone()
    del held.conv.weight
    held.conv.register_buffer('weight', weight)

    def forward(net, x):
        net.conv.weight = nn.Parameter(net.make(x.mean((0, 2, 3))).view(4, 4, 1, 1))
        return net.bn(net.conv(x))

    given = Net(forward, make=nn.Linear(4, 16), **pair())
    given.conv.weight = None
    for model in (held, given):
        randomise(model.double()).eval()
        torch.testing.assert_close(fuse_fbn(model, SMALL)(SMALL), model(SMALL))
    assert caplog.text.count('behind a layer that is without a weight of its own: bn') == 2


def test_a_norm_that_changes_the_dtype_stays(randomise, caplog):
    model = nn.Sequential(nn.Conv2d(4, 4, 1).bfloat16(), FrozenBatchNorm2d(4)).eval()
    assert isinstance(fuse_fbn(model, SMALL.bfloat16())[1], FrozenBatchNorm2d)
    assert 'changing the dtype: 1' in caplog.text


def test_norms_that_share_their_parameters_are_not_converted(randomise):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[3].weight = model[1].weight
    with pytest.raises(ValueError, match='no convolution'):
        convert_fbn(model, 2)


def test_wrong_examples_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    for change in (fuse_fbn, convert_fbn):
        with pytest.raises(TypeError, match='example_inputs=list must be a tensor, or a tuple or dict'):
            change(model, example_inputs=[SMALL])


def test_without_an_example_neighbours_fuse_and_the_rest_is_counted(randomise, caplog):
    sequential = nn.Sequential(FBNConv2d(4, 4, fbn_groups=2), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = randomise(Net(lambda net, x: net.bn(net.conv(net.layers(x))), layers=sequential, **pair()).double()).eval()
    fused = fuse_fbn(model)
    assert norms(fused) == 1 and isinstance(fused.bn, nn.BatchNorm2d)
    torch.testing.assert_close(fused(SMALL), model(SMALL))
    assert len(caplog.records) == 1 and '1 BatchNorm layers of Net stay' in caplog.text
    assert 'give example_inputs' in caplog.text


def test_a_network_in_which_nothing_can_be_folded_is_a_warning(caplog):
    model = Net(lambda net, x: net.bn(x), bn=nn.BatchNorm2d(4)).eval()
    fuse_fbn(model, SMALL.float())
    assert 'Nothing of Net can be folded: 1 BatchNorm' in caplog.text


# --- what stays


class Odd(nn.Module):
    """Pairs that must stay: a shared norm, a convolution with two readers, a weight made in forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.norm_c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.d, self.norm_d = StdConv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.e, self.norm_e = weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)
        self.twice, self.norms = nn.Conv2d(4, 4, 1), nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.scaled = nn.Sequential(nn.Conv2d(4, 4, 1), ScaledNorm(4))
        self.f, self.norm_f = nn.Conv2d(4, 4, 1), BatchNormAct2d(4)
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.shared(self.b(self.shared(self.a(x))))
        c = self.c(x)
        x = self.norm_e(self.e(self.norm_d(self.d(self.norm_c(c) + c.data))))
        for norm in self.norms:
            x = norm(self.twice(x))
        return self.norm_f(self.f(self.scaled(x)))


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_pairs_that_cannot_be_fused_stay_and_each_is_named_once(randomise, caplog):
    model = randomise(Odd().double()).eval()
    fused = fuse_fbn(model, X)
    assert norms(fused) == norms(model) - 1 and isinstance(fused.norm_f, nn.ReLU)
    torch.testing.assert_close(fused(X), model(X))
    assert len(caplog.records) == 1
    for reason in (
            'called more than once: shared', 'behind a layer that is read elsewhere: norm_c', 'StdConv2d, which',
            'behind a layer that is parametrised: norm_e', 'of class ScaledNorm: scaled.1', 'not called: unused',
            'behind a layer that is called more than once: norms.0, norms.1'):
        assert caplog.text.count(reason) == 1, reason


class Reader(nn.Module):
    """A forward that reads a tensor of one of its layers, and one pair that nobody looks into."""

    def __init__(self, name):
        super().__init__()
        self.fbn = FBNConv2d(4, 4, fbn_groups=2)
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.name = name

    def forward(self, x):
        module, tensor = self.name.split('.')
        x = self.bn2(self.conv2(self.bn(self.conv(self.fbn(x)))))
        return x + getattr(getattr(self, module), tensor).data.sum()


@pytest.mark.parametrize('name', ['fbn.weight', 'conv.weight', 'conv.bias', 'bn.weight', 'bn.running_mean'])
def test_layers_whose_tensors_forward_reads_stay(name, randomise, caplog):
    model = randomise(Reader(name).double()).eval()
    for rewritten in rewrites(model, SMALL):
        assert type(rewritten.get_submodule(name.split('.')[0])) is type(model.get_submodule(name.split('.')[0]))
        assert isinstance(rewritten.bn2, nn.Identity)
        torch.testing.assert_close(rewritten(SMALL), model(SMALL))
    assert f"looked into: {'fbn' if name[:3] == 'fbn' else 'bn'}" in caplog.text


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fbn = FBNConv2d(4, 4, fbn_groups=2)
        self.convs = nn.Sequential(nn.Conv2d(4, 4, 1))
        self.bn = nn.BatchNorm2d(4)
        self.pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.pair(self.bn(self.convs(self.fbn(x))))


@pytest.mark.parametrize('before', [True, False])
@pytest.mark.parametrize('name', ['fbn', 'convs.0', 'convs', 'bn', 'pair', ''])
def test_hooks_see_what_they_saw(name, before, randomise):
    model = randomise(Hooked().double()).eval()
    seen = []
    if before:
        model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    else:
        model.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    y = model(SMALL)
    expected = seen[-1]
    for rewritten in rewrites(model, SMALL):
        assert isinstance(rewritten.pair[1], nn.Identity)
        torch.testing.assert_close(rewritten(SMALL), y)
        torch.testing.assert_close(seen[-1], expected)


@pytest.mark.parametrize('name, kwargs', [
    ('xception41p', {}),
    ('tf_efficientnetv2_b0', dict(feature_location='expansion')),
    ('efficientnet_b0', dict(feature_location='expansion')),
])
def test_features_taken_by_hooks_stay(name, kwargs, randomise):
    model = randomise(timm.create_model(name, features_only=True, **kwargs).double()).eval()
    levels = model(X)
    assert 0 < norms(fuse_fbn(model, X)) <= norms(model) / 2
    for rewritten in rewrites(model, X):
        torch.testing.assert_close(rewritten(X), levels)
        torch.testing.assert_close(deepcopy(rewritten)(X), levels)


@pytest.mark.parametrize('feature_cls', [None, 'getter', 'fx', 'hook'])
@pytest.mark.parametrize('name', ['finet_small_g2', 'resnet18_fbn'])
def test_features_only_wrappers_fuse(name, feature_cls, randomise):
    kwargs = {} if feature_cls is None else dict(feature_cls=feature_cls)
    model = randomise(timm.create_model(name, features_only=True, **kwargs).double()).eval()
    fused = fuse_fbn(model, X)
    assert not any(isinstance(m, FBNConv2d) for m in fused.modules())
    for a, b in zip(fused(X), model(X)):
        torch.testing.assert_close(a, b)


def test_accelerates_hooks_and_offload_stay_in_force(randomise, caplog):
    model = randomise(Net(lambda net, x: net.bn2(net.conv2(net.bn(net.conv(x)))), **pair(),
                          conv2=nn.Conv2d(4, 4, 1), bn2=nn.BatchNorm2d(4))).eval()
    x = SMALL.float()
    expected = model(x)
    add_hook_to_module(model.conv2, ModelHook())
    fused = fuse_fbn(model, x)
    assert isinstance(fused.bn, nn.Identity) and 'behind a layer that is patched: bn2' in caplog.text
    torch.testing.assert_close(fused(x), expected)
    offloaded = cpu_offload(model, execution_device='cpu')
    fused = fuse_fbn(offloaded, x)
    assert norms(fused) == 2 and 'Nothing of Net can be folded: 2 BatchNorm' in caplog.text
    torch.testing.assert_close(fused(x), expected)


# --- what is as before, and after


def test_train_mode_is_refused_and_nothing_changes():
    model = timm.create_model('finet_small_g2').eval()
    model.stages[1].train()
    keys = list(model.state_dict())
    with pytest.raises(RuntimeError, match=r'stages\.1\.0\.conv1.*\.eval\(\)'):
        fuse_fbn(model, inplace=True)
    assert list(model.state_dict()) == keys


def test_train_mode_with_frozen_norms_fuses_and_keeps_its_flags(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.)).double())
    model[1].eval()
    fused = fuse_fbn(model, SMALL)
    assert norms(fused) == 0 and [m.training for m in fused.modules()] == [m.training for m in model.modules()]
    torch.testing.assert_close(fused(SMALL), model(SMALL))


def test_fusing_is_idempotent_and_leaves_the_original(randomise):
    model = randomise(timm.create_model('finet_small_se_g2').double()).eval()
    before = deepcopy(model.state_dict())
    fused = fuse_fbn(model, X)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    again = fuse_fbn(fused, X)
    assert list(again.state_dict()) == list(fused.state_dict())
    torch.testing.assert_close(again(X), fused(X), rtol=0, atol=0)
    assert fuse_fbn(model, X, inplace=True) is model and norms(model) == 0


def test_root_layer_fuses(randomise):
    layer = randomise(FBNConv2d(8, 4)).eval()
    assert type(fuse_fbn(layer)) is nn.Conv2d
    layer.register_forward_hook(lambda module, args, out: -out)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fuse_fbn(layer)(x), layer(x))


class Counts(nn.Module):
    """Counts its calls in a buffer and draws random numbers, both of which its output shows."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.register_buffer('count', torch.zeros((), dtype=torch.long))
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.calls = []

    def train(self, mode=True):
        self.scale.data += 1 if mode else -1  # as adapters are merged
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


@pytest.mark.parametrize('inplace', [False, True])
def test_without_an_example_an_error_leaves_nothing_half_changed(inplace, randomise):
    model = randomise(nn.Sequential(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))
    model[1].to('meta')
    model[1][0].to_empty(device='cpu')
    before = deepcopy(model.eval().state_dict())
    with pytest.raises(RuntimeError):
        fuse_fbn(model, inplace=inplace)
    assert list(model.state_dict()) == list(before) and norms(model) == 2
    first = {key[2:]: value for key, value in before.items() if key[0] == '0'}
    torch.testing.assert_close(model[0].state_dict(), first, rtol=0, atol=0)


def test_a_parametrised_fbn_layer_fuses_with_an_example_too(randomise):
    model = nn.Sequential(FBNConv2d(4, 4, 1, fbn_groups=2)).double().eval()
    register_parametrization(randomise(model)[0], 'weight', nn.Tanh())
    torch.testing.assert_close(fuse_fbn(model, SMALL)(SMALL), model(SMALL))


def test_neighbours_of_other_widths_are_no_pair(randomise):
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(3)).eval()
    assert norms(fuse_fbn(model)) == 1


def test_layout_dtype_and_requires_grad_stay(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model = model.to(torch.bfloat16, memory_format=torch.channels_last).eval()
    model[0].requires_grad_(False)
    for fused in (fuse_fbn(model), fuse_fbn(model, SMALL.bfloat16())):
        assert all(p.dtype == torch.bfloat16 for p in fused.parameters())
        assert fused[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert [p.requires_grad for p in fused.parameters()] == [False, False, True, True]


def test_low_precision_network_fuses_in_float32(randomise):
    model = randomise(timm.create_model('finet_small_g4')).eval()
    half = fuse_fbn(deepcopy(model).bfloat16(), X.bfloat16())
    exact = fuse_fbn(deepcopy(model).bfloat16().float(), X.float())
    for (key, p), q in zip(half.named_parameters(), exact.parameters()):
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(p, q.bfloat16(), rtol=0, atol=0, msg=key)


def test_a_module_that_asks_a_norm_for_its_width_still_gets_it(randomise):
    model = randomise(Net(
        lambda net, x: net.bn(net.conv(x)) * net.bn.num_features + net.bn.eps, **pair()).double()).eval()
    for rewritten in rewrites(model, SMALL):
        assert isinstance(rewritten.bn, nn.Identity)
        torch.testing.assert_close(rewritten(SMALL), model(SMALL))


@pytest.mark.parametrize('name', ['levit_128s', 'efficientformerv2_s0', 'mobilevit_xxs', 'ghostnet_050'])
def test_fused_networks_are_copied_saved_scripted_and_exported(name, randomise, tmp_path):
    model = randomise(timm.create_model(name)).eval()
    x = torch.randn(1, *model.pretrained_cfg['input_size'])
    fused = fuse_fbn(model)
    torch.save(deepcopy(fused), tmp_path / 'fused.pt')
    exported = torch.export.export(fused, (x,)).module()
    with torch.no_grad():
        y = fused(x)
        torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)
        for other in (torch.load(tmp_path / 'fused.pt', weights_only=False), torch.jit.script(fused), exported):
            torch.testing.assert_close(other(x), y, rtol=1e-3, atol=1e-3)


def test_fused_networks_become_onnx(randomise):
    import onnxruntime
    model = randomise(nn.Sequential(
        nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), BatchNormAct2d(4))).eval()
    x, file = SMALL.float(), io.BytesIO()
    fused = fuse_fbn(model, x)
    torch.onnx.export(fused, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    y, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)
    assert 'BatchNormalization' not in str(file.getvalue())


@pytest.mark.parametrize('name', [
    'fastvit_t8', 'repvit_m0_9', 'mobileone_s0', 'levit_128s', 'efficientvit_m1', 'repghostnet_050'])
def test_networks_that_fold_themselves_do_so_before_and_after(name, randomise):
    model = randomise(timm.create_model(name)).eval()
    size = model.pretrained_cfg['input_size'][1:] if model.pretrained_cfg.get('fixed_input_size') else (64, 64)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        y = model(x)
        fused = fuse_fbn(model, x)
        before = fuse_fbn(reparameterize_model(model), x)
        assert norms(before) <= norms(fused) < norms(model)
        for other in (before, reparameterize_model(fused), fuse_fbn(reparameterize_model(fused), x)):
            torch.testing.assert_close(other(x), y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))


class Adds(nn.Module):
    """Its `fuse` adds two branches; it is none of those that fold."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2))

    def fuse(self, a, b):
        return a + b

    def forward(self, x):
        return self.fuse(self.a(x), self.b(x))


def test_a_method_named_fuse_that_takes_arguments_is_left(randomise):
    model = randomise(Adds().double()).eval()
    fused = fuse_fbn(model, SMALL)
    assert norms(fused) == 0
    torch.testing.assert_close(fused(SMALL), model(SMALL))


def test_timms_reparameterize_model_fuses_all_of_finet(randomise):
    model = randomise(timm.create_model('finet_small_se_g4').double()).eval()
    fused = reparameterize_model(model)
    assert norms(fused) == 0 and list(fused.state_dict()) == list(fuse_fbn(model, X).state_dict())
    torch.testing.assert_close(fused(X), model(X))
    torch.testing.assert_close(reparameterize_model(fused)(X), model(X))
    with pytest.raises(RuntimeError, match='eval'):
        reparameterize_model(model.train())


def test_timms_reparameterize_model_leaves_what_is_hooked(randomise):
    model = randomise(timm.create_model('finet_small_g2').double()).eval()
    seen = []
    model.stem.conv.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    fused = reparameterize_model(model)
    assert norms(fused) == 1
    torch.testing.assert_close(fused(X), model(X))
    torch.testing.assert_close(*seen)


# --- convert_fbn


@pytest.mark.parametrize('layers', [
    lambda: (nn.Conv2d(4, 4, 3, padding='same'), nn.BatchNorm2d(4)),
    lambda: (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    lambda: (nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)),
    lambda: (SelfPadding(4, 4, 3), nn.BatchNorm2d(4)),
])
def test_pairs_that_fbn_cannot_stand_for_are_not_converted(layers):
    model = nn.Sequential(*layers(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    converted = convert_fbn(model, 2, example_inputs=SMALL.float())
    assert type(converted[0]) is type(model[0]) and isinstance(converted[2], FBNConv2d)


@pytest.mark.parametrize('fbn_groups', [1, 2, 4])
@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv3_small_050'])
def test_converting_keeps_eval_outputs_at_any_groups(name, fbn_groups, randomise):
    model = randomise(timm.create_model(name).double()).eval()
    converted = convert_fbn(model, fbn_groups, example_inputs=X)
    layers = [m for m in converted.modules() if isinstance(m, FBNConv2d)]
    assert len(layers) > 5 and all(m.fbn_groups == fbn_groups and not m.training for m in layers)
    torch.testing.assert_close(converted(X), model(X))


def test_converting_to_one_group_keeps_training_too(randomise):
    model = randomise(timm.create_model('resnet10t').double())
    converted = convert_fbn(model, 1, example_inputs=X)
    torch.testing.assert_close(converted(X), model(X))
    for a, b in zip(converted.eval()(X), model.eval()(X)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('norm_kwargs', [{}, dict(affine=False), dict(bias=False)])
def test_converting_keeps_bias_freezing_and_mode(norm_kwargs, randomise):
    norm = nn.BatchNorm2d(4, **norm_kwargs)
    norm.running_mean.normal_()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm).double()
    model.requires_grad_(False)[1].eval()
    converted = convert_fbn(model, 2)
    assert converted[0].training and not converted[0].bn.training
    assert not any(p.requires_grad for p in converted.parameters())
    torch.testing.assert_close(converted(SMALL), norm(model[0](SMALL)))


def test_converting_to_save_memory_keeps_training(randomise):
    model = randomise(timm.create_model('resnet10t').double())
    converted = convert_fbn(model, 1, example_inputs=X, save_memory=True)
    assert all(m.save_memory for m in converted.modules() if isinstance(m, FBNConv2d))
    for network in (model, converted):
        network(X).square().sum().backward()
    theirs = [p.grad for p in model.parameters()]
    assert len(theirs) == len(list(converted.parameters()))
    grads = {p.grad.norm().item() for p in converted.parameters()}
    for grad in theirs:
        assert min(abs(grad.norm().item() - other) for other in grads) < 1e-8 * (1 + grad.norm().item())
    torch.testing.assert_close(converted.eval()(X), model.eval()(X))


def test_converting_keeps_how_statistics_are_tracked(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).double()
    model[1].num_batches_tracked = None
    model[1].track_running_stats = False  # in training they stay as they are
    converted = convert_fbn(model, 1)
    torch.testing.assert_close(converted(SMALL), model(SMALL))
    torch.testing.assert_close(converted[0].bn.running_var, model[1].running_var)
    assert converted[0].bn.num_batches_tracked is None


def test_converting_without_affine_terms_may_change_outputs(randomise):
    model = randomise(timm.create_model('test_resnet')).eval()
    layers = [m for m in convert_fbn(model, 2, affine=False).modules() if isinstance(m, FBNConv2d)]
    assert layers and not any(m.bn.affine for m in layers)


@pytest.mark.parametrize('fbn_groups, message', [(0, 'fbn_groups=0'), (7, 'fbn_groups=7')])
def test_converting_refuses_groups_that_fit_nothing(fbn_groups, message):
    with pytest.raises(ValueError, match=message):
        convert_fbn(timm.create_model('test_resnet'), fbn_groups)


def test_converting_says_how_many_of_how_many(caplog):
    with caplog.at_level(logging.INFO):
        convert_fbn(timm.create_model('mobilenetv3_small_050'), 7, example_inputs=X.float())
    assert '1 of the 53 convolutions of MobileNetV3 converted to FBN' in caplog.text
