import atexit
import os
import shutil
import tempfile

import pytest
import torch
from hub_stand_in import WRITER, Hub
from torch.nn.modules.batchnorm import _BatchNorm

HUB, HF_HOME = Hub(), tempfile.mkdtemp()
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
# huggingface_hub reads its settings as it is imported, and child processes inherit these.
os.environ.update(
    HF_ENDPOINT=HUB.url, HF_HOME=HF_HOME, HF_TOKEN=WRITER, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')

import timm_finet  # noqa: E402, F401 (registers the models)


@pytest.fixture
def hub():
    """The stand-in, empty, with an empty cache on the client's side."""
    HUB.reset()
    shutil.rmtree(os.path.join(HF_HOME, 'hub'), ignore_errors=True)
    return HUB


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
