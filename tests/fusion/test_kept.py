"""What is not folded: layers and norms that are called, read, hooked or changed elsewhere, and the warning's reason."""
import logging
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from nets import SMALL, X, Net, norms, pair, sequence
from timm.layers import BatchNormAct2d, StdConv2d
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn


class Steps(nn.Module):
    """Calls its layers through its own list."""

    def __init__(self, *layers):
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f'layer{i}', layer)
        self.steps = list(layers)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


@torch.jit.script
def scripted(x):
    return x.clamp(min=3.).sub(3.)


def in_a_thread(net, x):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(net.bn, net.conv(x)).result()


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


def with_a_gamma_to_set():
    net = Net(sets_gamma, **pair())
    del net.bn.weight
    net.bn.weight = torch.ones(4).double()
    return net


def brings_a_weight(net, x):
    return net.bn(torch.func.functional_call(net.conv, dict(weight=net.conv.weight * x.mean()), (x,)))


def makes_a_weight(net, x):
    net.conv.weight = nn.Parameter(net.make(x.mean((0, 2, 3))).view(4, 4, 1, 1))
    return net.bn(net.conv(x))


def with_a_weight_to_make():
    net = Net(makes_a_weight, make=nn.Linear(4, 16), **pair())
    net.conv.weight = None
    return net


def with_a_weight_as_buffer():
    net = Net(lambda net, x: net.bn(net.conv(x)), **pair())
    weight = net.conv.weight.detach().clone()
    del net.conv.weight
    net.conv.register_buffer('weight', weight)
    return net


def patched(name):
    def make():
        net = Net(lambda net, x: net.bn(net.conv(x)), **pair())
        layer = net.get_submodule(name)
        layer.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), layer)
        return net
    return make


def circular(self, x, weight, bias):
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode='circular'), weight, bias)


def with_another_computation():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[0]._conv_forward = types.MethodType(circular, model[0])
    return model


class Squared(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight.square(), self.bias)


class Masked(nn.Conv2d):
    """Gives zeros, without the bias, where the input is zero."""

    def forward(self, x):
        return super().forward(x) * (x.abs().amax(1, keepdim=True) > 0)


class MaskedFarAway(nn.Conv2d):
    def forward(self, x):
        filled = F.max_pool2d((x.abs().amax(1, keepdim=True) > 0).to(x.dtype), 3, 1, 1)
        return super().forward(x) * filled


class Skipped(nn.Conv2d):
    """Gives nothing, not even a bias, for an input that is empty everywhere."""

    def forward(self, x):
        return super().forward(x) * x.any()


class Clamped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-100, 100)


class Biasless(nn.Conv2d):
    """Refuses the bias that folding would give it."""

    def __init__(self, *args):
        super().__init__(*args, bias=False)

    def forward(self, x):
        assert self.bias is None
        return F.conv2d(x, self.weight)


class Scaled(nn.Conv2d):
    def forward(self, x=SMALL, scale=1.):
        return super().forward(x) * scale


class Notes(nn.Conv2d):
    """Stores a statistic of its output."""

    def forward(self, x):
        y = super().forward(x)
        self.largest = y.abs().max()
        return y


class Counts(nn.Conv2d):
    """Counts its calls in a buffer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class NormOfSum(nn.BatchNorm2d):
    def forward(self, xs):
        return super().forward(sum(xs))


class HasIntermediates(Net):
    def forward_intermediates(self, x):
        return self.bn(self.other(x))


@torch.no_grad()
def overwrites(net, x):
    y = net.conv(x)
    return net.bn(torch.mul(x, 2., out=y))


def keep(net, x):
    net.kept = net.conv(x)
    return net.bn(net.kept)


def called_keeper():
    keeper = Net(keep, **pair()).double()
    keeper(SMALL)  # stores a tensor that deepcopy would refuse
    return keeper


def asks(question):
    """A network that also reads its convolution without the norm if `question`, decided in Python, is true."""
    def forward(net, x, y=None):
        c = net.conv(x)
        try:
            return net.bn(c) + c if question(x, c, y) else net.bn(c)
        except Exception:
            return net.bn(c)
    return lambda: Net(forward, **pair())


BEHIND = 'behind a layer that is '
UNREACHED, CHANGED = 'called from where they cannot be replaced: layer', 'changed by the forward: bn'
ELSEWHERE = f'{BEHIND}read elsewhere: bn'
OTHERWISE = [StdConv2d, Squared, Masked, MaskedFarAway, Skipped, Clamped, Biasless]
KEPT = {  # the network, and the reason in the warning
    'called by a list': (lambda: Steps(*sequence()), UNREACHED),
    'FBN called by a list': (lambda: Steps(FBNConv2d(4, 4, 1, fbn_groups=2), nn.BatchNorm2d(4)), UNREACHED),
    'called in a thread': (lambda: Net(in_a_thread, **pair()), 'called in another thread: bn'),
    'read by TorchScript': (
        lambda: Net(lambda net, x: (lambda y: net.bn(y) + scripted(y))(net.conv(x)), **pair()),
        ELSEWHERE),
    'read behind a number': (
        lambda: Net(lambda net, x: (lambda y: net.bn(y) + torch.pow(2., y))(net.conv(x)), **pair()), ELSEWHERE),
    'overwritten': (lambda: Net(overwrites, **pair()), ELSEWHERE),
    'read, as `is None` tells': (asks(lambda x, c, y: y is None), ELSEWHERE),
    'read, as `isinstance` tells': (asks(lambda x, c, y: isinstance(c, torch.Tensor)), ELSEWHERE),
    'read, as `int` tells': (asks(lambda x, c, y: int(x.shape[1]) == 4), ELSEWHERE),
    'kept by its module': (
        lambda: Net(lambda net, x: net.keeps(x), keeps=called_keeper()), 'returned or kept: keeps.bn'),
    'kept and read': (
        lambda: Net(lambda net, x: net.keeps(x) + net.keeps.kept, keeps=called_keeper()), 'read elsewhere: keeps.bn'),
    'other statistics': (lambda: Net(swaps_statistics, **pair()), CHANGED),
    'another eps': (lambda: Net(sets_eps, **pair()), CHANGED),
    'another gamma': (with_a_gamma_to_set, CHANGED),
    'a layer that notes': (lambda: Net(lambda net, x: net.bn(net.conv(x)), **pair(Notes)), BEHIND + CHANGED),
    'a layer that counts': (lambda: Net(lambda net, x: net.bn(net.conv(x)), **pair(Counts)), BEHIND + CHANGED),
    'no argument': (
        lambda: Net(lambda net, x: x + net.bn(net.conv()), **pair(Scaled)), f'{BEHIND}called by keyword: bn'),
    'a norm of a sum': (
        lambda: Net(lambda net, x: net.bn([net.conv(x), x]), **dict(pair(), bn=NormOfSum(4))),
        'of class NormOfSum: bn'),
    'a norm whose shape is asked for': (
        lambda: Net(lambda net, x: net.bn(net.conv(x)) * net.bn.weight.shape[0], **pair()), 'looked into: bn'),
    'intermediates by another layer': (
        lambda: HasIntermediates(lambda net, x: net.bn(net.conv(x)), other=nn.Conv2d(4, 4, 1), **pair()),
        'behind several layers: bn'),
    'a weight brought': (lambda: Net(brings_a_weight, **pair()), f'{BEHIND}looked into: bn'),
    'a weight made': (with_a_weight_to_make, f'{BEHIND}without a weight of its own: bn'),
    'a weight as buffer': (with_a_weight_as_buffer, f'{BEHIND}without a weight of its own: bn'),
    'another argument': (
        lambda: Net(lambda net, x: net.bn(net.conv(x, 1.)), **pair(Scaled)),
        f'{BEHIND}called with more than its input: bn'),
    'another argument by keyword': (
        lambda: Net(lambda net, x: net.bn(net.conv(x, scale=1.)), **pair(Scaled)),
        f'{BEHIND}called with more than its input: bn'),
    'layer patched': (patched('conv'), f'{BEHIND}patched: bn'),
    'norm patched': (patched('bn'), 'patched: bn'),
    'computation patched': (with_another_computation, f'{BEHIND}patched: 1'),
    **{cls.__name__: (
        lambda cls=cls: sequence(cls), f'a {cls.__name__}, which gives other outputs with a folded weight: 1')
       for cls in OTHERWISE},
}


@pytest.mark.parametrize('case', KEPT)
def test_what_others_reach_stays_and_the_reason_is_told(case, randomise, caplog):
    make, reason = KEPT[case]
    model = randomise(make().double()).eval()
    example, x = -SMALL.abs() / 10, SMALL.abs() * 10  # the forward takes another path on `x`
    fused = fuse_fbn(model, example)
    assert norms(fused) == norms(model) and reason in caplog.text
    torch.testing.assert_close(fused(x), model(x))
    with pytest.raises(ValueError, match=r'no convolution.* fits\.$'):
        convert_fbn(model, 2, example_inputs=example)


def test_an_fbn_layer_that_a_list_calls_stays(randomise, caplog):
    model = randomise(Steps(FBNConv2d(4, 4, 1, fbn_groups=2)).double()).eval()
    assert norms(fuse_fbn(model, SMALL)) == norms(model) and f'{UNREACHED}0' in caplog.text


@pytest.mark.parametrize('layer, norm, shape', [
    (nn.Linear(4, 6), nn.BatchNorm1d(6), (2, 6, 4)),  # the channels of the norm are the rows of the linear layer
    (nn.Linear(4, 6), nn.BatchNorm2d(6), (2, 6, 3, 4)),
    (nn.Linear(4, 6), nn.SyncBatchNorm(6), (2, 6, 4)),
    (nn.Conv2d(4, 6, 1), nn.BatchNorm1d(6), (4, 6, 5)),  # without a batch dimension
    (nn.Conv1d(6, 6, 1), nn.BatchNorm1d(4), (6, 4)),
])
def test_batchnorm_of_another_dimension_stays(layer, norm, shape, randomise, caplog):
    model = randomise(nn.Sequential(layer, norm).double()).eval()
    x = torch.randn(shape, dtype=torch.float64)
    fused = fuse_fbn(model, x)
    assert norms(fused) == 1 and "another dimension than its layer's channels: 1" in caplog.text
    torch.testing.assert_close(fused(x), model(x))


def test_a_norm_behind_an_fbn_layer_without_statistics_stays(randomise, caplog):
    model = randomise(nn.Sequential(FBNConv2d(4, 4, 1, fbn_groups=2), nn.BatchNorm2d(4)).double()).eval()
    model[0].bn.running_mean = model[0].bn.running_var = None
    fused = fuse_fbn(model, SMALL)
    assert norms(fused) == norms(model) and 'stay, bn has lost its running statistics: 0' in caplog.text
    assert 'behind an FBN layer that stays: 1' in caplog.text
    torch.testing.assert_close(fused(SMALL), model(SMALL))


def test_a_convolution_of_another_class_stays_where_no_values_can_be_tried():
    assert norms(fuse_fbn(sequence(Squared).double().to('meta').eval(), SMALL.to('meta'))) == 1


def test_a_norm_that_changes_the_dtype_stays(caplog):
    model = nn.Sequential(nn.Conv2d(4, 4, 1).bfloat16(), FrozenBatchNorm2d(4)).eval()
    assert isinstance(fuse_fbn(model, SMALL.bfloat16())[1], FrozenBatchNorm2d)
    assert 'changing the dtype: 1' in caplog.text


@pytest.mark.parametrize('example', [None, SMALL])
def test_a_class_whose_computation_is_patched_stays(example, randomise, monkeypatch, caplog):
    model = randomise(sequence().double()).eval()
    with monkeypatch.context() as patch:
        patch.setattr(nn.BatchNorm2d, 'forward', lambda self, x: F.batch_norm(x, None, None, training=True))
        torch.testing.assert_close(fuse_fbn(model, example)(SMALL), model(SMALL))
    monkeypatch.setattr(nn.Conv2d, '_conv_forward', circular)
    assert norms(fuse_fbn(model, example)) == norms(fuse_fbn(model.to('meta'), SMALL.to('meta'))) == 1
    assert 'behind a layer that is patched: 1' in caplog.text


class OwnForward(FBNConv2d):
    def forward(self, x):
        return super().forward(x).relu()


class OwnStart(FBNConv2d):
    def __init__(self):
        super().__init__(4, 4, fbn_groups=2)


@pytest.mark.parametrize('example', [None, SMALL])
def test_subclasses_of_fbn_layers_stay_only_if_they_override_forward(example, randomise, caplog):
    model = randomise(nn.Sequential(OwnForward(4, 4, fbn_groups=2), OwnStart()).double()).eval()
    fused = fuse_fbn(model, example)
    torch.testing.assert_close(fused(SMALL), model(SMALL))
    assert type(fused[0]) is OwnForward and type(fused[1]) is nn.Conv2d
    assert type(fuse_fbn(model[0], example)) is OwnForward
    assert 'of class OwnForward: 0' in caplog.text


def test_without_an_example_neighbours_fuse_and_the_rest_is_counted(randomise, caplog):
    sequential = nn.Sequential(FBNConv2d(4, 4, fbn_groups=2), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = randomise(Net(lambda net, x: net.bn(net.conv(net.layers(x))), layers=sequential, **pair()).double()).eval()
    fused = fuse_fbn(model)
    assert norms(fused) == 1 and isinstance(fused.bn, nn.BatchNorm2d)
    torch.testing.assert_close(fused(SMALL), model(SMALL))
    assert len(caplog.records) == 1 and 'BatchNorm layers of Net stay, ' in caplog.text
    assert 'give example_inputs: bn' in caplog.text


def test_a_network_that_does_not_run_on_images_of_its_cfg_is_fused_as_without_any(caplog):
    model = sequence().eval()
    model.pretrained_cfg = dict(input_size=(5, 8, 8))
    assert norms(fuse_fbn(model)) == 0
    assert 'Sequential does not run on images of the size in its pretrained_cfg: RuntimeError' in caplog.text


def test_neighbours_of_other_widths_are_no_pair():
    model = nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(3)).eval()
    assert norms(fuse_fbn(model)) == 1


@pytest.mark.parametrize('wrap', [
    lambda model: model, nn.DataParallel, lambda model: torch.compile(model, backend='eager')])
def test_a_network_in_which_nothing_can_be_folded_is_a_warning_that_names_what_a_wrapper_wraps(wrap, caplog):
    model = Net(lambda net, x: net.bn(x), bn=nn.BatchNorm2d(4)).eval()
    with caplog.at_level(logging.INFO):
        fuse_fbn(wrap(model), SMALL.float())
    assert 'Nothing of Net can be folded: 1 BatchNorm' in caplog.text
    assert 'not directly behind a convolution or linear layer: bn' in caplog.text


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
