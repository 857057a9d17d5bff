"""Finet as a timm model."""
import gc
import re
import weakref
from copy import deepcopy

import accelerate
import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save_model
from timm.layers import DropPath, create_feature_extractor
from timm.models import group_parameters
from torch.nn.modules.batchnorm import _BatchNorm

from timm_finet import FBNConv2d, finet, fuse_fbn
from timm_finet.images import shipped_images

NAMES = [
    f'finet_{size}{se}{groups}'
    for size in ('small', 'large') for se in ('', '_se') for groups in ('', '_g2', '_g4', '_g6', '_g8')]


def test_every_name_is_registered():
    found = timm.list_models('*finet*', exclude_filters=['*_tied', '*_quiet'])  # scripts', where their tests ran before
    assert sorted(found) == sorted(NAMES) == sorted(timm.list_models(module='finet'))


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow) if re.search('resnet50|large(?!_se_g4)', name) else name
    for name in NAMES + timm.list_models('*_fbn*')])
def test_fused_equals_unfused(name, randomise):
    model = randomise(timm.create_model(name, num_classes=7).double()).eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    fused = fuse_fbn(model, x)
    assert not any(isinstance(m, (_BatchNorm, FBNConv2d)) for m in fused.modules())
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused.forward_features(x), model.forward_features(x))
    deploy = timm.create_model(name, num_classes=7, fused=True).double().eval()
    deploy.load_state_dict(fused.state_dict())
    torch.testing.assert_close(deploy(x), fused(x), rtol=0, atol=0)


def test_one_group_runs_on_plain_batchnorm():
    model = timm.create_model('finet_small')
    assert {m.fbn_groups for m in model.modules() if isinstance(m, FBNConv2d)} == {1}


@pytest.mark.parametrize('act_place', finet.ACT_PLACES)
def test_act_place_moves_one_relu(act_place):
    model = timm.create_model('finet_small', act_place=act_place)
    block = model.stages[0][1]
    acts = dict(depthwise=block.act_dw, pointwise=block.act2, output=block.act_out)
    assert [place for place, act in acts.items() if isinstance(act, nn.ReLU)] == [act_place]
    assert (block(torch.randn(2, 30, 8, 8)).min() >= 0) == (act_place == 'output')


@pytest.mark.parametrize('kwargs, message', [
    (dict(act_place='end'), "act_place='end'.*depthwise, pointwise, output"),
    (dict(fbn_groups=0), 'fbn_groups=0'),
    (dict(fbn_groups='4'), "fbn_groups='4' must be an integer"),
    (dict(fbn_group_size=0), 'fbn_group_size=0'),
    (dict(fbn_group_size=2.5), 'fbn_group_size=2.5 must be an integer'),
    (dict(affine='false'), "affine='false' must be True or False"),
    (dict(small_input='False'), "small_input='False'"),
    (dict(fused='no'), "fused='no'"),
    (dict(fbn_groups=2, fbn_group_size=20), 'exclude each other'),
    (dict(channels=(30, 60)), r'channels=\(30, 60\) and depths=.* must each have one number per stage'),
])
def test_bad_arguments_name_themselves(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('finet_small', **kwargs)


def test_affine_off_has_as_many_parameters_at_any_groups():
    counts = {
        sum(p.numel() for p in timm.create_model('finet_large', affine=False, fbn_groups=g).parameters())
        for g in (1, 2, 4)}
    assert len(counts) == 1


def test_dropout_is_on_both_fully_connected_inputs():
    model = timm.create_model('finet_small', drop_rate=1.0)
    model.fc1.eval()
    model.fc1.bn.running_mean.fill_(-1.)  # relu(1 / sqrt(1 + eps)): what FC1 makes of an input that is all zeros
    seen = {}
    model.fc1.register_forward_pre_hook(lambda m, args: seen.update(fc1=args[0]))
    model.classifier.register_forward_pre_hook(lambda m, args: seen.update(fc2=args[0]))
    model(torch.randn(2, 3, 32, 32))
    assert seen['fc1'].count_nonzero() == 0 and seen['fc2'].count_nonzero() == 0
    assert timm.create_model('finet_small').drop_rate == 0.2


def test_state_dict_round_trip(tmp_path, randomise):
    model = randomise(timm.create_model('finet_small_se_g2', num_classes=5)).eval()
    save_model(model, str(tmp_path / 'model.safetensors'))
    again = timm.create_model(
        'finet_small_se_g2', num_classes=5, checkpoint_path=str(tmp_path / 'model.safetensors')).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize('fused', [True, False])
@pytest.mark.parametrize('strict', [True, False])
@pytest.mark.parametrize('name', ['finet_small_g2', 'resnet18_fbn'])
def test_the_other_form_is_refused(name, fused, strict):
    model, other = timm.create_model(name, fused=fused), timm.create_model(name, fused=not fused)
    with pytest.raises(RuntimeError, match='train form.*fused' if fused else 'fused.*train form'):
        model.load_state_dict(other.state_dict(), strict=strict)


@pytest.mark.parametrize('name, head', [('finet_small_g2', 'classifier'), ('resnet18_fbn', 'fc')])
def test_part_of_a_checkpoint_is_of_either_form(name, head):
    for fused in (False, True):
        model = timm.create_model(name, num_classes=3, fused=fused)
        part = {f'{head}.weight': torch.ones(3, model.num_features), f'{head}.bias': torch.ones(3)}
        model.load_state_dict({}, strict=False)
        model.load_state_dict(part, strict=False)
        assert model.get_classifier().bias.eq(1).all()
        with pytest.raises(RuntimeError, match='Missing key'):
            model.load_state_dict(part)


@pytest.mark.parametrize('form', ['train', 'fused'])
def test_embedded_weights_reach_their_accuracy(form):
    model = timm.create_model('finet_small_g4.cifar10', pretrained=True).eval()
    if form == 'fused':
        model = fuse_fbn(model)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    images, labels = shipped_images()
    with torch.inference_mode():
        guesses = model(torch.stack([transform(p) for p in images])).argmax(1)
    assert (guesses == torch.tensor(labels)).double().mean() >= 0.88


def test_pretrained_weights_transfer():
    model = timm.create_model('finet_small_g4.cifar10', pretrained=True, num_classes=3, in_chans=1)
    source = timm.create_model('finet_small_g4.cifar10', pretrained=True)
    assert model.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    summed = source.stem.conv.weight.sum(1, keepdim=True).half().float()  # as timm adds in the file's own precision
    torch.testing.assert_close(model.stem.conv.weight, summed)
    torch.testing.assert_close(model.stages.state_dict(), source.stages.state_dict())
    features = timm.create_model('finet_small_g4.cifar10', pretrained=True, features_only=True).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(features(x), source.eval().forward_intermediates(x, intermediates_only=True))


def test_grad_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = timm.create_model('finet_small_g2', drop_rate=0.).double().train()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('way', ['forward', 'forward_intermediates'])
def test_grad_checkpointing_runs_the_blocks_again_in_the_backward_pass_alone(way):
    model = timm.create_model('finet_small_g2', small_input=True).train()
    calls = []
    model.stages[1][0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        calls.clear()
        y = getattr(model, way)(torch.randn(2, 3, 16, 16))
        assert len(calls) == 1
        (y[0] if way == 'forward_intermediates' else y).square().sum().backward()
        assert len(calls) == 1 + enable


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('num_classes, pool', [(7, None), (7, 'max'), (0, '')])
@pytest.mark.parametrize('name', ['finet_small_g2', 'resnet18_fbn'])
def test_a_new_classifier_is_of_the_networks_mode_and_dtype(name, num_classes, pool, training):
    model = timm.create_model(name, small_input=True, dtype=torch.bfloat16).train(training)
    model.reset_classifier(num_classes, pool)
    assert {module.training for module in model.modules()} == {training}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.num_classes == num_classes
    features = model.forward_features(torch.randn(2, 3, 32, 32, dtype=torch.bfloat16))
    width = model.num_features
    pooled = model.global_pool(features)
    assert pooled.shape[2:] == ((4, 4) if pool == '' else ((1, 1) if 'finet' in name else ()))
    if pool == 'max':
        assert torch.equal(pooled.flatten(), features.amax((2, 3)).flatten())
    assert model.forward_head(features).shape == ((2, 7) if num_classes else (2, width, 4, 4))


@pytest.mark.parametrize('last', range(5))
def test_what_lies_behind_the_last_level_is_left_out(last, randomise):
    model = randomise(timm.create_model('finet_small_g2', small_input=True)).eval()
    x, ran = torch.randn(1, 3, 32, 32), []
    levels = model.forward_intermediates(x, intermediates_only=True)
    features = model.forward_features(x)
    for stage in model.stages:
        stage.register_forward_pre_hook(lambda stage, args: ran.append(stage))
    level, = model.forward_intermediates(x, indices=[last], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(level, levels[last], rtol=0, atol=0)
    assert ran == list(model.stages[:max(0, last - 1)])
    end, (again,) = model.forward_intermediates(x, indices=[last], stop_early=True)
    torch.testing.assert_close((again, end), (level, features if last == 4 else level), rtol=0, atol=0)
    assert model.prune_intermediate_layers([last]) == [last]
    assert len(model.stages) == max(0, last - 1)
    torch.testing.assert_close(model(x), features if last == 4 else levels[last], rtol=0, atol=0)
    assert model.num_features == model(x).shape[1] and isinstance(model.fc1, nn.Identity)


def test_head_gives_what_it_is_asked_for():
    """FC1 is as wide as what is pooled; before the classifier there is what it reads."""
    model = timm.create_model('finet_small_g2', num_classes=5, global_pool='catavgmax').eval()
    features = model.forward_features(torch.randn(2, 3, 64, 64))
    before = model.forward_head(features, pre_logits=True)
    assert model.fc1.conv.in_channels == 2 * model.num_features and before.shape == (2, model.num_features)
    torch.testing.assert_close(model.classifier(before), model.forward_head(features))


@pytest.mark.parametrize('coarse, count', [(True, 1 + 3 + 1), (False, 1 + 16 + 1)])
def test_layers_are_grouped_by_block_or_coarsely_by_stage(coarse, count):
    """For train.py --layer-decay: the stem, the blocks or their stages, FC1 with the last of them, the classifier."""
    model = timm.create_model('finet_small_se_g2')
    groups = group_parameters(model, model.group_matcher(coarse))
    assert len(groups) == count and sum(map(len, groups.values())) == len(list(model.parameters()))
    assert groups[0] and all(name.startswith('stem') for name in groups[0])


@pytest.mark.parametrize('name', ['finet_small_se_g2', 'resnet18_fbn'])
def test_affine_off_drops_the_terms_of_fbn_alone(name):
    model = timm.create_model(name, affine=False)
    of_fbn = {m.bn for m in model.modules() if isinstance(m, FBNConv2d)}
    others = {m for m in model.modules() if isinstance(m, _BatchNorm)} - of_fbn
    assert of_fbn and not any(bn.affine for bn in of_fbn) and others and all(bn.affine for bn in others)


@pytest.mark.parametrize('small_input', [True, False])
@pytest.mark.parametrize('name', ['finet_small_se_g4', 'resnet18_fbn'])
def test_network_is_built_on_the_device_and_in_the_dtype_that_are_given(name, small_input):
    model = timm.create_model(name, small_input=small_input, device='meta', dtype=torch.bfloat16)
    tensors = [*model.parameters(), *model.buffers()]
    assert {(t.device.type, t.dtype) for t in tensors} <= {('meta', torch.bfloat16), ('meta', torch.int64)}


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('name', ['finet_small_se_g4', 'resnet18_fbn'])
def test_network_is_built_with_parameters_alone_on_the_meta_device(name, fused):
    with accelerate.init_empty_weights():  # buffers stay on the CPU
        model = timm.create_model(name, fused=fused)
    assert {p.device.type for p in model.parameters()} == {'meta'}
    assert list(model.state_dict()) == list(timm.create_model(name, fused=fused).state_dict())


def test_fused_network_is_freed_with_its_last_reference():
    model = timm.create_model('finet_small_se_g4', fused=True)
    parameters = [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        del model
        assert not any(parameter() is not None for parameter in parameters)
    finally:
        gc.enable()


@pytest.mark.parametrize('name', ['finet_small_se_g4', 'resnet18_fbn'])
def test_images_of_other_channels_keep_a_stem_of_plain_batchnorm(name):
    model = timm.create_model(name, in_chans=4).eval()  # which the groups would divide
    stem = model.get_submodule(model.pretrained_cfg['first_conv'])
    assert (model.in_chans if 'finet' in name else stem.in_channels) == 4 and type(stem) is nn.Conv2d
    assert model(torch.randn(1, 4, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize('size', [7, 500])
def test_groups_of_a_size_that_divides_no_width_divide_a_wider_one(size):
    model = timm.create_model('finet_small', fbn_group_size=size)
    layers = [m for m in model.modules() if isinstance(m, FBNConv2d)]
    assert {m.fbn_groups for m in layers} == {max(1, m.in_channels // size) for m in layers}
    assert all(0 <= info['num_chs'] - chs < 7 for info, chs in zip(model.feature_info[1:], (24, 30, 60, 120)))


def test_convolution_and_norm_that_cannot_be_fused_are_left():
    model = timm.create_model('finet_small').eval()
    model.stem.bn = nn.GroupNorm(2, 24).eval()
    assert isinstance(model.stem.fuse().bn, nn.GroupNorm)


@pytest.mark.parametrize('name', ['finet_small_g2', 'resnet18_fbn'])
def test_stochastic_depth_and_dropout_reach_the_network(name):
    model = timm.create_model(name, drop_path_rate=0.25, drop_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert model.drop_rate == 0.5 and max(rates) == pytest.approx(0.25) and rates == sorted(rates)


@pytest.mark.parametrize('name, part', [
    ('finet_small_g2', 'stages.0.1'), ('resnet18_fbn', 'layer1.0'),
    pytest.param('finet_small_g2', '', marks=pytest.mark.slow),
    pytest.param('resnet18_fbn', '', marks=pytest.mark.slow)])
def test_compiled_step_equals_eager(name, part):
    torch.compiler.reset()
    network = timm.create_model(name, num_classes=4, small_input=True, drop_rate=0.).double()
    model = network.get_submodule(part)
    compiled = deepcopy(model)
    x = torch.randn(4, next(model.parameters()).shape[1] if part else 3, 16, 16, dtype=torch.float64)
    for net in (model, torch.compile(compiled, backend='aot_eager')):
        net(x).square().sum().backward()
    for (key, p), q in zip(model.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8, msg=key)
    torch.testing.assert_close(dict(model.named_buffers()), dict(compiled.named_buffers()))


def test_tracing_takes_fbn_as_a_leaf_and_without_leaves_eval_mode_alone():
    model = timm.create_model('finet_small_g2', drop_rate=0.)
    x = torch.randn(2, 3, 32, 32)
    for mode in (True, False):
        extractor = create_feature_extractor(model.train(mode), {'classifier': 'y'}).train(mode)
        torch.testing.assert_close(extractor(x)['y'], model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(model.train())


@pytest.mark.parametrize('name', ['finet_small_se_g4', 'finet_small', 'resnet18_fbn'])
def test_timms_batchnorm_arguments_reach_every_norm_fbns_own_included(name):
    """train.py --bn-eps --bn-momentum."""
    model = timm.create_model(name, bn_eps=1e-3, bn_momentum=0.02)
    assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, _BatchNorm)} == {(1e-3, 0.02)}
    default = timm.create_model(name)
    assert {(m.eps, m.momentum) for m in default.modules() if isinstance(m, _BatchNorm)} == {(1e-5, 0.1)}


def test_stochastic_depth_rises_over_the_blocks_with_an_identity():
    """train.py --drop-path."""
    model = timm.create_model('finet_small_g4', drop_path_rate=0.3, drop_rate=0., num_classes=5).train()
    blocks = [block for stage in model.stages for block in stage]
    rates = [getattr(block.drop_path, 'drop_prob', None) for block in blocks]
    assert rates == pytest.approx([0.02 * i if block.has_identity else None for i, block in enumerate(blocks)])
    x = torch.randn(1, 120, 4, 4)
    with torch.no_grad():
        block = timm.create_model('finet_small_g4', drop_path_rate=1., channels=(32, 64, 120)).stages[-1][-1].train()
        torch.testing.assert_close(block(x.repeat(9, 1, 1, 1)), x.repeat(9, 1, 1, 1))
    keys = timm.create_model('finet_small_g4', num_classes=5).state_dict().keys()
    assert model.state_dict().keys() == keys


def test_relu_inside_the_convolution_changes_nothing_and_hides_nothing(monkeypatch):
    model = timm.create_model('finet_small_g4', num_classes=4, small_input=True, drop_rate=0.).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)

    def step(model):
        model.zero_grad()
        y = model(x)
        y.square().sum().backward()
        return [y, *(p.grad for p in model.parameters())]

    models = [deepcopy(model) for _ in range(3)]
    expected = step(models[0])
    monkeypatch.setattr(finet, 'RELU_INSIDE', ('cpu',))
    calls = []
    monkeypatch.setattr(nn.ReLU, 'forward', lambda self, x: calls.append(self) or nn.functional.relu(x))
    torch.testing.assert_close(step(models[1]), expected)
    blocks = [m for m in models[1].modules() if isinstance(m, finet.Block)]
    assert blocks and not {block.act1 for block in blocks} & set(calls)

    seen = []
    block = next(m for m in models[2].modules() if isinstance(m, finet.Block))
    block.conv1.register_forward_hook(lambda module, args, y: seen.append(y.min().item()))
    torch.testing.assert_close(step(models[2]), expected)
    assert seen[0] < 0 and block.act1 in calls


class Leaky(nn.ReLU):
    def forward(self, x):
        return nn.functional.leaky_relu(x)


CHANGES = dict(
    replaced=lambda block: setattr(block, 'act1', nn.GELU()), subclass=lambda block: setattr(block, 'act1', Leaky()),
    hooked=lambda block: block.act1.register_forward_hook(lambda module, args, y: y + 1),
    patched=lambda block: setattr(block.conv1, 'forward', lambda x: FBNConv2d.forward(block.conv1, x) + 1))


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_what_was_changed_about_an_activation_or_its_convolution_stays_in_force(change, monkeypatch):
    block = timm.create_model('finet_small_g4').stages[0][0].double()
    x = torch.randn(2, block.conv1.in_channels, 8, 8, dtype=torch.float64)
    before = block(x)
    change(block)
    expected = block(x)
    assert not torch.allclose(expected, before)
    monkeypatch.setattr(finet, 'RELU_INSIDE', ('cpu',))
    torch.testing.assert_close(block(x), expected)
