"""FBN networks as encoders of larger ones: trained a step with them, then fused with them."""
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from timm_finet import FBNConv2d, fuse_fbn

NAMES = ['finet_small_g4', 'finet_small_se_g2', 'resnet18_fbn_g4']
X = torch.randn(2, 3, 64, 64, dtype=torch.float64)


def count(model, kind):
    return sum(isinstance(module, kind) for module in model.modules())


def outputs(model):
    out = model(X)
    return list(out.values()) if isinstance(out, dict) else [out]


def train_a_step(model):
    model.double().train()  # double, as a network of random weights multiplies what fusion rounds
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    sum(y.square().mean() for y in outputs(model)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    optimiser.step()
    return model.eval()


def assert_same_outputs(model, other):
    with torch.inference_mode():
        for a, b in zip(outputs(model), outputs(other), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('name', NAMES)
def test_torchvisions_feature_pyramid_trains_and_fuses(name):
    body = timm.create_model(name, features_only=True, out_indices=(2, 3, 4))
    levels = {module.replace('.', '_'): str(i) for i, module in enumerate(body.feature_info.module_name())}
    model = train_a_step(BackboneWithFPN(body, levels, body.feature_info.channels(), 16))
    assert [tuple(y.shape[1:]) for y in outputs(model)] == [(16, 8, 8), (16, 4, 4), (16, 2, 2), (16, 1, 1)]
    fused = fuse_fbn(model, X)
    assert count(model, FBNConv2d) and not count(fused, _BatchNorm)
    assert_same_outputs(fused, model)


@pytest.mark.parametrize('name', NAMES)
def test_segmentation_network_trains_and_fuses(name):
    model = train_a_step(smp.Unet(f'tu-{name}', encoder_weights=None, classes=3, decoder_channels=(32, 24, 16, 16, 8)))
    fused = fuse_fbn(model, X)
    assert count(model, FBNConv2d) and not count(fused, _BatchNorm) and not count(fused, FBNConv2d)
    assert_same_outputs(fused, model)
