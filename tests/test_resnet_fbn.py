"""timm's ResNet with FBN."""
import pytest
import timm
import torch
from timm.models.resnet import ResNet
from torch.nn.modules.batchnorm import _BatchNorm

from timm_finet import FBNConv2d, fuse_fbn


@pytest.mark.parametrize('name, plain, fbn_groups', [
    ('resnet18_fbn', 'resnet18', 2), ('resnet18_fbn_g4', 'resnet18', 4),
    ('resnet50_fbn', 'resnet50', 2), ('resnet50_fbn_g4', 'resnet50', 4),
])
def test_it_is_timms_resnet_but_for_fbn(name, plain, fbn_groups):
    model, resnet = timm.create_model(name), timm.create_model(plain)
    layers = [m for m in model.modules() if isinstance(m, FBNConv2d)]
    convs = [m for m in resnet.modules() if isinstance(m, torch.nn.Conv2d)]
    assert isinstance(model, ResNet) and len(layers) == len(convs) - 1  # the stem has three input channels
    assert {m.fbn_groups for m in layers} == {fbn_groups}
    extra = 2 * (fbn_groups - 1) * sum(m.out_channels for m in layers)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in resnet.parameters()) + extra


@pytest.mark.parametrize('name', ['resnet18', pytest.param('resnet50', marks=pytest.mark.slow)])
def test_one_group_is_timms_resnet_and_takes_its_checkpoints(name, randomise, tmp_path):
    resnet = randomise(timm.create_model(name)).eval()
    torch.save(dict(state_dict=resnet.state_dict()), tmp_path / 'plain.pth')
    model = timm.create_model(f'{name}_fbn', fbn_groups=1, checkpoint_path=str(tmp_path / 'plain.pth')).eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(model.double()(x), resnet.double()(x))
    overlay = dict(file=str(tmp_path / 'plain.pth'))
    again = timm.create_model(
        f'{name}_fbn', fbn_groups=1, num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay).eval().double()
    torch.testing.assert_close(again.forward_features(x), model.forward_features(x), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match='fbn_groups=2: build it with fbn_groups=1'):
        timm.create_model(f'{name}_fbn', checkpoint_path=str(tmp_path / 'plain.pth'))


def test_a_checkpoint_of_its_own_with_pooled_shortcuts_loads():
    model, other = (timm.create_model('resnet18_fbn', avg_down=True) for _ in range(2))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_last_norms_start_at_zero_as_in_timm():
    block = timm.create_model('resnet18_fbn').layer1[0]
    assert block.conv2.bn.weight.count_nonzero() == 0 and block.conv1.bn.weight.eq(1).all()


def test_small_input_stem():
    model = timm.create_model('resnet18_fbn', features_only=True, small_input=True, in_chans=1).eval()
    assert [x.shape[-1] for x in model(torch.zeros(1, 1, 32, 32))] == [32, 32, 16, 8, 4]
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]


def test_small_input_stem_is_as_wide_as_the_one_it_replaces():
    model = timm.create_model('resnet18_fbn', small_input=True, stem_type='deep', features_only=True).eval()
    assert [x.shape[1] for x in model(torch.zeros(1, 3, 32, 32))] == [128, 64, 128, 256, 512]


def test_norms_of_attention_without_a_convolution_of_their_name_stay():
    model = timm.create_model('resnet18_fbn', block_args=dict(attn_layer='sk')).eval()
    assert type(model.layer1[0].se.attn.bn) is torch.nn.BatchNorm2d and type(model.layer1[0].conv1) is FBNConv2d
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)


def test_timms_init_weights_reaches_fbn():
    model = timm.create_model('resnet50_fbn')
    before = model.state_dict()
    expected = {key for key, value in before.items() if value.dim() == 4} | {
        f'{name}.conv3.bn.weight' for name, module in model.named_modules() if hasattr(module, 'conv3')}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    model.init_weights()
    changed = {key for key, parameter in model.named_parameters() if not parameter.eq(7).all()}
    assert changed == expected and model.layer1[0].conv3.bn.weight.count_nonzero() == 0
    torch.testing.assert_close(model.layer1[0].conv2.weight.std().item(), (2 / (9 * 64)) ** 0.5, rtol=0.05, atol=0)


@pytest.mark.parametrize('kwargs', [
    dict(model_name='resnet18_fbn'), dict(model_name='resnet18_fbn', small_input=True),
    pytest.param(
        dict(model_name='resnet50_fbn_g4', stem_type='deep', stem_width=32, cardinality=2), marks=pytest.mark.slow)])
def test_the_deploy_form_takes_what_fuse_fbn_gives(kwargs, randomise):
    model = randomise(timm.create_model(**kwargs)).eval()
    deploy = timm.create_model(**kwargs, fused=True)
    assert deploy.training and all(module.training for module in deploy.modules())
    assert not any(isinstance(module, (FBNConv2d, _BatchNorm)) for module in deploy.modules())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    deploy.load_state_dict(fuse_fbn(model, x.float()).state_dict())
    with torch.no_grad():
        torch.testing.assert_close(deploy.eval().double()(x), model.double()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('kwargs, message', [
    (dict(fbn_groups=3), 'fbn_groups=3 does not divide the 64 channels of layer.*: give a divisor of 64'),
    (dict(fbn_groups=128), 'fbn_groups=128 does not divide'),
    (dict(fbn_groups=64, channels=(48, 96, 192, 384)), 'does not divide the 48 channels of .*: give a divisor of 16'),
    (dict(fbn_groups=0), 'fbn_groups=0 must be an integer of at least 1'),
    (dict(norm_layer='groupnorm'), 'norm_layer=.* has no FBN form: use BatchNorm2d'),
    (dict(fbn_groups='4'), "fbn_groups='4' must be an integer"),
    (dict(affine='false'), "affine='false' must be True or False"),
])
def test_groups_that_would_leave_plain_batchnorm_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('resnet18_fbn', **kwargs)
