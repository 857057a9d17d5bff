"""FBNConv2d: every fast form against the slow reference, in float64."""
from copy import deepcopy

import pytest
import torch
import torch.nn as nn
from timm.utils import freeze
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

from scripts.timing import peak_bytes
from timm_finet import FBNConv2d, fuse_fbn
from timm_finet.fbn import ReferenceFBNConv2d

SHAPES = [  # in, out, kernel, stride, padding, dilation, G
    (16, 24, 1, 1, 0, 1, 1),
    (16, 24, 1, 1, 0, 1, 2),
    (16, 8, 1, 2, 0, 1, 4),
    (16, 8, 1, (1, 2), 0, 1, 4),
    (16, 8, 1, (2, 1), 0, 1, 2),
    (16, 16, 1, 1, 0, 1, 16),
    (12, 10, 1, 1, 1, 1, 3),
    (8, 6, 3, 1, 1, 1, 2),
    (8, 6, 3, 2, 1, 1, 4),
    (8, 6, 3, 1, 2, 2, 2),
    (8, 6, 3, 1, 'valid', 1, 2),
    (8, 6, (6, 3), 1, 'same', (1, 2), 2),
]


def make(shape, **kwargs):
    cin, cout, kernel, stride, padding, dilation, fbn_groups = shape
    layer = FBNConv2d(cin, cout, kernel, stride, padding, dilation, fbn_groups, dtype=torch.float64, **kwargs)
    if layer.bn.affine:
        nn.init.uniform_(layer.bn.weight, 0.5, 1.5)
        nn.init.normal_(layer.bn.bias)
    return layer


@pytest.mark.parametrize('kernel_size', [1, 3])
def test_weights_start_as_a_convolutions(kernel_size):
    layers = []
    for build in (FBNConv2d, nn.Conv2d):
        torch.manual_seed(0)
        layers.append(build(8, 6, kernel_size, bias=False) if build is nn.Conv2d else build(8, 6, kernel_size))
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert layers[0].bn.affine and FBNConv2d(8, 6, affine=False).bn.weight is None


def paper_equation_4(layer, x):
    """The definition, group by group, with torch's BatchNorm for each."""
    total, out = 0, layer.out_channels
    for g, (xs, ws) in enumerate(zip(x.chunk(layer.fbn_groups, 1), layer.weight.chunk(layer.fbn_groups, 1))):
        z = nn.functional.conv2d(xs, ws, None, layer.stride, layer.padding, layer.dilation)
        part = slice(g * out, (g + 1) * out)
        gamma, beta = (None, None) if layer.bn.weight is None else (layer.bn.weight[part], layer.bn.bias[part])
        total = total + nn.functional.batch_norm(z, None, None, gamma, beta, True, eps=layer.bn.eps)
    return total


def reference(layer):
    """The same layer in the paper's own form."""
    layer = deepcopy(layer)
    layer.__class__ = ReferenceFBNConv2d
    return layer


def step(layer, x, weighting):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * weighting).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


class CalledBy(nn.Sequential):
    """A module, called by a function."""

    def __init__(self, module, function):
        super().__init__(module)
        self.function = function

    def forward(self, x):
        return self.function(x)


def is_fast(layer, x):
    """Whether autograd recorded one of the fast forms."""
    y = layer(x.clone().requires_grad_())  # kept, because older torch frees the graph with it
    seen, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        seen.add(node)
        nodes += [n for n, _ in node.next_functions if n and n not in seen]
    names = [node.name() for node in seen]
    return 'MomentFormBackward' in names or 'RecomputedNormBackward' in names


@pytest.mark.parametrize('shape', SHAPES)
def test_reference_form_is_equation_4(shape):
    layer = reference(make(shape))
    x = torch.randn(3, shape[0], 7, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), paper_equation_4(layer, x))


@pytest.mark.parametrize('frozen', ['weight', 'bn', 'both', 'input'])
@pytest.mark.parametrize('shape', SHAPES)
def test_freezing_keeps_the_gradients_of_all_others(shape, frozen):
    fast = make(shape)
    for name, parameter in fast.named_parameters():
        parameter.requires_grad_(frozen not in ('both', name.split('.')[0]))
    slow = reference(fast)
    x = torch.randn(9, shape[0], 7, 6, dtype=torch.float64)
    gradients = []
    for layer in (fast, slow):
        leaf = x.clone().requires_grad_(frozen != 'input')
        layer(leaf).square().sum().backward()
        gradients.append([leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    for found, expected in zip(*gradients):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('shape', SHAPES)
def test_training_matches_reference(shape, affine, memory_format):
    fast = make(shape, affine=affine).to(memory_format=memory_format)
    slow = reference(fast)
    for _ in range(2):  # twice, for the running statistics
        x = (torch.randn(9, shape[0], 7, 6, dtype=torch.float64) * 3 + 5).to(memory_format=memory_format)
        assert is_fast(fast, x) or shape[-1] == 1
        weighting = torch.randn_like(slow(x))
        slow.load_state_dict(fast.state_dict())
        for a, b in zip(step(fast, x, weighting), step(slow, x, weighting)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', SHAPES)
def test_relu_inside_is_relu_behind(shape, training):
    layer = make(shape).train(training)
    x = torch.randn(9, shape[0], 7, 6, dtype=torch.float64)
    weighting = torch.randn_like(layer(x))
    inside, behind, own = deepcopy(layer), deepcopy(layer), reference(deepcopy(layer))
    outputs = step(CalledBy(inside, lambda x: inside(x, relu=True)), x, weighting)
    torch.testing.assert_close(outputs, step(CalledBy(behind, lambda x: behind(x).relu()), x, weighting))
    torch.testing.assert_close(outputs, step(CalledBy(own, lambda x: own(x, relu=True)), x, weighting))


@pytest.mark.parametrize('kernel_size', [1, 3])
def test_one_group_that_saves_memory_refuses_and_takes_what_batchnorm_does(kernel_size):
    layer = FBNConv2d(4, 16, kernel_size, fbn_groups=1, save_memory=True)
    with pytest.raises(ValueError, match='Expected more than 1 value per channel'):
        layer(torch.randn(1, 4, kernel_size, kernel_size))
    assert layer(torch.randn(0, 4, 5, 5)).shape[:2] == (0, 16)
    assert all(value.isfinite().all() for value in layer.state_dict().values())


@pytest.mark.parametrize('shape, saves_by_moments', [
    ((8, 24, 1, 1, 0, 1, 1), True), ((16, 8, 1, 2, 0, 1, 1), False), ((8, 6, 3, 1, 1, 1, 1), False)])
def test_one_group_that_saves_memory_keeps_its_input_alone(shape, saves_by_moments):
    thrifty = make(shape, save_memory=True)
    plain = deepcopy(thrifty)
    plain.save_memory = False
    for _ in range(2):
        x = torch.randn(9, shape[0], 7, 6, dtype=torch.float64) * 3 + 5
        weighting = torch.randn_like(reference(plain)(x))
        for a, b in zip(step(thrifty, x, weighting), step(plain, x, weighting), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    y = thrifty(x.requires_grad_())
    assert ('MomentForm' in y.grad_fn.name()) == saves_by_moments

    def saved(layer):
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = layer(x)
        return sum(kept.values()) - x.untyped_storage().nbytes(), y.untyped_storage().nbytes()
    (extra, size), (extra_plain, _) = saved(thrifty), saved(plain)
    assert extra_plain > size and (shape[3] > 1 or extra < size)


@pytest.mark.parametrize('changed', [
    dict(), dict(num_batches_tracked=None), dict(track_running_stats=False)])
@pytest.mark.parametrize('momentum', [None, 0.0, 0.3])
@pytest.mark.parametrize('shape', [SHAPES[1], SHAPES[5]])
def test_statistics_move_as_batchnorms(shape, momentum, changed):
    fast = make(shape, momentum=momentum)
    for name, value in changed.items():
        setattr(fast.bn, name, value)
    slow = reference(fast)
    for _ in range(3):
        x = torch.randn(9, shape[0], 5, 5, dtype=torch.float64)
        assert is_fast(fast, x)
        slow(x)
    torch.testing.assert_close(fast.state_dict(), slow.state_dict())
    assert changed or fast.bn.num_batches_tracked == 3


def test_gradcheck():
    layer = make((6, 4, 1, 1, 0, 1, 3))
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return functional_call(layer, dict(zip(dict(layer.named_parameters()), parameters)), (x,))
    torch.autograd.gradcheck(run, (x, *layer.parameters()))


def test_strided_and_expanded_inputs_give_reference_gradients():
    fast = make(SHAPES[1])
    slow = reference(fast)
    base = torch.randn(4, 32, 6, 5, dtype=torch.float64)
    for x in (base[:, ::2], base[:, :16].transpose(2, 3), base[:1, :16].expand(4, -1, -1, -1)):
        weighting = torch.randn_like(slow(x))
        slow.load_state_dict(fast.state_dict())
        for a, b in zip(step(fast, x, weighting), step(slow, x, weighting)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_input_used_twice_accumulates_both_gradients():
    layer = make(SHAPES[1])
    slow = reference(layer)
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    grads = []
    for net in (layer, slow):
        leaf = x.clone().requires_grad_()
        y = leaf * 2
        (net(y).square().sum() + y.sin().sum()).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('shape', SHAPES)
def test_eval_and_fused_match_reference(shape, randomise):
    layer = randomise(make(shape)).eval()
    x = torch.randn(3, shape[0], 7, 6, dtype=torch.float64)
    expected = layer.reference(x)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.fuse()(x), expected)


def test_eval_follows_changed_weights_and_statistics(randomise):
    layer = make(SHAPES[1]).eval()
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    layer(x)
    randomise(layer)
    nn.init.normal_(layer.weight)
    torch.testing.assert_close(layer(x), layer.reference(x))


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_fuse_keeps_dtype_layout_and_requires_grad(dtype, memory_format):
    layer = FBNConv2d(8, 4, 3, padding=1, dtype=dtype).to(memory_format=memory_format).eval().requires_grad_(False)
    conv = layer.fuse()
    assert type(conv) is nn.Conv2d and not conv.training
    for parameter in conv.parameters():
        assert parameter.dtype == dtype and parameter.device == layer.weight.device and not parameter.requires_grad
    assert conv.weight.is_contiguous(memory_format=memory_format)
    assert FBNConv2d(8, 4, device='meta').eval().fuse().bias.device.type == 'meta'


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_what_is_folded_is_rounded_to_low_precision_once(dtype, randomise):
    layer = randomise(FBNConv2d(32, 16, dtype=dtype)).eval()
    fused, exact = layer.fuse(), deepcopy(layer).double().fuse()
    for found, expected in zip(fused.parameters(), exact.parameters()):
        assert (found == expected.to(dtype)).double().mean() > 0.98
    x = torch.randn(2, 32, 4, 4, dtype=dtype)
    torch.testing.assert_close(layer(x), fused(x), rtol=0, atol=0)


def test_fuse_folds_running_statistics_in_train_mode_and_fuse_fbn_refuses_it(randomise):
    layer = randomise(FBNConv2d(8, 4))
    x = torch.randn(2, 8, 5, 5)
    conv = layer.fuse()
    assert conv.training
    with pytest.raises(RuntimeError, match='eval'):
        fuse_fbn(layer)
    torch.testing.assert_close(conv(x), layer.eval()(x))


def test_one_group_is_plain_batchnorm():
    layer = make(SHAPES[0])
    plain = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)).double()
    plain.load_state_dict({
        '0.weight': layer.weight, **{f'1.{key}': value for key, value in layer.bn.state_dict().items()}})
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.bn.running_var, plain[1].running_var, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_low_precision_input_has_float32_statistics(dtype):
    """Float16 sums of squares overflow at 65504."""
    layer = FBNConv2d(8, 4, fbn_groups=2).to(dtype)
    layer.bn.float()
    x = (torch.randn(16, 8, 32, 32) * 10 + 50).to(dtype)
    layer(x)
    layer.bn.eval()
    with torch.no_grad():
        weight = layer.weight.double().unflatten(1, [2, -1]).transpose(0, 1).flatten(0, 1)
        z = nn.functional.conv2d(x.double(), weight, groups=2)
    expected = 0.9 + 0.1 * z.var((0, 2, 3))
    torch.testing.assert_close(layer.bn.running_var.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32(dtype):
    layer = FBNConv2d(16, 8, fbn_groups=4)
    exact = deepcopy(layer)
    x = torch.randn(8, 16, 8, 8)
    with torch.autocast('cpu', dtype):
        y = layer(x)
    assert y.dtype == dtype
    assert layer.bn.running_var.dtype == torch.float32
    torch.testing.assert_close(y.float(), exact(x), rtol=0.05, atol=0.05)
    torch.testing.assert_close(layer.bn.running_var, exact.bn.running_var, rtol=0.01, atol=0)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == p.dtype for p in layer.parameters())


def test_frozen_batchnorm_folds_and_still_trains_the_weight(randomise):
    """timm's freeze() replaces the child with a FrozenBatchNorm2d; other programs put it in eval mode."""
    layer = randomise(make(SHAPES[1]))
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    expected = deepcopy(layer).eval()(x)
    half = deepcopy(layer)
    half.bn.eval()
    container = nn.Sequential(deepcopy(layer))
    freeze(container, '0.bn', include_bn_running_stats=True)
    container.train()
    for net in (half, container):
        y = net(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
    assert half.weight.grad is not None


def test_batch_statistics_in_eval_without_running_ones():
    layer = make(SHAPES[1])
    layer.bn = nn.BatchNorm2d(48, track_running_stats=False, dtype=torch.float64)
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer.eval()(x), paper_equation_4(layer, x))


def test_torchscript_trains_and_evaluates(randomise):
    layer = randomise(make(SHAPES[1]))
    script = torch.jit.script(deepcopy(layer))
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(script(x), layer(x))
    torch.testing.assert_close(script.eval()(x), layer.eval()(x))


@pytest.mark.parametrize('kernel', [1, 3])
def test_one_position_is_refused_in_training(kernel):
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        FBNConv2d(8, 4, kernel, padding=kernel // 2)(torch.randn(1, 8, 1, 1))


def test_wide_layers_with_few_positions_take_the_reference_form():
    """Their moments, and products with them, would be larger than the intermediate."""
    layer = FBNConv2d(64, 32, fbn_groups=4)
    assert not is_fast(layer, torch.randn(2, 64, 4, 4))
    assert is_fast(layer, torch.randn(2, 64, 8, 8))


@pytest.mark.parametrize('kernel', [1, 3])
def test_training_takes_no_memory_that_grows_with_groups(kernel):
    x = torch.randn(32, 16, 16, 16, requires_grad=True)

    def peak(groups, form=FBNConv2d):
        layer = form(16, 16, kernel, padding=kernel // 2, fbn_groups=groups)
        return peak_bytes(lambda: layer(x).sum().backward(), 'cpu')
    assert peak(8) < 1.2 * peak(2)
    assert peak(8) < 0.5 * peak(8, ReferenceFBNConv2d)


LAYERS = [  # in, out, kernel, stride, padding, dilation, G: all forms
    (16, 24, 1, 1, 0, 1, 1),
    (16, 24, 1, 1, 0, 1, 4),
    (16, 24, 1, 2, 0, 1, 4),
    (16, 24, 3, 1, 1, 1, 4),
    (256, 24, 1, 1, 0, 1, 4),  # few positions for its width: the reference form
]


@pytest.fixture
def compiled():
    torch.compiler.reset()  # beyond the limit of recompilations everything runs in eager mode
    return lambda module: torch.compile(module, backend='aot_eager', fullgraph=True)


@pytest.mark.parametrize('compile', [False, True])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('shape', LAYERS)
def test_outputs_and_gradients_keep_the_memory_format(shape, memory_format, compile, compiled):
    layer = FBNConv2d(*shape).to(memory_format=memory_format)
    run = compiled(layer) if compile else layer
    for training in (True, False):
        layer.train(training)
        x = torch.randn(2, shape[0], 8, 7).contiguous(memory_format=memory_format).requires_grad_()
        y = run(x)
        y.sum().backward()
        assert y.is_contiguous(memory_format=memory_format)
        assert x.grad.is_contiguous(memory_format=memory_format)


def test_backward_leaves_the_gradient_that_it_is_handed():
    """Hooks, retain_grad and other consumers see the same tensor."""
    layer = FBNConv2d(16, 16, fbn_groups=4)
    x = torch.randn(4, 16, 8, 8, requires_grad=True)
    y = layer(x)
    y.retain_grad()
    grad = torch.randn_like(y)
    kept = grad.clone()
    y.backward(grad)
    torch.testing.assert_close((grad, y.grad), (kept, kept), rtol=0, atol=0)


def test_compiled_training_matches_eager(compiled):
    eager = make((16, 24, 1, 1, 0, 1, 4))
    x = torch.randn(4, 16, 6, 5, dtype=torch.float64)
    weighting = torch.randn(4, 24, 6, 5, dtype=torch.float64)
    for a, b in zip(step(compiled(deepcopy(eager)), x, weighting), step(eager, x, weighting)):
        torch.testing.assert_close(a, b)


def test_a_variance_that_rounding_makes_negative_counts_as_zero():
    """A group's channels cancel in `z = x_1 + x_2 - x_3`, because `x_3 = x_1 + x_2`."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 16, 16)
    x = torch.cat((x, x.sum(1, keepdim=True)), 1)
    layer = FBNConv2d(6, 64, fbn_groups=2, eps=1e-12)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(64, 1, 1, 1) * torch.tensor([1., 1, -1, 1, 1, -1]).view(6, 1, 1))
    y = layer(torch.cat((x, 3 * x), 1))
    assert y.isfinite().all() and (layer.bn.running_var < 1).all()


def test_compiled_training_holds_nothing_G_times_wide():
    """When torch 2.11 traces `torch.compiler.is_exporting()`, it is True: the paper's form used to be compiled."""
    widths = []

    def record(graph, inputs):
        widths.extend(
            node.meta['example_value'].shape[1] for node in graph.graph.nodes
            if isinstance(node.meta.get('example_value'), torch.Tensor) and node.meta['example_value'].dim() == 4)
        return graph.forward
    torch.compiler.reset()
    layer, x = make((16, 24, 1, 1, 0, 1, 4)), torch.randn(4, 16, 6, 5, dtype=torch.float64)
    torch.compile(layer, backend=record, fullgraph=True)(x)
    assert max(widths) == 24


@pytest.mark.parametrize('compile', [False, True])
@pytest.mark.parametrize('inside', [False, True])
@pytest.mark.parametrize('kernel', [1, 3])
def test_no_autocast_in_the_backward_pass(kernel, inside, compile, compiled):
    """torch.compile traces it under the forward pass's autocast; some people call `backward()` inside autocast."""
    layer = FBNConv2d(20, 20, kernel, padding=kernel // 2, fbn_groups=4)
    x, grad_y = torch.randn(2, 8, 20, 12, 12).unbind()
    found = []
    for run, autocast in ((layer, False), (compiled(deepcopy(layer)) if compile else deepcopy(layer), inside)):
        with torch.autocast('cpu', torch.bfloat16):
            y = run(x)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            y.backward(grad_y.to(y.dtype))
        found.append([p.grad for p in run.parameters()])
    for a, b in zip(*found):
        assert (a - b).norm() < 1e-5 * b.norm()


@pytest.mark.parametrize('kernel', [1, 3])
def test_low_precision_output_has_the_mean_that_beta_asks_for(kernel):
    """A bias computed from the unrounded weight would shift the mean of the output, here by more than a deviation."""
    layer = FBNConv2d(64, 32, kernel, padding=kernel // 2, fbn_groups=4)
    x = (torch.randn(64, 64, 8, 8) + 100).bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.double().mean((0, 2, 3)).abs().max() < 0.02


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('shape', LAYERS)
def test_another_dtype_than_the_weights_is_refused_as_by_conv2d(shape, dtype, training):
    layer = FBNConv2d(*shape).train(training)
    with pytest.raises(RuntimeError, match='should be the same|expected .* but found'):
        layer(torch.randn(2, shape[0], 8, 8).to(dtype))


@pytest.mark.parametrize('shape', LAYERS)
def test_meta_tensors_go_through(shape):
    layer = FBNConv2d(*shape, device='meta')
    x = torch.randn(2, shape[0], 8, 8, device='meta', requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer.bn.weight.grad.shape == layer.bn.weight.shape
    assert layer(x).shape == layer.eval()(x).shape == layer.fuse()(x).shape


def test_torchscript_without_running_statistics():
    layer = make(SHAPES[1])
    layer.bn = nn.BatchNorm2d(48, track_running_stats=False, dtype=torch.float64)
    x = torch.randn(3, 16, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(deepcopy(layer)).eval()(x), layer.eval()(x))


@pytest.mark.parametrize('arguments, error, message', [
    (dict(groups=2), TypeError, "FBNConv2d.*'groups'"),
    (dict(bias=False), TypeError, "FBNConv2d.*'bias'"),
    *((dict(fbn_groups=value), ValueError,
       f'fbn_groups={value!r} must be a positive integer that divides in_channels=8')
      for value in (3, 0, -1, 2.0, '4', True, None)),
])
def test_unfit_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FBNConv2d(8, 4, **arguments)


def test_repr_tells_the_arguments():
    shown = '8, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), fbn_groups=2'
    assert FBNConv2d(8, 4, 3, padding=1, fbn_groups=2).extra_repr() == shown
    assert FBNConv2d(8, 4, 3, padding=1, fbn_groups=2, save_memory=True).extra_repr() == f'{shown}, save_memory=True'


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('shape', [(8, 5, 5), (2, 5, 5, 5), (1, 2, 8, 5, 5)])
@pytest.mark.parametrize('kernel', [1, 3])
def test_an_input_of_another_shape_is_named(kernel, shape, training):
    with pytest.raises(ValueError, match=rf'\(N, 8, H, W\), not \[{", ".join(map(str, shape))}\]'):
        FBNConv2d(8, 4, kernel, fbn_groups=2).train(training)(torch.randn(shape))


@pytest.mark.parametrize('changed', ['weight', 'bn.weight', 'x'])
@pytest.mark.parametrize('kernel', [1, 3])
def test_what_the_backward_pass_needs_must_not_change_before_it(kernel, changed):
    layer = FBNConv2d(16, 8, kernel, padding=kernel // 2, fbn_groups=4)
    x = torch.randn(8, 16, 8, 8, requires_grad=True)
    leaf = x * 1
    assert is_fast(layer, leaf)
    loss = layer(leaf).square().sum()
    with torch.no_grad():
        (leaf if changed == 'x' else layer.get_parameter(changed)).mul_(2)
    with pytest.raises(RuntimeError, match='modified .*inplace'):
        loss.backward()


@pytest.mark.parametrize('relu', [False, True])
def test_squares_that_overflow_take_the_reference_form(relu):
    """Sums of the input's squares overflow sooner than the variances of its partial sums."""
    layer = FBNConv2d(16, 8, fbn_groups=4)
    x = torch.randn(256, 16, 8, 8) * 1e17
    x[..., ::2] *= 100
    with torch.no_grad():
        layer.weight.mul_(1e-3)
    y, expected = layer(x, relu=relu), reference(layer)(x)
    expected = expected.relu() if relu else expected
    assert y.isfinite().all() and layer.bn.running_var.isfinite().all() and layer.bn.num_batches_tracked == 1
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize('kernel_size', [1, 3])
def test_a_step_on_tensors_without_values(kernel_size):
    """As in tools that estimate a step's memory."""
    with FakeTensorMode():
        layer = FBNConv2d(16, 8, kernel_size, fbn_groups=4)
        y = layer(torch.randn(2, 16, 8, 8))
        y.sum().backward()
    assert type(y) is FakeTensor and layer.weight.grad.shape == layer.weight.shape


def test_collinear_channels_stay_finite_and_near_the_definition():
    """Their partial sums may have no variance except by rounding, which may make it negative: no NaN must result."""
    for seed in range(20):
        torch.manual_seed(seed)
        layer = FBNConv2d(16, 8, fbn_groups=4)
        direction = torch.randn(4, 4)  # of each group's channels
        x = (torch.randn(4, 4, 1, 16, 16) * direction[:, :, None, None] * 100).flatten(1, 2)
        with torch.no_grad():  # make all weights except the first orthogonal to it
            w = layer.weight.view(8, 4, 4)
            w[1:] -= (w * direction).sum(2, keepdim=True)[1:] * direction / direction.square().sum(1, keepdim=True)
        assert is_fast(layer, x)
        layer.bn.reset_running_stats()
        exact = deepcopy(layer).double()
        y, grad = step(layer, x, torch.ones(4, 8, 16, 16))[:2]
        assert y.isfinite().all() and grad.isfinite().all() and (layer.bn.running_var >= 0.9).all()
        torch.testing.assert_close(y.double(), exact(x.double()), rtol=0, atol=0.05)


def test_exported_training_uses_torchs_batchnorm():
    """Users of the graph differentiate it and switch its BatchNorms to eval mode."""
    model = nn.Sequential(FBNConv2d(16, 8, fbn_groups=4), nn.ReLU(), FBNConv2d(8, 8, 3, padding=1, fbn_groups=2))
    x = torch.randn(4, 16, 8, 8)
    graph = torch.export.export(deepcopy(model), (x,)).module()
    for a, b in zip(step(graph, x, 1), step(model, x, 1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert sum('batch_norm' in str(node.target) for node in graph.graph.nodes) == 2


@pytest.mark.slow
def test_quantisation_aware_training_of_an_exported_network():
    missing = dict(reason='torchao is missing: install the extra executorch')
    pt2e = pytest.importorskip('torchao.quantization.pt2e', **missing)
    quantize = pytest.importorskip('torchao.quantization.pt2e.quantize_pt2e', **missing)
    quantizers = pytest.importorskip('torchao.quantization.pt2e.quantizer.x86_inductor_quantizer', **missing)
    quantizer = quantizers.X86InductorQuantizer().set_global(
        quantizers.get_default_x86_inductor_quantization_config(is_qat=True))
    model = nn.Sequential(FBNConv2d(16, 8, fbn_groups=4), nn.ReLU(), FBNConv2d(8, 8, fbn_groups=2))
    x = torch.randn(4, 16, 8, 8)
    graph = quantize.prepare_qat_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    for _ in range(2):
        graph(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in graph.parameters())
    pt2e.move_exported_model_to_eval(graph)
    assert quantize.convert_pt2e(graph)(x).isfinite().all()


@pytest.mark.parametrize('kernel', [1, 3])
def test_torch_func_takes_gradients_in_training(kernel):
    """It takes them for the batch, and for each image as if it were alone."""
    layer = FBNConv2d(16, 8, kernel, padding=kernel // 2, fbn_groups=4, dtype=torch.float64)
    x = torch.randn(3, 16, 20, 20, dtype=torch.float64)
    assert is_fast(layer, x[:1])
    replace_all_batch_norm_modules_(layer)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sin().sum()

    def expected(x):
        return dict(zip(parameters, torch.autograd.grad(loss(parameters, x), list(parameters.values()))))
    torch.testing.assert_close(grad(loss)(parameters, x), expected(x))
    each = vmap(grad(loss), (None, 0))(parameters, x[:, None])
    torch.testing.assert_close({name: grad[1] for name, grad in each.items()}, expected(x[1:2]))


@pytest.mark.parametrize('shape', [(16, 8, 3, 1, 1, 1, 4), (256, 8, 1, 1, 0, 1, 4), (16, 8, 1, 1, 0, 1, 4)])
def test_second_derivatives_are_right_or_refused(shape):
    fast, x = make(shape), torch.randn(2, shape[0], 8, 8, dtype=torch.float64, requires_grad=True)

    def second(layer):
        (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        first.square().sum().backward()
        return layer.weight.grad
    if shape[:4] == (16, 8, 1, 1):
        with pytest.raises(RuntimeError, match='once_differentiable'):
            second(fast)
    else:
        torch.testing.assert_close(second(fast), second(reference(fast)))


@pytest.mark.parametrize('shape', [(256, 8, 1, 1, 0, 1, 4), (16, 8, 1, 1, 0, 1, 4)])
def test_a_penalty_on_the_gradient_of_a_sum_is_not_left_out(shape):
    """A sum's gradient needs no gradient itself, but the input's gradient that follows depends on the weight."""
    fast, x = make(shape), torch.randn(2, shape[0], 8, 8, dtype=torch.float64, requires_grad=True)

    def total(layer):
        y = layer(x, relu=True)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (y.sum() + first.square().sum()).backward()
        return layer.weight.grad
    if shape[0] == 16:
        with pytest.raises(RuntimeError, match='once_differentiable'):
            total(fast)
    else:
        torch.testing.assert_close(total(fast), total(reference(fast)))
