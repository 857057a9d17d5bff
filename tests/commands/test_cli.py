"""The console script: what it answers without torch, and how it is installed."""
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*args):
    code = "import sys, timm_finet_cli\ntry:\n    timm_finet_cli.main()\nfinally:\n    print('torch' in sys.modules)"
    return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize('args, status', [
    (['--help'], 0), (['--version'], 0), (['export', '--help'], 0), (['export', 'finet_small', '--to', 'nothing'], 2),
    ([], 2)])
def test_help_version_and_mistakes_are_answered_without_importing_torch(args, status):
    result = run(*args)
    assert (result.returncode, result.stdout.split()[-1]) == (status, 'False'), result.stderr
    if args == ['--version']:
        assert result.stdout.startswith(f"timm-finet {version('timm-finet')}\n")


def test_console_script_is_the_module_beside_the_package():
    settings = (ROOT / 'pyproject.toml').read_text()
    assert re.search(r'^timm-finet = "timm_finet_cli:main"$', settings, re.M)
    assert 'py-modules = ["timm_finet_cli"]' in settings
