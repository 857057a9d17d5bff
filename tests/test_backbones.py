"""FBN networks as encoders of larger ones: trained a step with them, then fused with them."""
import pytest
import timm
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.backbone_utils import BackboneWithFPN

from timm_finet import FBNConv2d, fuse_fbn
from timm_finet.hub import save_for_hf

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


@pytest.mark.parametrize('name', ['finet_small_g4.cifar10', 'resnet18_fbn.cifar10'])
@pytest.mark.parametrize('by', ['checkpoint', 'folder'])
def test_own_checkpoint_loads_into_a_backbone_whose_keys_are_flattened(by, name, randomise, tmp_path):
    """As docs/weights.md says: by `checkpoint_path` timm would look for the flattened keys in the file."""
    own = randomise(timm.create_model(name, num_classes=3)).eval()
    if by == 'checkpoint':
        torch.save(own.state_dict(), tmp_path / 'own.pth')
        source, overlay = name, dict(pretrained_cfg_overlay=dict(file=str(tmp_path / 'own.pth')))
        with pytest.raises(RuntimeError, match='in loading state_dict'):
            timm.create_model(name, features_only=True, checkpoint_path=str(tmp_path / 'own.pth'))
    else:
        save_for_hf(own, str(tmp_path))
        source, overlay = f'local-dir:{tmp_path}', {}
    body = timm.create_model(source, features_only=True, pretrained=True, **overlay).eval()
    assert any(key.startswith(('stages_0', 'layer1')) for key in body.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        for a, b in zip(body(x), own.forward_intermediates(x, intermediates_only=True), strict=True):
            torch.testing.assert_close(a, b)


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
    import segmentation_models_pytorch as smp  # takes seconds
    model = train_a_step(smp.Unet(f'tu-{name}', encoder_weights=None, classes=3, decoder_channels=(32, 24, 16, 16, 8)))
    fused = fuse_fbn(model, X)
    assert count(model, FBNConv2d) and not count(fused, _BatchNorm) and not count(fused, FBNConv2d)
    assert_same_outputs(fused, model)
