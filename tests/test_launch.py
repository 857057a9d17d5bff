"""`timm-finet run`: timm's scripts with our models."""
import http.server
import subprocess
import sys
import threading

import pytest
import timm
import torch

from timm_finet import launch

SCRIPT = '''
import sys, timm
from timm.data import create_dataset
assert __name__ == '__main__'
print(sys.argv[1:], timm.is_model('finet_large_se_g4'), timm.is_model('resnet50_fbn'))
sys.exit(0 if '--ok' in sys.argv else 7)
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    (tmp_path / 'validate.py').write_text(SCRIPT)
    monkeypatch.setenv('TIMM_SCRIPTS', str(tmp_path))
    return tmp_path / 'validate.py'


@pytest.mark.parametrize('by', ['name', 'path'])
def test_script_runs_as_main_with_our_models_and_its_exit_status(by, script):
    result = subprocess.run(
        [sys.executable, '-m', 'timm_finet', 'run', 'validate' if by == 'name' else str(script), '--model', 'x', '--help'],
        capture_output=True, text=True)
    assert result.returncode == 7, result.stderr
    assert result.stdout.strip() == "['--model', 'x', '--help'] True True"


def test_scripts_may_fuse_before_eval(script):
    script.write_text(
        "import timm\nfrom timm.utils import reparameterize_model\nfrom timm.utils.model import reparameterize_model as other\n"
        "for fuse in (reparameterize_model, other):\n"
        "    model = fuse(timm.create_model('finet_small_g2'))\n"
        "    print(model.training, any('running_var' in key for key in model.state_dict()))\n")
    result = subprocess.run(
        [sys.executable, '-m', 'timm_finet', 'run', 'validate'], capture_output=True, text=True)
    assert result.stdout.split() == ['False'] * 4, result.stderr


def test_torchrun_starts_it(script):
    result = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m', 'timm_finet', 'run',
         'validate', '--ok'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("['--ok']") == 2 and result.stdout.count('True True') == 2


def test_recipes_are_found_by_name(script):
    command = launch.resolve('validate', ['--config', 'recipe:cifar10_short', '--lr', '1'])
    assert command[0] == str(script) and command[2].endswith('recipes/cifar10_short.yaml') and command[3:] == ['--lr', '1']
    with pytest.raises(FileNotFoundError, match="recipe:none.*cifar10_short"):
        launch.resolve('validate', ['--config', 'recipe:none'])


def test_unknown_scripts_are_named(script):
    with pytest.raises(FileNotFoundError, match="'trane' is unknown: use one of train"):
        launch.find_script('trane')
    with pytest.raises(FileNotFoundError, match=r"no/such\.py"):
        launch.find_script('no/such.py')


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    return tmp_path / 'timm_scripts' / f'v{timm.__version__}'


def test_script_is_fetched_once_at_the_installed_versions_tag(cache, monkeypatch):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            found = self.path.endswith('/train.py')
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(b'print(1)' if found else b'')

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(launch, 'URL', f'http://127.0.0.1:{server.server_port}/timm')
        for _ in range(2):
            assert launch.find_script('train').read_text() == 'print(1)'
        with pytest.raises(FileNotFoundError, match='404.*Three ways out'):
            launch.find_script('validate')
        server.shutdown()
    assert asked == [f'/timm/v{timm.__version__}/train.py', f'/timm/v{timm.__version__}/validate.py']
    assert [p.name for p in cache.iterdir()] == ['train.py']


def test_no_network_names_three_ways_out(cache, monkeypatch):
    monkeypatch.setattr(launch, 'URL', 'http://127.0.0.1:1')
    with pytest.raises(FileNotFoundError, match=f'TIMM_SCRIPTS to a checkout of timm at tag v{timm.__version__}.*train.py'):
        launch.find_script('train')
    assert not cache.exists()


@pytest.fixture
def train(script):
    (script.parent / 'train.py').write_text('from timm import utils\nutils.AverageMeter().update(float("nan"))\nprint("on")')

    def run(*args):
        return subprocess.run(
            [sys.executable, '-m', 'timm_finet', 'run', 'train', *args], capture_output=True, text=True, cwd=script.parent)
    return run


def test_training_stops_at_a_loss_that_is_nan(train):
    result = train('--lr', '1')
    assert (result.returncode, result.stdout) == (1, '') and result.stderr.startswith('The loss is nan: ')


@pytest.mark.parametrize('by', ['option', 'config'])
def test_output_that_cannot_be_written_is_refused_before_training(by, train, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'recipe.yaml').write_text(f'output: {tmp_path}/file/runs\n')
    result = train('--output', str(tmp_path / 'file' / 'runs')) if by == 'option' else train('-c', 'recipe.yaml')
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"--output='{tmp_path}/file/runs' cannot be written to" in result.stderr


def test_full_disk_is_refused_before_training(tmp_path):
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(OSError, match='cannot be written to.*64 MB'):
            launch.check_output(['--output', str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    launch.check_output(['--output', str(tmp_path / 'new' / 'folder')])
    assert not list(tmp_path.iterdir())
