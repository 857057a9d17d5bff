"""fuse_fbn and convert_fbn on networks of all kinds."""
import io
import logging
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, StdConv2d, register_notrace_module
from timm.models import reparameterize_model
from torch.nn.modules.batchnorm import _BatchNorm

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn

X = torch.randn(2, 3, 64, 64, dtype=torch.float64)


def norms(model):
    return sum(isinstance(m, (_BatchNorm, FBNConv2d)) for m in model.modules())


# networks whose every BatchNorm stands behind a convolution; BatchNormAct2d in all but resnet
@pytest.mark.parametrize('name', [
    'resnet10t', 'efficientnet_lite0', 'mobilenetv3_small_050', 'regnetx_002', 'hardcorenas_a'])
def test_any_timm_network_fuses_without_a_trace_of_norm(name, randomise):
    model = randomise(timm.create_model(name).double()).eval()
    fused = fuse_fbn(model)
    assert norms(model) > 10 and norms(fused) == 0
    assert type(fused) is type(model) and fused.pretrained_cfg == model.pretrained_cfg
    torch.testing.assert_close(fused(X), model(X))
    torch.testing.assert_close(fused.forward_features(X), model.forward_features(X))


class Rows(nn.Module):
    def forward(self, x):
        return x.view(x.shape[0], -1)


@pytest.mark.parametrize('flatten', [nn.Flatten, Rows])
def test_linear_and_batchnorm_fuse_behind_a_flatten(flatten, randomise):
    model = randomise(nn.Sequential(
        flatten(), nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4),
        nn.BatchNorm1d(4)).double()).eval()
    x = torch.randn(4, 3, 2, dtype=torch.float64)
    fused = fuse_fbn(model)
    assert norms(fused) == 0 and fused[1].bias.requires_grad
    torch.testing.assert_close(fused(x), model(x))


@pytest.mark.parametrize('layer, norm, shape', [
    (nn.Linear(4, 6), nn.BatchNorm1d(6), (2, 6, 4)),  # the channels of the norm are the rows of the linear layer
    (nn.Linear(4, 6), nn.BatchNorm1d(7), (2, 7, 4)),
    (nn.Linear(4, 6), nn.BatchNorm2d(6), (2, 6, 3, 4)),
    (nn.Conv2d(4, 6, 1), nn.BatchNorm1d(6), (4, 6, 5)),  # without a batch
])
def test_batchnorm_of_another_dimension_stays(layer, norm, shape, randomise):
    model = randomise(nn.Sequential(layer, norm).double()).eval()
    x = torch.randn(shape, dtype=torch.float64)
    fused = fuse_fbn(model)
    assert norms(fused) == 1
    torch.testing.assert_close(fused(x), model(x))


def test_fusing_is_idempotent_and_leaves_the_original(randomise):
    model = randomise(timm.create_model('finet_small_se_g2').double()).eval()
    before = deepcopy(model.state_dict())
    fused = fuse_fbn(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    again = fuse_fbn(fused)
    assert list(again.state_dict()) == list(fused.state_dict())
    torch.testing.assert_close(again(X), fused(X), rtol=0, atol=0)
    assert fuse_fbn(model, inplace=True) is model and norms(model) == 0


def test_train_mode_is_refused_and_nothing_changes():
    model = timm.create_model('finet_small_g2').eval()
    model.stages[1].train()
    keys = list(model.state_dict())
    with pytest.raises(RuntimeError, match=r'stages\.1\.0\.conv1.*\.eval\(\)'):
        fuse_fbn(model, inplace=True)
    assert list(model.state_dict()) == keys


def test_train_mode_with_frozen_norms_fuses(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).double())
    model[1].eval()
    fused = fuse_fbn(model)
    assert norms(fused) == 0 and fused[0].training
    torch.testing.assert_close(fused(X), model(X))


@pytest.mark.parametrize('pair', [
    lambda: (nn.Conv2d(4, 4, 3, padding='same'), nn.BatchNorm2d(4)),
    lambda: (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    lambda: (nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)),
])
def test_pairs_that_fbn_cannot_stand_for_are_not_converted(pair):
    model = nn.Sequential(*pair(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    converted = convert_fbn(model, 2)
    assert type(converted[0]) is nn.Conv2d and isinstance(converted[2], FBNConv2d)


def test_root_layer_fuses(randomise):
    layer = randomise(FBNConv2d(8, 4)).eval()
    assert type(fuse_fbn(layer)) is nn.Conv2d
    layer.register_forward_hook(lambda module, args, out: -out)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(fuse_fbn(layer)(x), layer(x))


@pytest.mark.parametrize('feature_cls', [None, 'getter', 'fx', 'hook'])
@pytest.mark.parametrize('name', ['finet_small_g2', 'resnet18_fbn'])
def test_features_only_wrappers_fuse(name, feature_cls, randomise):
    kwargs = {} if feature_cls is None else dict(feature_cls=feature_cls)
    model = randomise(timm.create_model(name, features_only=True, **kwargs).double()).eval()
    fused = fuse_fbn(model)
    assert not any(isinstance(m, FBNConv2d) for m in fused.modules())
    for a, b in zip(fused(X), model(X)):
        torch.testing.assert_close(a, b)


def test_untraceable_network_has_its_fbn_layers_fused_and_says_so(randomise, caplog):
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.fbn = FBNConv2d(8, 8, fbn_groups=2)
            self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.fbn(x)
            return self.bn(self.conv(x)) * int(x.shape[1])

    model = randomise(Untraceable()).eval()
    with caplog.at_level(logging.WARNING):
        fused = fuse_fbn(model)
    assert 'cannot trace Untraceable, only its FBN layers are fused' in caplog.text
    assert type(fused.fbn) is nn.Conv2d and isinstance(fused.bn, nn.BatchNorm2d)
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(fused(x), model(x))


class Odd(nn.Module):
    """Pairs that must stay: a shared norm, a convolution with two readers, a weight made in forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.shared = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.c, self.norm_c = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.d, self.norm_d = StdConv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.e, self.norm_e = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4)
        self.f, self.norm_f = nn.Conv2d(4, 4, 1), BatchNormAct2d(4)

    def forward(self, x):
        x = self.shared(self.b(self.shared(self.a(x))))
        c = self.c(x)
        x = self.norm_c(c) + c
        return self.norm_f(self.f(self.norm_e(self.e(self.norm_d(self.d(x))))))


def test_pairs_that_cannot_be_fused_stay(randomise):
    model = randomise(Odd().double()).eval()
    fused = fuse_fbn(model)
    assert norms(fused) == norms(model) - 1 and isinstance(fused.norm_f, nn.ReLU)
    torch.testing.assert_close(fused(X), model(X))


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclass_of_batchnorm_that_may_do_otherwise_stays(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), ScaledNorm(4)).double()).eval()
    torch.testing.assert_close(fuse_fbn(model)(X), model(X))
    with pytest.raises(ValueError, match='no convolution'):
        convert_fbn(model, 1)


def test_pair_that_is_called_twice_and_has_two_names_is_replaced_everywhere(randomise):
    pair = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = randomise(nn.Sequential(pair, nn.ReLU(), pair).double()).eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for rewritten in (fuse_fbn(model), convert_fbn(model, 2)):
        assert rewritten[0] is rewritten[2] and type(rewritten[0][1]) is nn.Identity
        torch.testing.assert_close(rewritten(x), model(x))


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
        return x + getattr(getattr(self, module), tensor).sum()


@pytest.mark.parametrize('name', ['fbn.weight', 'conv.weight', 'conv.bias', 'bn.weight', 'bn.running_mean'])
def test_layers_whose_tensors_forward_reads_stay(name, randomise, caplog):
    model = randomise(Reader(name).double()).eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for rewritten in (fuse_fbn(model), convert_fbn(model, 2)):
        assert type(rewritten.get_submodule(name.split('.')[0])) is type(model.get_submodule(name.split('.')[0]))
        assert isinstance(rewritten.bn2, nn.Identity)
        torch.testing.assert_close(rewritten(x), model(x))
    assert f"1 {'FBN' if name[:3] == 'fbn' else 'BatchNorm'} layers of Reader stay" in caplog.text


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
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    y = model(x)
    for rewritten in (fuse_fbn(model), convert_fbn(model, 2)):
        assert len(seen) == 1 and isinstance(rewritten.pair[1], nn.Identity)
        torch.testing.assert_close(rewritten(x), y)
        torch.testing.assert_close(seen.pop(), seen[0])


@pytest.mark.parametrize('name, kwargs', [
    ('xception41p', {}),
    ('tf_efficientnetv2_b0', dict(feature_location='expansion')),
    ('efficientnet_b0', dict(feature_location='expansion')),
])
def test_features_taken_by_hooks_stay(name, kwargs, randomise):
    model = randomise(timm.create_model(name, features_only=True, **kwargs).double()).eval()
    levels = model(X)
    assert 0 < norms(fuse_fbn(model)) <= norms(model) / 2
    for rewritten in (fuse_fbn(model), convert_fbn(model, 2)):
        torch.testing.assert_close(rewritten(X), levels)
        torch.testing.assert_close(deepcopy(rewritten)(X), levels)


@pytest.mark.parametrize('name', ['levit_128s', 'efficientformer_l1', 'efficientformerv2_s0'])
def test_tracing_leaves_nothing_behind_in_modules_that_cache(name, randomise):
    model = randomise(timm.create_model(name)).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        y = model(x)
        for inplace in (False, True):
            file = io.BytesIO()
            torch.save(fuse_fbn(model, inplace), file)
            file.seek(0)
            torch.testing.assert_close(torch.load(file, weights_only=False)(x), y, rtol=1e-3, atol=1e-3)


# Control flow on sizes makes timm keep tracers out of these; `left` norms are behind no layer.
@pytest.mark.parametrize('name, size, left', [
    ('mobilevit_xxs', 64, 0), ('mobilevitv2_050', 64, 0), ('efficientvit_m0', 224, 1), ('tiny_vit_5m_224', 224, 0)])
def test_modules_that_timm_keeps_tracers_out_of_are_fused_too(name, size, left, randomise):
    model = randomise(timm.create_model(name)).eval()
    fused = fuse_fbn(model)
    assert norms(fused) == left < norms(model)
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-3, atol=1e-3)


@register_notrace_module
class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x)) * int(x.shape[1])


def test_norms_in_modules_that_cannot_be_traced_stay_and_are_named(randomise, caplog):
    model = randomise(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Opaque()).double()).eval()
    fused = fuse_fbn(model)
    assert norms(fused) == 1
    assert '1 BatchNorm layers of Sequential stay' in caplog.text and caplog.text.endswith(': 2.bn\n')
    torch.testing.assert_close(fused(X), model(X))


class Branches(nn.Module):
    """A convolution that one branch reads without its norm, and a pair that all branches share."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.b, self.norm_b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.a(x) if x.mean() > 0 and x.shape[2] > 5 else self.norm_a(self.a(x))
        return self.norm_b(self.b(x))


def test_a_pair_is_one_on_every_branch(randomise):
    model = randomise(Branches().double()).eval()
    fused = fuse_fbn(model)
    assert isinstance(fused.norm_a, nn.BatchNorm2d) and isinstance(fused.norm_b, nn.Identity)
    for x in (X.abs(), -X.abs()):
        torch.testing.assert_close(fused(x), model(x))


def test_low_precision_network_fuses_in_float32(randomise):
    model = randomise(timm.create_model('finet_small_g4')).eval()
    half = fuse_fbn(deepcopy(model).bfloat16())
    exact = fuse_fbn(deepcopy(model).bfloat16().float())
    for (key, p), q in zip(half.named_parameters(), exact.parameters()):
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(p, q.bfloat16(), rtol=0, atol=0, msg=key)


def test_timms_reparameterize_model_fuses_all_of_finet(randomise):
    model = randomise(timm.create_model('finet_small_se_g4').double()).eval()
    fused = reparameterize_model(model)
    assert norms(fused) == 0 and list(fused.state_dict()) == list(fuse_fbn(model).state_dict())
    torch.testing.assert_close(fused(X), model(X))
    with pytest.raises(RuntimeError, match='eval'):
        reparameterize_model(model.train())


@pytest.mark.parametrize('fbn_groups', [1, 2, 4])
@pytest.mark.parametrize('name', ['resnet10t', 'mobilenetv3_small_050'])
def test_converting_keeps_eval_outputs_at_any_groups(name, fbn_groups, randomise):
    model = randomise(timm.create_model(name).double()).eval()
    converted = convert_fbn(model, fbn_groups)
    layers = [m for m in converted.modules() if isinstance(m, FBNConv2d)]
    assert len(layers) > 5 and all(m.fbn_groups == fbn_groups and not m.training for m in layers)
    torch.testing.assert_close(converted(X), model(X))


def test_converting_to_one_group_keeps_training_too(randomise):
    model = randomise(timm.create_model('resnet10t').double())
    converted = convert_fbn(model, 1)
    torch.testing.assert_close(converted(X), model(X))
    for a, b in zip(converted.eval()(X), model.eval()(X)):
        torch.testing.assert_close(a, b)


def test_converting_keeps_bias_freezing_and_mode(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double())
    model.requires_grad_(False)[1].eval()
    converted = convert_fbn(model, 2)
    assert converted[0].training and not converted[0].bn.training
    assert not any(p.requires_grad for p in converted.parameters())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(converted(x), model[1](model[0](x)))


@pytest.mark.parametrize('fbn_groups, message', [(0, 'fbn_groups=0'), (7, 'fbn_groups=7')])
def test_converting_refuses_groups_that_fit_nothing(fbn_groups, message):
    with pytest.raises(ValueError, match=message):
        convert_fbn(timm.create_model('resnet10t'), fbn_groups)


def test_converting_says_how_many_of_how_many(caplog):
    with caplog.at_level(logging.INFO):
        convert_fbn(timm.create_model('mobilenetv3_small_050'), 7)
    assert '1 of the 53 convolutions of MobileNetV3 converted to FBN' in caplog.text
