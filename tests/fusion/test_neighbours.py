"""Which neighbours in an nn.Sequential are folded without an example."""
import torch
import torch.nn as nn
from timm.layers import BatchNormAct2d

from timm_finet import fuse_fbn

X = torch.randn(2, 4, 5, 5)


def test_a_module_that_stands_twice_still_stands_between_a_layer_and_a_norm(randomise):
    act = nn.ReLU()
    model = randomise(nn.Sequential(act, nn.Conv2d(4, 4, 1), act, nn.BatchNorm2d(4))).eval()
    fused = fuse_fbn(model)
    assert isinstance(fused[3], nn.BatchNorm2d)
    torch.testing.assert_close(fused(X), model(X))


def test_an_activation_that_stands_twice_keeps_no_pair_from_folding(randomise):
    act = nn.ReLU()
    model = randomise(nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act)).eval()
    fused = fuse_fbn(model)
    assert [type(fused[i]) for i in (1, 4)] == [nn.Identity, nn.Identity]
    torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-4)


def test_timms_norms_with_an_activation_are_folded(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), BatchNormAct2d(4))).eval()
    fused = fuse_fbn(model)
    assert isinstance(fused[1], nn.ReLU)
    torch.testing.assert_close(fused(X), model(X), rtol=1e-4, atol=1e-4)


def test_a_sequential_of_another_forward_is_left(randomise):
    model = randomise(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))).eval()
    model.forward = lambda x: model[0](model[1](x))
    assert isinstance(fuse_fbn(model)[1], nn.BatchNorm2d)
