"""Networks of a few layers, called in different ways, that the tests of fuse_fbn and convert_fbn share."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from timm_finet import FBNConv2d, convert_fbn, fuse_fbn

X = torch.randn(2, 3, 64, 64, dtype=torch.float64)
SMALL = torch.randn(2, 4, 5, 5, dtype=torch.float64)


def norms(model):
    return sum(isinstance(m, (_BatchNorm, FBNConv2d)) for m in model.modules())


class Net(nn.Module):
    """A network of given layers, with a given forward: a function of the network and its inputs."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class SelfPadding(nn.Conv2d):
    """Does more than a convolution, but can be folded like one."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


def batch_norm(terms, width, dims=2):
    """A BatchNorm with random statistics and those affine terms of 'weight' and 'bias' that are listed."""
    norm = getattr(nn, f'BatchNorm{dims}d')(width, affine=bool(terms))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    for name in ('weight', 'bias'):
        if name in terms:
            nn.init.normal_(getattr(norm, name))
        else:
            setattr(norm, name, None)
    return norm.double()


def pair(conv=nn.Conv2d, **kwargs):
    return dict(conv=conv(4, 4, 1), bn=nn.BatchNorm2d(4, **kwargs))


def sequence(conv=nn.Conv2d, norm=nn.BatchNorm2d):
    return nn.Sequential(conv(4, 4, 1), norm(4))


def rewrites(model, example):
    return fuse_fbn(model, example), convert_fbn(model, 2, example_inputs=example)
