"""FBNConv2d is the definition whatever its arguments and its input: hypothesis looks for those where it is not.

The examples are the same each time; `pytest --hypothesis-profile=more` looks further.
"""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_finet import FBNConv2d
from timm_finet.fbn import ReferenceFBNConv2d


@st.composite
def layers(draw):
    """Arguments of a layer, and the size of its input."""
    groups, kernel = draw(st.integers(1, 4)), draw(st.sampled_from([1, 1, 3, (1, 3)]))
    stride, dilation = draw(st.sampled_from([(1, 1), (2, 1), (1, 2)]))
    return dict(
        in_channels=groups * draw(st.integers(1, 6)), out_channels=draw(st.integers(1, 12)), kernel_size=kernel,
        stride=stride, dilation=dilation, fbn_groups=groups, affine=draw(st.booleans()),
        padding=draw(st.sampled_from([0, 1, (1, 2), *(['same', 'valid'] if stride == (1, 1) else [])])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.7])), momentum=draw(st.sampled_from([0.1, 0.6, None])),
        save_memory=draw(st.booleans())), (draw(st.integers(1, 3)), draw(st.integers(7, 11)), draw(st.integers(7, 11)))


def run(layer, xs, grad_y, relu, autocast=None):
    """Outputs, gradients and statistics after all of `xs`."""
    found = []
    for x in xs:
        x = x.detach().requires_grad_()
        with torch.autocast('cpu', autocast, enabled=autocast is not None):
            y = layer(x, relu=relu)
        y.backward(grad_y(y).to(y))
        found += [y.detach(), x.grad]
    return found + [p.grad for p in layer.parameters()] + list(layer.bn.buffers())


@pytest.mark.parametrize('dtype, autocast, error', [
    (torch.float64, None, 1e-9), (torch.float64, torch.bfloat16, 1e-9), (torch.float32, None, 2e-4)])
@given(
    layer=layers(), training=st.booleans(), track=st.booleans(), relu=st.booleans(), mean=st.sampled_from([0, 3]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]), steps=st.integers(1, 2))
def test_layer_is_the_definition(dtype, autocast, error, layer, training, track, relu, mean, layout, steps):
    torch.manual_seed(0)
    arguments, (images, *size) = layer
    exact = ReferenceFBNConv2d(**arguments, dtype=torch.float64).train(training)
    if not track:
        exact.bn.track_running_stats, exact.bn.running_mean, exact.bn.running_var = False, None, None
        exact.bn.num_batches_tracked = None
    for parameter in exact.bn.parameters():
        torch.nn.init.normal_(parameter, 1, 0.3)
    fast = FBNConv2d(**arguments, dtype=torch.float64)
    fast.bn.__dict__.update(track_running_stats=track)
    if not track:
        fast.bn.running_mean = fast.bn.running_var = fast.bn.num_batches_tracked = None
    fast.load_state_dict(exact.state_dict())
    fast = fast.train(training).to(dtype)
    xs = [(torch.randn(images, arguments['in_channels'], *size, dtype=torch.float64) + mean).contiguous(
        memory_format=layout) for _ in range(steps)]
    weighting = {}

    def grad_y(y):
        return weighting.setdefault('', torch.randn(y.shape, dtype=torch.float64))
    expected = run(exact, xs, grad_y, relu)
    found = run(fast, [x.to(dtype) for x in xs], grad_y, relu, autocast)
    for a, b in zip(found, expected, strict=True):
        a, b = a.double(), b.double()
        assert (a - b).norm() <= error * max(b.norm(), 1), (a - b).norm() / b.norm()
