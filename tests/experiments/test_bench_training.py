"""The benchmark's baseline, by structure and strides rather than by a clock."""
import pytest
import timm
import torch
import torch.nn as nn

from scripts.bench.bench_training import build
from timm_finet import FBNConv2d
from timm_finet.fbn import ReferenceFBNConv2d


@pytest.mark.parametrize('name', ['finet_small', 'resnet50'])
def test_baseline_is_of_torchs_own_layers(name):
    baseline, ours = build(name, 4, 'bn', 32), build(name, 4, 'moment', 32)
    layers = [m for m in baseline.modules() if isinstance(m, nn.Conv2d)]
    assert {type(m) for m in layers} == {nn.Conv2d}
    assert any(isinstance(m, FBNConv2d) and m.fbn_groups == 4 for m in ours.modules())
    shapes = [
        [m.weight.shape for m in net.modules() if isinstance(m, (nn.Conv2d, FBNConv2d))] for net in (baseline, ours)]
    assert shapes[0] == shapes[1]


def test_reference_form_is_the_papers():
    layers = [m for m in build('finet_small', 4, 'reference', 32).modules() if isinstance(m, ReferenceFBNConv2d)]
    assert len(layers) == 32 and not any(type(m) is FBNConv2d for m in layers)


@pytest.mark.parametrize('fbn_groups', [1, 4])
@pytest.mark.parametrize('name', ['finet_small_se', 'resnet18_fbn'])
def test_no_layer_of_a_network_falls_out_of_channels_last(name, fbn_groups):
    model = timm.create_model(name, fbn_groups=fbn_groups, small_input=True).to(memory_format=torch.channels_last)
    fallen = []
    for path, module in model.named_modules():
        if path.endswith('.bn') and isinstance(model.get_submodule(path[:-len('.bn')]), FBNConv2d):
            continue  # a hook on it would have it called
        module.register_forward_hook(lambda m, x, y, path=path: fallen.append(path) if y.ndim == 4 and not (
            y.is_contiguous(memory_format=torch.channels_last)) else None)
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    for training in (True, False):
        model.train(training)(x)
    assert not fallen
