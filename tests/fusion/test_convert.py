"""convert_fbn: which pairs become FBN layers, and what of them stays."""
import logging

import pytest
import timm
import torch
import torch.nn as nn
from nets import SMALL, X, SelfPadding, sequence

from timm_finet import FBNConv2d, convert_fbn


@pytest.mark.parametrize('layers', [
    lambda: (nn.Conv2d(4, 4, 3, padding='same'), nn.BatchNorm2d(4)),
    lambda: (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    lambda: (nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)),
    lambda: (SelfPadding(4, 4, 3), nn.BatchNorm2d(4)),
])
def test_pairs_that_fbn_cannot_stand_for_are_not_converted(layers):
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


@pytest.mark.parametrize('norm_kwargs', [{}, dict(affine=False), dict(bias=False)])
def test_converting_keeps_bias_freezing_and_mode(norm_kwargs, randomise):
    norm = nn.BatchNorm2d(4, **norm_kwargs)
    norm.running_mean.normal_()
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
    model[1].track_running_stats = False  # in training they stay as they are
    converted = convert_fbn(model, 1)
    torch.testing.assert_close(converted(SMALL), model(SMALL))
    torch.testing.assert_close(converted[0].bn.running_var, model[1].running_var)
    assert converted[0].bn.num_batches_tracked is None


def test_converting_without_affine_terms_may_change_outputs(randomise):
    model = randomise(timm.create_model('test_resnet')).eval()
    layers = [m for m in convert_fbn(model, 2, affine=False).modules() if isinstance(m, FBNConv2d)]
    assert layers and not any(m.bn.affine for m in layers)


@pytest.mark.parametrize('fbn_groups, message', [
    (0, 'fbn_groups=0'), (7, 'fbn_groups=7'), (SMALL, 'fbn_groups=a Tensor must be an integer of at least 1')])
def test_converting_refuses_groups_that_fit_nothing(fbn_groups, message):
    with pytest.raises(ValueError, match=message):
        convert_fbn(timm.create_model('test_resnet'), fbn_groups)


def test_converting_says_how_many_of_how_many(caplog):
    with caplog.at_level(logging.INFO):
        convert_fbn(timm.create_model('mobilenetv3_small_050'), 7, example_inputs=X.float())
    assert '1 of the 53 convolutions of MobileNetV3 converted to FBN' in caplog.text


def test_norms_that_share_their_parameters_are_not_converted():
    model = nn.Sequential(*sequence(), *sequence())
    model[3].weight = model[1].weight
    with pytest.raises(ValueError, match='no convolution'):
        convert_fbn(model, 2)
