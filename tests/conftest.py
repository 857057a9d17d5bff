import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import timm_finet  # noqa: F401 (registers the models)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def randomise():
    """Give every normalisation of a network statistics and affine terms that folding must get right."""
    def apply(model):
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, _BatchNorm):
                    m.running_mean.normal_()
                    m.running_var.uniform_(0.5, 2)
                    if m.affine:
                        m.weight.uniform_(0.5, 1.5)
                        m.bias.normal_()
        return model
    return apply
