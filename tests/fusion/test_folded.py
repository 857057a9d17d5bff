"""What is folded: layers and norms of every kind, in whatever way the network calls them."""
import io

import pytest
import torch
import torch.nn as nn
from nets import SMALL, X, Net, SelfPadding, batch_norm, norms, pair, rewrites, sequence
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch.nn.utils.parametrize import register_parametrization
from torchvision.ops import FrozenBatchNorm2d

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn


@pytest.mark.parametrize('terms', [['weight', 'bias'], ['weight'], []])
@pytest.mark.parametrize('conv_kwargs', [dict(groups=1), dict(groups=2, bias=False)])
@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('kind', ['Conv', 'ConvTranspose'])
def test_convolutions_of_every_kind_fuse(kind, dims, conv_kwargs, terms):
    conv = getattr(nn, f'{kind}{dims}d')(4, 6, 3, stride=2, **conv_kwargs)
    model = nn.Sequential(conv, batch_norm(terms, 6, dims)).double().eval()
    x = torch.randn(2, 4, *[5] * dims, dtype=torch.float64)
    for fused in (fuse_fbn(model, x), fuse_fbn(model)):
        assert norms(fused) == 0 and type(fused[0]) is type(conv)
        torch.testing.assert_close(fused(x), model(x))


@pytest.mark.parametrize('flat', [
    lambda x: x.flatten(1), lambda x: x.view(x.shape[0], -1), lambda x: x.mean((2, 3)), lambda x: x[..., 0, 0],
    lambda x: x.amax(3, keepdim=True).amax(2, keepdim=True).squeeze()])
def test_linear_and_batchnorm_fuse_on_whatever_is_a_matrix(flat, randomise):
    width = flat(SMALL).shape[1]
    model = randomise(Net(
        lambda net, x: net.layers(flat(x)),
        layers=nn.Sequential(
            nn.Linear(width, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(), nn.Linear(5, 4),
            nn.BatchNorm1d(4))).double()).eval()
    fused = fuse_fbn(model, SMALL)
    assert norms(fused) == 0 and fused.layers[0].bias.requires_grad
    torch.testing.assert_close(fused(SMALL), model(SMALL))


def test_frozen_norms_fuse(randomise):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 1), FrozenBatchNormAct2d(4))
    for norm in model[1::2]:
        norm.running_mean.normal_()
        norm.weight.normal_()
    model = model.double().eval()
    fused = fuse_fbn(model, X)
    assert [type(m) for m in fused] == [nn.Conv2d, nn.Identity, nn.Conv2d, nn.ReLU]
    torch.testing.assert_close(fused(X), model(X))


def test_a_norms_drop_layer_and_activation_stay_in_order(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), BatchNormAct2d(4, drop_layer=nn.Tanh)).double()).eval()
    fused = fuse_fbn(model, SMALL)
    assert [type(m) for m in fused[1]] == [nn.Tanh, nn.ReLU] and not fused[1].training
    torch.testing.assert_close(fused(SMALL), model(SMALL))


def test_a_pair_of_two_names_is_rewritten_under_both(randomise):
    model = Net(lambda net, x: net.bn(net.conv(x)), **pair())
    model.other_conv, model.other_bn = model.conv, model.bn
    for rewritten in rewrites(randomise(model.double()).eval(), SMALL):
        assert rewritten.other_conv is rewritten.conv and rewritten.other_bn is rewritten.bn
        assert isinstance(rewritten.bn, nn.Identity)
        torch.testing.assert_close(rewritten(SMALL), model(SMALL))


def test_a_convolution_of_another_class_fuses_in_place_where_that_is_right(randomise):
    model = randomise(sequence(SelfPadding).double()).eval()
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    fused = fuse_fbn(model, x)
    assert type(fused[0]) is SelfPadding and isinstance(fused[1], nn.Identity)
    torch.testing.assert_close(fused(x), model(x))


def checks_its_input(net, x):
    assert x.dim() == 4 and x.shape[1] == net.conv.weight.shape[1]
    return torch.cat(list(net.bn(net.conv(x.to(net.conv.weight.dtype))).chunk(2, 1)), 1)


def asks_the_norm(net, x):
    y, bn = net.bn(net.conv(x)), net.bn
    return y * bn.num_features * bn.affine * bn.track_running_stats + bn.eps + bn.momentum


class Adds(nn.Module):
    """Its `fuse` adds two branches and folds nothing."""

    def __init__(self):
        super().__init__()
        self.a, self.b = sequence(), sequence()

    def fuse(self, a, b):
        return a + b

    def forward(self, x):
        return self.fuse(self.a(x), self.b(x))


class Remembers(nn.Module):
    """Its forward stores tensors with a history in a container and a buffer, and uses `torch.cond`."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.seen = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), {}
        self.register_buffer('average', torch.zeros(4))

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.seen['y'] = [2 * y]
        self.average = 0.9 * self.average + y.mean((0, 2, 3))
        return torch.cond(y.sum() > 0, lambda y: y + 1, lambda y: y - 1, (y,))


def with_a_history():
    model = Remembers().double()
    model(SMALL)
    return model


def with_an_activation_that_is_read():
    model = Net(
        lambda net, x: net.bn(net.conv(x)) + net.act.weight.data.sum() + net.act.offset, conv=nn.Conv2d(4, 4, 1),
        bn=BatchNormAct2d(4))
    model.act = model.bn.act = nn.PReLU()
    model.act.register_buffer('offset', torch.ones(()))
    return model


def with_an_attribute_named_as_a_method():
    model = sequence()
    model[0].type = 'stem'
    return model


FOLDED = {
    'checks its input': lambda: Net(checks_its_input, **pair()),
    'asks the norm for its arguments': lambda: Net(asks_the_norm, **pair()),
    'has a history and control flow': with_a_history,
    'has a method fuse with arguments': Adds,
    'has a norm behind an FBN layer': lambda: nn.Sequential(
        FBNConv2d(4, 4, 1, fbn_groups=2), nn.BatchNorm2d(4), *sequence()),
    'reads an activation within a norm': with_an_activation_that_is_read,
    'names the size of an output': lambda: Net(
        lambda net, x: net.bn2(net.up(net.bn(net.conv(x)), [5, 5])), **pair(), up=nn.ConvTranspose2d(4, 4, 1),
        bn2=nn.BatchNorm2d(4)),
    'has an attribute named as a method': with_an_attribute_named_as_a_method,
}


@pytest.mark.parametrize('case', FOLDED)
def test_other_things_that_a_forward_does_keep_no_pair_from_being_rewritten(case, randomise):
    model = randomise(FOLDED[case]().double()).eval()
    fused, converted = rewrites(model, SMALL)
    assert norms(fused) == 0 and any(isinstance(m, FBNConv2d) for m in converted.modules())
    for rewritten in (fused, converted):
        torch.testing.assert_close(rewritten(SMALL), model(SMALL))


def test_calls_by_keyword_fuse(randomise):
    model = randomise(Net(
        lambda net, image: net.act(x=net.conv2(net.bn(input=net.conv(input=image)))), **pair(),
        conv2=nn.Conv2d(4, 4, 1), act=BatchNormAct2d(4)).double()).eval()
    fused = fuse_fbn(model, dict(image=SMALL))
    assert isinstance(fused.bn, nn.Identity) and isinstance(fused.act, BatchNormAct2d)  # nn.ReLU has no argument x
    torch.testing.assert_close(fused(SMALL), model(SMALL))
    with pytest.raises(ValueError, match='no convolution'):
        convert_fbn(model, 2, example_inputs=dict(image=SMALL))


def test_a_parametrised_fbn_layer_fuses(randomise):
    model = nn.Sequential(FBNConv2d(4, 4, 1, fbn_groups=2)).double().eval()
    register_parametrization(randomise(model)[0], 'weight', nn.Tanh())
    torch.testing.assert_close(fuse_fbn(model, SMALL)(SMALL), model(SMALL))


def test_a_synchronised_norm_with_a_group_of_its_own_fuses(process_group, randomise):
    group = torch.distributed.new_group([0])
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4, process_group=group)).double()).eval()
    torch.testing.assert_close(fuse_fbn(model, SMALL)(SMALL), model(SMALL))


def test_layout_dtype_and_requires_grad_stay(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    model = model.to(torch.bfloat16, memory_format=torch.channels_last).eval()
    model[0].requires_grad_(False)
    for fused in (fuse_fbn(model), fuse_fbn(model, SMALL.bfloat16())):
        assert all(p.dtype == torch.bfloat16 for p in fused.parameters())
        assert fused[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert [p.requires_grad for p in fused.parameters()] == [False, False, True, True]


def test_train_mode_with_frozen_norms_fuses_and_keeps_its_flags(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.)).double())
    model[1].eval()
    fused = fuse_fbn(model, SMALL)
    assert norms(fused) == 0 and [m.training for m in fused.modules()] == [m.training for m in model.modules()]
    torch.testing.assert_close(fused(SMALL), model(SMALL))


def test_networks_made_in_inference_mode_fuse(randomise):
    with torch.inference_mode():
        model = randomise(sequence().double()).eval()
        for fused in (fuse_fbn(model), fuse_fbn(model, SMALL)):
            assert norms(fused) == 0
            torch.testing.assert_close(fused(SMALL), model(SMALL))


def test_fused_networks_become_onnx(randomise):
    import onnxruntime
    model = randomise(nn.Sequential(
        nn.ConvTranspose2d(4, 4, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), BatchNormAct2d(4))).eval()
    x, file = SMALL.float(), io.BytesIO()
    fused = fuse_fbn(model, x)
    torch.onnx.export(fused, (x,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    y, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)
    assert 'BatchNormalization' not in str(file.getvalue())
