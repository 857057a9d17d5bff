"""What all tests share. It imports nothing heavy, so that the process which hands the tests out starts at once."""
import atexit
import os
import re
import shutil
import signal
import sys
import tempfile

import pytest
from hub_stand_in import WRITER, Hub
from hypothesis import settings

# Here, as `pytest --hypothesis-profile=more` wants them before it has read any test.
settings.register_profile('same', derandomize=True, max_examples=50, deadline=None, database=None)
settings.register_profile('more', max_examples=3000, deadline=None, database=None)
settings.load_profile('same')

HUB, HF_HOME = Hub(), tempfile.mkdtemp()
atexit.register(shutil.rmtree, HF_HOME, ignore_errors=True)
# torch and huggingface_hub read these as they are imported, and child processes inherit them.
os.environ.setdefault('OMP_NUM_THREADS', '1')  # tests run side by side
os.environ.update(
    HF_ENDPOINT=HUB.url, HF_HOME=HF_HOME, HF_TOKEN=WRITER, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1')

# Marks of tests that run where they are asked for by name alone, and what to do for that.
ON_DEMAND = {
    'slow': 'takes minutes: run pytest -m slow',
    'scripts': "runs timm's train.py: set TIMM_SCRIPTS to a checkout of timm at the installed version's tag, and run "
               'pytest -m scripts',
    'rehearsal': 'takes minutes: run pytest -m rehearsal',
}


def pytest_collection_modifyitems(config, items):
    for item in items:
        for mark, reason in ON_DEMAND.items():
            if item.get_closest_marker(mark) and mark not in config.getoption('-m'):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def hub():
    """The stand-in, empty, with an empty cache on the client's side."""
    HUB.reset()
    shutil.rmtree(os.path.join(HF_HOME, 'hub'), ignore_errors=True)
    return HUB


@pytest.fixture
def cli(capsys):
    """`timm-finet` in this process: a function of its arguments that returns exit status, output and errors."""
    from timm_finet_cli import main

    def run(*args):
        try:
            status = main([str(arg) for arg in args]) or 0
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return (1, out, f'{err}{status}\n') if isinstance(status, str) else (status, out, err)
    return run


@pytest.fixture
def scripts_run_here(monkeypatch):
    """Puts back at the end what `timm-finet run` changes, which else ends with its process."""
    monkeypatch.setattr(sys, 'argv', sys.argv)
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture
def refused(cli):
    """A function of a command's arguments: it ends with status 2 and one line that fits `message`."""
    def check(args, message):
        status, _, err = cli(*args)
        assert status == 2 and err.count('\n') == 1 and re.search(message, err), err
    return check


@pytest.fixture(autouse=True)
def seed():
    import torch
    torch.manual_seed(0)


@pytest.fixture
def randomise():
    """Give every normalisation of a network statistics and affine terms that folding must get right."""
    import torch
    from torch.nn.modules.batchnorm import _BatchNorm

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


@pytest.fixture
def process_group(tmp_path):
    """The process group of this process alone."""
    import torch
    torch.distributed.init_process_group('gloo', init_method=(tmp_path / 'store').as_uri(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
