"""convert_fbn: which pairs become FBN layers, and which of their properties stay."""
import logging
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn as nn
from nets import SMALL, X, SelfPadding, batch_norm, sequence

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn


@pytest.mark.parametrize('layers', [
    lambda: (nn.Conv2d(4, 4, 3, padding='same'), nn.BatchNorm2d(4)),
    lambda: (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    lambda: (nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)),
    lambda: (SelfPadding(4, 4, 3), nn.BatchNorm2d(4)),
])
def test_pairs_that_fbn_cannot_replace_are_not_converted(layers):
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


@pytest.mark.parametrize('terms', [['weight', 'bias'], ['weight'], []])
def test_converting_keeps_bias_freezing_and_mode(terms):
    norm = batch_norm(terms, 4)
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
    model = randomise(sequence()).double()
    model[1].num_batches_tracked = None
    model[1].track_running_stats = False  # training does not change them
    converted = convert_fbn(model, 1)
    torch.testing.assert_close(converted(SMALL), model(SMALL))
    torch.testing.assert_close(converted[0].bn.running_var, model[1].running_var)
    assert converted[0].bn.num_batches_tracked is None


def test_converting_without_affine_terms_may_change_outputs(randomise):
    model = randomise(timm.create_model('test_resnet')).eval()
    layers = [m for m in convert_fbn(model, 2, affine=False).modules() if isinstance(m, FBNConv2d)]
    assert layers and not any(m.bn.affine for m in layers)


@pytest.mark.parametrize('fbn_groups, message', [
    (0, 'fbn_groups=0'), (7, 'fbn_groups=7'),
    (SMALL, 'fbn_groups=a Tensor must be an integer of at least 1. Pass an example as example_inputs=')])
def test_converting_refuses_groups_that_fit_nothing(fbn_groups, message):
    with pytest.raises(ValueError, match=message):
        convert_fbn(timm.create_model('test_resnet'), fbn_groups)


def test_converting_logs_how_many_convolutions_were_converted(caplog):
    with caplog.at_level(logging.INFO):
        convert_fbn(timm.create_model('mobilenetv3_small_050'), 7, example_inputs=X.float())
    assert '1 of the 53 convolutions of MobileNetV3 converted to FBN' in caplog.text


def test_norms_that_share_their_parameters_are_not_converted():
    model = nn.Sequential(*sequence(), *sequence())
    model[3].weight = model[1].weight
    with pytest.raises(ValueError, match='no convolution.* fits, as far as is known without example_inputs'):
        convert_fbn(model, 2)


def test_with_an_example_a_network_without_norms_is_known_to_have_no_pair():
    with pytest.raises(ValueError, match=r'no convolution.* fits\.$'):
        convert_fbn(nn.Sequential(nn.Conv2d(4, 4, 1)), 2, example_inputs=torch.zeros(1, 4, 2, 2))


PAIRS = dict(
    dilation=(dict(kernel_size=3, padding=2, dilation=2), {}),
    sides=(dict(kernel_size=(3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), {}),
    no_bias=(dict(bias=False), {}),
    eps=({}, dict(eps=0.1)),
    momentum=({}, dict(momentum=0.3)),
    no_affine=({}, dict(affine=False)),
)


@pytest.mark.parametrize('example', [None, SMALL])
@pytest.mark.parametrize('case', PAIRS)
def test_a_converted_pair_does_the_same_in_training_and_after_it(case, example, randomise):
    conv, norm = PAIRS[case]
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, **{'kernel_size': 1, **conv}), nn.BatchNorm2d(4, **norm))).double()
    model[1].num_batches_tracked.fill_(7)
    fused = fuse_fbn(deepcopy(model).eval(), example)
    assert isinstance(fused[1], nn.Identity)
    torch.testing.assert_close(fused(SMALL), deepcopy(model).eval()(SMALL))
    for fbn_groups in (1, 2):
        torch.testing.assert_close(convert_fbn(model, fbn_groups, example_inputs=example).eval()(SMALL),
                                   deepcopy(model).eval()(SMALL))
    converted = convert_fbn(model, 1, example_inputs=example)
    assert isinstance(converted[0], FBNConv2d)
    for training in (True, True, False):
        torch.testing.assert_close(converted.train(training)(SMALL), model.train(training)(SMALL))
    bn = converted[0].bn
    assert bn.num_batches_tracked == model[1].num_batches_tracked == 9
    torch.testing.assert_close(fuse_fbn(converted, example)(SMALL), model(SMALL))


def padded(mode):
    return lambda: (nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(4))


@pytest.mark.parametrize('example', [None, SMALL])
@pytest.mark.parametrize('layers', [
    padded('reflect'), padded('replicate'), padded('circular'),
    lambda: (nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4)),
    lambda: (nn.ConvTranspose2d(4, 4, 1), nn.BatchNorm2d(4)),
    lambda: (nn.Conv2d(4, 4, 3, padding='valid'), nn.BatchNorm2d(4))],
    ids=['reflect', 'replicate', 'circular', 'synchronised', 'transposed', 'valid'])
def test_pairs_that_fuse_and_are_not_converted(layers, example, randomise):
    model = randomise(nn.Sequential(*layers(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()).eval()
    converted, fused = convert_fbn(model, 2, example_inputs=example), fuse_fbn(model, SMALL)
    assert [type(layer) for layer in converted] == [type(model[0]), type(model[1]), FBNConv2d, nn.Identity]
    assert [type(layer) for layer in fused] == [type(model[0]), nn.Identity, nn.Conv2d, nn.Identity]
    for network in (converted, fused):
        torch.testing.assert_close(network(SMALL), model(SMALL))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_norms_of_a_wider_dtype_than_the_weights_keep_it(dtype, randomise):
    """Some networks keep normalisation in float32."""
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).eval()
    model[0].to(dtype)
    layer, = (m for m in convert_fbn(model, 2).modules() if isinstance(m, FBNConv2d))
    assert layer.weight.dtype == dtype
    assert {t.dtype for t in (layer.bn.running_mean, layer.bn.running_var, layer.bn.weight, layer.bn.bias)} == {
        torch.float32}
    fused, exact = fuse_fbn(model)[0], fuse_fbn(deepcopy(model).double())[0]
    assert fused.weight.dtype == fused.bias.dtype == dtype
    torch.testing.assert_close(fused.weight, exact.weight.to(dtype), rtol=0, atol=0)  # rounded once, at the end
    torch.testing.assert_close(fused.bias, exact.bias.to(dtype), rtol=0, atol=0)


def test_what_is_converted_in_a_wrapper_is_converted_as_asked():
    model = convert_fbn(nn.DataParallel(timm.create_model('test_resnet')), 1, affine=False, save_memory=True)
    layers = [m for m in model.modules() if isinstance(m, FBNConv2d)]
    assert layers and all(m.save_memory and not m.bn.affine for m in layers)


def test_one_group_saves_memory_only_on_request():
    model = nn.Sequential(nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6))
    for asked in ({}, dict(save_memory=True)):
        layer, = (m for m in convert_fbn(model, 1, **asked).modules() if isinstance(m, FBNConv2d))
        assert layer.save_memory == bool(asked)
