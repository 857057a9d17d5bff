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
