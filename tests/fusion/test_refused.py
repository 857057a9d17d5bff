"""What is refused, with an error that says why and an unchanged network."""
import contextlib
import threading
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn as nn
from nets import SMALL, Net, norms, pair, sequence

from timm_finet import convert_fbn, fuse_fbn


class Refuses(nn.Module):
    """Has an attribute that cannot be copied."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.lock = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), threading.Lock()

    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize('model, example, error, message', [
    (lambda: {}, SMALL, TypeError, 'model=dict must be a torch.nn.Module'),
    (lambda: torch.jit.script(nn.Conv2d(4, 4, 1)), SMALL, TypeError, 'scripted or traced: '),
    (lambda: nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)), SMALL, ValueError, '0.weight.* has no shape yet'),
    (Refuses, SMALL, TypeError, 'Refuses cannot be copied.*lock'),
    (lambda: nn.Conv2d(4, 4, 1), (2, 4, 5, 5), TypeError, r'\(2, 4, 5, 5\) is a shape: give a tensor, torch.rand'),
    (sequence, [SMALL], TypeError, 'example_inputs=list must be a tensor, or a tuple or dict'),
    (sequence, ((x for x in ()),), TypeError, 'example_inputs cannot be copied.*generator')])
@pytest.mark.parametrize('change', [fuse_fbn, convert_fbn])
def test_what_cannot_be_rewritten_is_refused(change, model, example, error, message):
    model = model()
    with pytest.raises(error, match=message):
        change(model.eval() if isinstance(model, nn.Module) else model, example_inputs=example)


def test_what_cannot_be_copied_is_fused_in_place_where_nothing_has_to_run():
    model = sequence().eval()
    model.lock = threading.Lock()
    assert norms(fuse_fbn(model, inplace=True)) == 0


def test_train_mode_is_refused_and_nothing_changes():
    model = timm.create_model('finet_small_g2').eval()
    model.stages[1].train()
    keys = list(model.state_dict())
    with pytest.raises(RuntimeError, match=r'stages\.1\.0\.conv1.*\.eval\(\)'):
        fuse_fbn(model, inplace=True)
    assert list(model.state_dict()) == keys


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize('inplace', [False, True])
def test_networks_whose_copy_is_not_independent_are_refused_and_left(inplace, randomise):
    model = Net(lambda net, x: net.after(net.bn(net.conv(x)).relu()), **pair(affine=False))
    model.after = lambda x: model.bn(x)  # in a copy it still calls the norm of this network
    swallows = Net(lambda net, x: (net.bn(net.conv(x)), net.after(x))[0], **pair())

    def after(x):
        with contextlib.suppress(RuntimeError):
            swallows.bn(x)

    swallows.after = after
    shares = nn.Sequential(Shared(), nn.BatchNorm2d(4))
    for network in (model, swallows, shares):
        randomise(network.double())
        before = deepcopy(list(network.state_dict().values()))
        for change in (fuse_fbn, convert_fbn):
            with pytest.raises(RuntimeError, match='of the network itself|shares 0 with it'):
                change(network.train(change is convert_fbn), example_inputs=SMALL, inplace=inplace)
            torch.testing.assert_close(list(network.state_dict().values()), before, rtol=0, atol=0)


@pytest.mark.parametrize('inplace', [False, True])
def test_without_an_example_an_error_leaves_nothing_half_changed(inplace, randomise):
    model = randomise(nn.Sequential(sequence(), sequence()))
    model[1].to('meta')
    model[1][0].to_empty(device='cpu')
    before = deepcopy(model.eval().state_dict())
    with pytest.raises(RuntimeError):
        fuse_fbn(model, inplace=inplace)
    assert list(model.state_dict()) == list(before) and norms(model) == 2
    first = {key[2:]: value for key, value in before.items() if key[0] == '0'}
    torch.testing.assert_close(model[0].state_dict(), first, rtol=0, atol=0)
