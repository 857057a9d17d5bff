"""fuse_fbn on timm's networks: their forms, features and hooks, and timm's own ways to fold them."""
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn as nn
from nets import SMALL, X, norms
from timm.models import reparameterize_model
from torch.nn.utils import fuse_conv_bn_eval

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def example(model):
    """Return one image, small if the network takes any size."""
    size = model.pretrained_cfg['input_size'] if model.pretrained_cfg.get('fixed_input_size') else (3, 64, 64)
    return torch.randn(1, *size)


# In these networks every BatchNorm stands behind a convolution. All except resnet use BatchNormAct2d.
@pytest.mark.parametrize('name', [
    'resnet10t', 'mobilenetv3_small_050', 'regnetx_002', *slow('efficientnet_lite0', 'hardcorenas_a')])
def test_any_timm_network_fuses_without_a_trace_of_norm(name, randomise):
    model = randomise(timm.create_model(name).double()).eval()
    fused = fuse_fbn(model, X)
    assert norms(model) > 10 and norms(fused) == 0
    assert type(fused) is type(model) and fused.pretrained_cfg == model.pretrained_cfg
    torch.testing.assert_close(fused(X), model(X))
    torch.testing.assert_close(fused.forward_features(X), model.forward_features(X))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_timms_networks_need_no_example_in_any_dtype(dtype, randomise):
    model = randomise(timm.create_model('test_resnet', in_chans=1)).to(dtype).eval()
    state = torch.get_rng_state()
    assert norms(fuse_fbn(model)) == 0 < norms(convert_fbn(model, 2))
    assert torch.equal(torch.get_rng_state(), state)  # the random images leave the user's generator alone


def test_timms_networks_fuse_on_the_meta_device():
    model = timm.create_model('test_resnet', device='meta', in_chans=1).eval()
    fused = fuse_fbn(model)
    assert norms(fused) == 0 and all(p.is_meta for p in fused.parameters())


def test_intermediates_stay_too(randomise):
    """ghostnet's `forward_intermediates` takes a tensor in front of its first norm, unlike its forward."""
    model = randomise(timm.create_model('ghostnet_050').double()).eval()
    fused = fuse_fbn(model, X)
    assert norms(fused) == 1
    for a, b in zip(fused.forward_intermediates(X)[1], model.forward_intermediates(X)[1], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('feature_cls', [None, 'getter', 'fx', 'hook'])
@pytest.mark.parametrize('name', ['finet_small_g2', 'resnet18_fbn'])
def test_features_only_wrappers_fuse(name, feature_cls, randomise):
    kwargs = {} if feature_cls is None else dict(feature_cls=feature_cls)
    model = randomise(timm.create_model(name, features_only=True, **kwargs).double()).eval()
    x = X[..., :32, :32]
    fused = fuse_fbn(model, x)
    assert not any(isinstance(m, FBNConv2d) for m in fused.modules())
    for a, b in zip(fused(x), model(x)):
        torch.testing.assert_close(a, b)


def test_low_precision_network_fuses_in_float32(randomise):
    model = randomise(timm.create_model('finet_small_g4')).eval()
    half = fuse_fbn(deepcopy(model).bfloat16(), X.bfloat16())
    exact = fuse_fbn(deepcopy(model).bfloat16().float(), X.float())
    for (key, p), q in zip(half.named_parameters(), exact.parameters()):
        assert p.dtype == torch.bfloat16
        torch.testing.assert_close(p, q.bfloat16(), rtol=0, atol=0, msg=key)


@pytest.mark.parametrize('name', ['ghostnet_050', *slow('levit_128s', 'efficientformerv2_s0', 'mobilevit_xxs')])
def test_fused_networks_are_copied_saved_scripted_and_exported(name, randomise, tmp_path):
    model = randomise(timm.create_model(name)).eval()
    x = example(model)
    fused = fuse_fbn(model, x)
    torch.save(deepcopy(fused), tmp_path / 'fused.pt')
    exported = torch.export.export(deepcopy(fused), (x,)).module()  # torch 2.9 leaves fake tensors in caches
    with torch.no_grad():
        y = fused(x)
        torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-3)
        for other in (torch.load(tmp_path / 'fused.pt', weights_only=False), torch.jit.script(fused), exported):
            torch.testing.assert_close(other(x), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', [
    'levit_128s', *slow('repghostnet_050', 'fastvit_t8', 'repvit_m0_9', 'mobileone_s0', 'efficientvit_m1')])
def test_networks_that_fold_themselves_do_so_before_and_after(name, randomise):
    model = randomise(timm.create_model(name)).eval()
    x = example(model)
    with torch.no_grad():
        y = model(x)
        fused = fuse_fbn(model, x)
        before = fuse_fbn(reparameterize_model(model), x)
        assert norms(before) <= norms(fused) < norms(model)
        for other in (before, reparameterize_model(fused), fuse_fbn(reparameterize_model(fused), x)):
            torch.testing.assert_close(other(x), y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


def fold(self):
    self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()
    return self


@pytest.mark.parametrize('name', ['fuse', 'reparameterize', 'switch_to_deploy'])
def test_what_folds_itself_by_a_method_of_any_name_is_folded_once(name, randomise):
    folds_itself = type('FoldsItself', (Pair,), {name: fold})
    model = randomise(nn.Sequential(folds_itself()).double()).eval()
    fused = fuse_fbn(model, SMALL)
    assert norms(fused) == 0
    for other in (fused, reparameterize_model(fused)):
        torch.testing.assert_close(other(SMALL), model(SMALL))


@pytest.mark.parametrize('name', ['repvgg_a0', 'levit_128s', *slow('fastvit_t8', 'repvit_m0_9', 'efficientvit_m1')])
def test_what_folds_itself_leaves_what_was_converted(name, randomise):
    """As in validate.py --reparam, which would read the norms that are no longer there."""
    model = randomise(timm.create_model(name)).eval()
    x = example(model)
    with torch.no_grad():
        converted = convert_fbn(model, 2, example_inputs=x)
        y = converted(x)
        for other in (reparameterize_model(converted), fuse_fbn(reparameterize_model(converted), x)):
            torch.testing.assert_close(other(x), y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))


def test_timms_reparameterize_model_fuses_all_of_finet(randomise):
    model = randomise(timm.create_model('finet_small_se_g4').double()).eval()
    fused = reparameterize_model(model)
    assert norms(fused) == 0 and list(fused.state_dict()) == list(fuse_fbn(model, X).state_dict())
    torch.testing.assert_close(fused(X), model(X))
    torch.testing.assert_close(reparameterize_model(fused)(X), model(X))
    trained = reparameterize_model(model.train())  # timm's scripts fuse before they call `.eval()`
    assert norms(trained) == 0
    torch.testing.assert_close(trained.eval()(X), model.eval()(X))


def test_timms_reparameterize_model_leaves_what_is_hooked(randomise):
    model = randomise(timm.create_model('finet_small_g2').double()).eval()
    seen = []
    model.stem.conv.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    fused = reparameterize_model(model)
    assert norms(fused) == 1
    torch.testing.assert_close(fused(X), model(X))
    torch.testing.assert_close(*seen)
