"""timm's own model tests, taken from the sdist of the installed timm, on this package's model names."""
import os
import subprocess
import sys
import tarfile
from xml.etree import ElementTree

import pytest
import timm

import timm_finet  # noqa: F401, registers the names

NAMES = timm.list_models(module=['finet', 'resnet_fbn'])

# The module that timm's tests import first. Three of them take the names of listed timm modules only: ours join one.
BACKEND = f"""
import timm_finet
from timm.models._registry import _module_to_models
_module_to_models['starnet'] |= set({NAMES})
"""


def timm_sdist(cache):
    """Path of the installed timm's sdist, downloaded once; without a network the test is skipped."""
    path = cache / f'timm-{timm.__version__}.tar.gz'
    if not path.exists():
        pip = subprocess.run(
            [sys.executable, '-m', 'pip', 'download', '--retries', '1', '--no-deps', '--no-binary', 'timm',
             '--dest', cache / str(os.getpid()), f'timm=={timm.__version__}'],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if pip.returncode and 'connection broken' in pip.stdout:  # pip's words, from its one retry
            pytest.skip(f"timm {timm.__version__}'s own tests cannot be fetched: run it where there is a network")
        assert pip.returncode == 0, pip.stdout[-4000:]
        (cache / str(os.getpid()) / path.name).replace(path)  # whole or not at all, as the other half wants it too
    return path


@pytest.mark.slow
@pytest.mark.parametrize('names', [NAMES[::2], NAMES[1::2]], ids=['one half', 'the other'])  # two cores
def test_timm_suite(names, request, tmp_path):
    version = f'timm-{timm.__version__}'
    with tarfile.open(timm_sdist(request.config.cache.mkdir('timm_suite'))) as sdist:
        # These two alone: the sdist's timm package must not shadow the installed one.
        for source, target in (('tests/test_models.py', 'test_models.py'), ('pyproject.toml', 'pyproject.toml')):
            (tmp_path / target).write_bytes(sdist.extractfile(f'{version}/{source}').read())
    (tmp_path / 'finet_backend.py').write_text(BACKEND)

    # timm leaves tests out on GitHub's runners. The parent's path makes the child import the same timm and timm_finet.
    env = {key: value for key, value in os.environ.items() if key not in ('GITHUB_ACTIONS', 'PYTEST_ADDOPTS')}
    env.update(TORCH_BACKEND='finet_backend', PYTHONPATH=os.pathsep.join(sys.path))
    # A test's id ends with `name]`, or with `name.tag]`: so none of timm's names, and no longer name of ours, matches.
    selection = ' or '.join(f'{name}] or {name}.' for name in names)
    suite = subprocess.run(
        [sys.executable, '-m', 'pytest', 'test_models.py', '-k', selection, '-q', '--tb=short', '--disable-warnings',
         '--junitxml=report.xml', '-p', 'no:cacheprovider'],
        cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert suite.returncode == 0, suite.stdout[-8000:]
    report = ElementTree.parse(tmp_path / 'report.xml').find('testsuite')
    ran = int(report.get('tests')) - int(report.get('skipped'))
    least = 11 * len(names) + 3 * ('finet_small_g4' in names)  # eleven a name, three on the weights for CIFAR-10
    assert ran >= least and report.get('skipped') == '0', suite.stdout[-2000:]
