"""fuse_fbn and convert_fbn on networks of all kinds."""
import logging
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d, StdConv2d
from timm.models import reparameterize_model
from torch.nn.modules.batchnorm import _BatchNorm

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn

X = torch.randn(2, 3, 64, 64, dtype=torch.float64)


def norms(model):
    return sum(isinstance(m, (_BatchNorm, FBNConv2d)) for m in model.modules())


# networks whose every BatchNorm stands behind a convolution; BatchNormAct2d in all but resnet
@pytest.mark.parametrize('name', ['resnet10t', 'efficientnet_lite0', 'mobilenetv3_small_050', 'regnetx_002', 'hardcorenas_a'])
def test_any_timm_network_fuses_without_a_trace_of_norm(name, randomise):
    model = randomise(timm.create_model(name).double()).eval()
    fused = fuse_fbn(model)
    assert norms(model) > 10 and norms(fused) == 0
    assert type(fused) is type(model) and fused.pretrained_cfg == model.pretrained_cfg
    torch.testing.assert_close(fused(X), model(X))
    torch.testing.assert_close(fused.forward_features(X), model.forward_features(X))


def test_linear_and_batchnorm_fuse(randomise):
    model = randomise(nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU()).double()).eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    fused = fuse_fbn(model)
    assert norms(fused) == 0 and fused[0].bias.requires_grad
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
            return self.bn(self.conv(x)) if x.sum() > 0 else x

    model = randomise(Untraceable()).eval()
    with caplog.at_level(logging.WARNING):
        fused = fuse_fbn(model)
    assert 'cannot trace Untraceable, only its 1 FBN layers are fused' in caplog.text
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
