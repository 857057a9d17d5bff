"""What may stand in the place of an FBN layer's norm: it is passed by where that is known to be right, else called."""
import warnings
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, SplitBatchNorm2d, convert_splitbn_model
from timm.utils import freeze
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.ops import FrozenBatchNorm2d

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn
from timm_finet.fbn import ReferenceFBNConv2d, as_reference

G, IN, OUT = 4, 16, 8


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Positive(nn.Module):
    def forward(self, x):
        return x.abs() + 0.1


def frozen(layer):
    holder = nn.Sequential(layer)
    freeze(holder, '0.bn', include_bn_running_stats=True)


def parametrised(layer):
    parametrize.register_parametrization(layer.bn, 'weight', Positive())


def twice(bn, x):
    return 2 * nn.BatchNorm2d.forward(bn, x)


def own_forward(layer):
    layer.bn.forward = partial(twice, layer.bn)  # unlike a closure it goes with the layer's copies


def set_norm(make):
    def change(layer):
        layer.bn = make(layer.bn)
    return change


def like(kind, **kwargs):
    """A norm of another kind with the statistics and affine terms of the layer's own."""
    def make(bn):
        norm = kind(bn.num_features, **kwargs)
        norm.load_state_dict(bn.state_dict(), strict=False)
        return norm
    return set_norm(make)


def peft_wrapper(layer):
    from peft.utils import ModulesToSaveWrapper
    layer.bn = ModulesToSaveWrapper(layer.bn, 'default')
    with torch.no_grad():
        layer.bn.modules_to_save['default'].weight.add_(1)


def remove_statistics(layer):
    layer.bn.running_mean = layer.bn.running_var = None


PASSED_BY = {
    'BatchNorm2d': lambda layer: None,
    'BatchNorm2d in eval mode': lambda layer: layer.bn.eval(),
    'BatchNorm2d without running statistics': like(nn.BatchNorm2d, track_running_stats=False),
    'BatchNorm2d that counts no batches': lambda layer: setattr(layer.bn, 'num_batches_tracked', None),
    'SyncBatchNorm of one process': set_norm(nn.SyncBatchNorm.convert_sync_batchnorm),
    'FrozenBatchNorm2d': frozen,
    'a parametrised gamma': parametrised,
}
CALLED = {
    'a forward hook': lambda layer: layer.bn.register_forward_hook(lambda module, args, y: 2 * y),
    'a forward pre-hook': lambda layer: layer.bn.register_forward_pre_hook(lambda module, args: args[0] + 1),
    'a backward hook': lambda layer: layer.bn.register_full_backward_hook(
        lambda module, grads, _: tuple(3 * grad for grad in grads)),
    'a forward of the instance': own_forward,
    'a subclass with its own forward': like(Doubled),
    'BatchNormAct2d': like(BatchNormAct2d),
    'InstanceNorm2d with statistics': like(nn.InstanceNorm2d, affine=True, track_running_stats=True),
    'BatchNorm2d whose running statistics were removed': remove_statistics,
    'BatchNorm2d without a bias': lambda layer: setattr(layer.bn, 'bias', None),
    'GroupNorm': set_norm(lambda bn: nn.GroupNorm(4, bn.num_features)),
    'Identity': set_norm(lambda bn: nn.Identity()),
    'SplitBatchNorm2d': set_norm(lambda bn: convert_splitbn_model(nn.Sequential(bn), 2)[0]),
    'peft': peft_wrapper,
    'CheckpointWrapper': set_norm(checkpoint_wrapper.CheckpointWrapper),
    'a compiled module': set_norm(lambda bn: torch.compile(bn, backend='eager')),
}
KINDS = {**PASSED_BY, **CALLED}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(kind, randomise, kernel=1):
    layer = randomise(FBNConv2d(IN, OUT, kernel, padding=kernel // 2, fbn_groups=G))
    KINDS[kind](layer)
    return layer


def as_written(layer, x):
    """Convolution, whatever stands in the norm's place, sum: what everybody expects of `layer.bn`."""
    weight = torch.cat(layer.weight.chunk(G, 1))
    z = nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, G)
    return sum(layer.bn(z).chunk(G, 1))


def step(layer, forward):
    torch.manual_seed(1)
    x = torch.randn(6, IN, 8, 8, requires_grad=True)
    y = forward(x)
    y.pow(3).sum().backward()
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    return [y.detach(), x.grad, *grads, *(b.clone() for b in layer.buffers())]


def is_called(layer, x):
    """Whether the norm itself runs: with hooks of everybody, as a hook on it would be a reason to call it."""
    seen = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
    try:
        layer(x)
    finally:
        handle.remove()
    return layer.bn in seen


@pytest.mark.filterwarnings('ignore:FBNConv2d computes')
@pytest.mark.parametrize('kernel', [1, 3])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('kind', KINDS)
def test_every_norm_gives_what_calling_it_gives(kind, training, kernel, randomise):
    layer = make(kind, randomise, kernel)
    if kind != 'BatchNorm2d in eval mode':
        layer.train(training)
    expected = deepcopy(layer)
    for _ in range(2):  # twice, for the running statistics
        for a, b in zip(step(layer, layer), step(expected, lambda x: as_written(expected, x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings('ignore:FBNConv2d computes')
@pytest.mark.parametrize('kind', KINDS)
def test_known_norms_are_passed_by_and_all_others_called(kind, randomise):
    layer = make(kind, randomise)
    assert is_called(layer, torch.randn(6, IN, 8, 8)) == (kind in CALLED)
    assert is_called(layer.eval(), torch.randn(6, IN, 8, 8)) == (kind in CALLED)


@pytest.mark.filterwarnings('ignore:FBNConv2d computes')
@pytest.mark.parametrize('kind', KINDS)
def test_fuse_folds_known_norms_and_keeps_and_names_all_others(kind, randomise, caplog):
    layer = make(kind, randomise).eval()
    x = torch.randn(3, IN, 5, 5)
    expected = as_written(layer, x)
    if kind == 'BatchNorm2d without running statistics':
        with pytest.raises(RuntimeError, match='cannot be fused if bn has no running statistics'):
            layer.fuse()
        return
    model = fuse_fbn(nn.Sequential(layer, nn.ReLU()))
    torch.testing.assert_close(model[0](x), expected)
    if kind in PASSED_BY:
        assert type(model[0]) is nn.Conv2d
        torch.testing.assert_close(layer.fuse()(x), expected)
    else:
        assert type(model[0]) is FBNConv2d and ': 0' in caplog.text
        with pytest.raises(RuntimeError, match='cannot be fused if bn'):
            layer.fuse()


CONVERTED = {  # kinds of norm behind a convolution of its own, and whether convert_fbn takes the pair
    'BatchNorm2d': (lambda: nn.BatchNorm2d(OUT), True),
    'BatchNormAct2d': (lambda: BatchNormAct2d(OUT), True),
    'FrozenBatchNorm2d': (lambda: FrozenBatchNorm2d(OUT), False),
    'a subclass with its own forward': (lambda: Doubled(OUT), False),
    'InstanceNorm2d with statistics': (lambda: nn.InstanceNorm2d(OUT, track_running_stats=True), False),
    'GroupNorm': (lambda: nn.GroupNorm(4, OUT), False),
    'SplitBatchNorm2d': (lambda: SplitBatchNorm2d(OUT), False),
}


@pytest.mark.parametrize('kind', CONVERTED)
def test_convert_takes_known_norms_and_keeps_all_others(kind, randomise):
    norm, is_taken = CONVERTED[kind]
    model = randomise(nn.Sequential(
        nn.Conv2d(IN, OUT, 1), norm(), nn.Conv2d(OUT, OUT, 1), nn.BatchNorm2d(OUT))).eval()
    x = torch.randn(2, IN, 4, 4)
    converted = convert_fbn(model, 2)
    assert [isinstance(converted[i], FBNConv2d) for i in (0, 2)] == [is_taken, True]
    torch.testing.assert_close(converted(x), model(x))


def test_a_forward_replaced_for_the_whole_class_is_called(randomise, monkeypatch):
    """As programs do that adapt statistics at test time."""
    layer = randomise(FBNConv2d(IN, OUT, fbn_groups=G)).eval()
    x = torch.randn(6, IN, 8, 8)
    monkeypatch.setattr(
        nn.BatchNorm2d, 'forward', lambda self, z: nn.functional.batch_norm(z, None, None, training=True))
    with pytest.warns(UserWarning, match="bn's forward is not BatchNorm2d's own"):
        y = layer(x)
    torch.testing.assert_close(y, as_written(layer, x))
    with pytest.raises(RuntimeError, match="bn's forward is not BatchNorm2d's own"):
        layer.fuse()


def test_a_parametrised_running_mean_is_called(randomise):
    layer = randomise(FBNConv2d(IN, OUT, fbn_groups=G)).eval()
    parametrize.register_parametrization(layer.bn, 'running_mean', Positive())
    assert 'parametrised' in layer._why_called()


def test_a_norm_of_another_width_is_never_folded(randomise):
    layer = FBNConv2d(IN, OUT, fbn_groups=G).eval()
    layer.bn = randomise(nn.BatchNorm2d(2 * OUT)).eval()
    with pytest.raises(RuntimeError, match=f'{2 * OUT} features, not fbn_groups . out_channels = {G * OUT}'):
        layer.fuse()
    with pytest.raises(RuntimeError), pytest.warns(UserWarning, match='features'):
        layer(torch.randn(2, IN, 4, 4))


def test_the_slow_form_is_told_once_for_a_class_and_never_for_one_group():
    layers = [FBNConv2d(IN, OUT, fbn_groups=g) for g in (G, G, 1)]
    for layer in layers:
        layer.bn = nn.GroupNorm(2, layer.bn.num_features)
    x = torch.randn(2, IN, 4, 4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')  # Python's own
        for layer in layers * 2:
            layer(x)
    (warning,) = caught
    assert f'fbn_groups={G} times the memory' in str(warning.message) and 'GroupNorm' in str(warning.message)


def test_a_warning_and_the_norm_survive_compilation():
    torch.compiler.reset()
    layer = FBNConv2d(IN, OUT, fbn_groups=G)
    layer.bn.register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(2, IN, 8, 8)
    with pytest.warns(UserWarning, match='bn has hooks'):
        y = torch.compile(layer, backend='aot_eager')(x)
    torch.testing.assert_close(y, as_written(layer, x))


@pytest.mark.parametrize('kind', ['GroupNorm', 'BatchNormAct2d', 'BatchNorm2d'])
def test_torchscript_calls_what_must_be_called(kind, randomise):
    layer = make(kind, randomise)
    script = torch.jit.script(nn.Sequential(deepcopy(layer)))
    x = torch.randn(2, IN, 8, 8)
    torch.testing.assert_close(script(x), as_written(layer, x))
    torch.testing.assert_close(script.eval()(x), as_written(layer.eval(), x))


def test_auxiliary_norms_of_split_batches_are_used_in_every_layer():
    """train.py --aug-splits 3 --split-bn."""
    model = convert_splitbn_model(timm.create_model('finet_small_g4', num_classes=3, small_input=True), 3).train()
    with pytest.warns(UserWarning, match='SplitBatchNorm2d'):
        model(torch.randn(6, 3, 32, 32)).sum().backward()
    splits = [m for m in model.modules() if isinstance(m, SplitBatchNorm2d)]
    assert len(splits) == 51
    assert all(aux.num_batches_tracked == 1 for split in splits for aux in split.aux_bn)


def test_checkpointed_norms_train_as_without():
    model = nn.Sequential(FBNConv2d(IN, OUT, fbn_groups=G), nn.ReLU(), FBNConv2d(OUT, OUT, 3, padding=1, fbn_groups=2))
    wrapped = deepcopy(model)
    checkpoint_wrapper.apply_activation_checkpointing(wrapped, check_fn=lambda m: isinstance(m, nn.BatchNorm2d))
    assert isinstance(wrapped[0].bn, checkpoint_wrapper.CheckpointWrapper)
    with pytest.warns(UserWarning, match='CheckpointWrapper'):
        got = step(wrapped, wrapped)
    expected = step(model, model)
    assert wrapped[0].bn.num_batches_tracked > 0
    for a, b in zip(got[:-6], expected[:-6]):  # but for the buffers, which the second forward pass moves once more
        torch.testing.assert_close(a, b)


def test_peft_trains_a_norm_that_it_saves_and_refuses_to_adapt_an_fbn_layer():
    from peft import LoraConfig, get_peft_model  # takes seconds
    model = nn.Sequential(FBNConv2d(IN, OUT, fbn_groups=G), nn.ReLU(), nn.Conv2d(OUT, 4, 1))
    with pytest.raises(ValueError, match='(?s)Target module FBNConv2d.* is not supported'):
        get_peft_model(deepcopy(model), LoraConfig(target_modules=['0']))
    plain = as_reference(deepcopy(model[0]))
    adapted = get_peft_model(model, LoraConfig(target_modules=['2'], modules_to_save=['bn'])).train()
    own = adapted.base_model.model[0].bn.modules_to_save['default']
    with torch.no_grad():
        own.weight.fill_(2)
        plain.bn.weight.fill_(2)
    x = torch.randn(4, IN, 8, 8)
    with pytest.warns(UserWarning, match='ModulesToSaveWrapper'):
        torch.testing.assert_close(adapted.base_model.model[0](x), plain(x))
    torch.testing.assert_close(own.running_var, plain.bn.running_var)
    assert own.num_batches_tracked == 1


def test_an_fbn_layer_is_no_convolution_to_those_who_change_convolutions():
    """Folding a BatchNorm behind it into its weight, or adding to the weight, would be wrong."""
    layer = FBNConv2d(IN, OUT)
    assert not isinstance(layer, nn.Conv2d)
    assert list(layer.state_dict()) == [
        'weight', 'bn.weight', 'bn.bias', 'bn.running_mean', 'bn.running_var', 'bn.num_batches_tracked']
    torch.manual_seed(3)
    weight = FBNConv2d(IN, OUT, 3).weight
    torch.manual_seed(3)
    torch.testing.assert_close(weight, nn.Conv2d(IN, OUT, 3, bias=False).weight, rtol=0, atol=0)


def test_the_reference_form_is_scripted_and_fused_too(randomise):
    layer = randomise(ReferenceFBNConv2d(IN, OUT, fbn_groups=G)).eval()
    x = torch.randn(2, IN, 4, 4)
    torch.testing.assert_close(torch.jit.script(layer)(x), as_written(layer, x))
    torch.testing.assert_close(layer.fuse()(x), as_written(layer, x))


class Dropped(nn.Module):
    """Another weight each time that it is asked for."""

    def forward(self, weight):
        return F.dropout(weight)


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('parametrise', [
    spectral_norm, lambda layer: parametrize.register_parametrization(layer, 'weight', Dropped())],
    ids=['spectral', 'dropout'])
def test_a_parametrised_weight_is_computed_once_a_forward(parametrise, kernel_size):
    results = []
    for cls in (FBNConv2d, ReferenceFBNConv2d):
        torch.manual_seed(0)
        layer = parametrise(cls(8, 4, kernel_size, fbn_groups=2).double())
        y = layer(torch.randn(8, 8, 20, 20, dtype=torch.float64))
        results.append([y, torch.rand(1), *layer.buffers(), layer.eval()(y.repeat(1, 2, 1, 1))])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('kernel_size', [1, 3])
def test_a_frozen_layer_takes_tensors_of_inference_mode(kernel_size):
    with torch.inference_mode():
        x = torch.randn(8, 8, 20, 20)
    layer = FBNConv2d(8, 4, kernel_size, fbn_groups=2).requires_grad_(False)
    torch.testing.assert_close(layer(x), as_reference(layer)(x), rtol=1e-4, atol=1e-4)
