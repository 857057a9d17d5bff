"""Hooks, and forwards that read the tensors of their layers, see what they saw before."""
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn as nn
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from nets import SMALL, X, Net, norms, pair, rewrites, sequence

from timm_finet import FBNConv2d, fuse_fbn


class Reader(nn.Module):
    """Its forward reads a tensor of one of its layers. The tensors of one pair are never read."""

    def __init__(self, name):
        super().__init__()
        self.fbn = FBNConv2d(4, 4, fbn_groups=2)
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.name = name

    def forward(self, x):
        module, _, tensor = self.name.rpartition('.')
        x = self.bn2(self.conv2(self.bn(self.conv(self.fbn(x)))))
        return x + getattr(self.get_submodule(module), tensor).data.sum()


@pytest.mark.parametrize('name', [
    'fbn.weight', 'fbn.bn.weight', 'conv.weight', 'conv.bias', 'bn.weight', 'bn.running_mean'])
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
        self.pair = sequence()

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


@pytest.mark.parametrize('name, kwargs', [
    ('efficientnet_b0', dict(feature_location='expansion')),
    pytest.param('tf_efficientnetv2_b0', dict(feature_location='expansion'), marks=pytest.mark.slow),
    pytest.param('xception41p', {}, marks=pytest.mark.slow),
])
def test_features_taken_by_hooks_stay(name, kwargs, randomise):
    model = randomise(timm.create_model(name, features_only=True, **kwargs).double()).eval()
    levels = model(X)
    assert 0 < norms(fuse_fbn(model, X)) <= norms(model) / 2
    for rewritten in rewrites(model, X):
        torch.testing.assert_close(rewritten(X), levels)
        torch.testing.assert_close(deepcopy(rewritten)(X), levels)
