"""What the wheel, the README and the continuous integration promise."""
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import timm_finet
from timm_finet.commands.runtimes import PACKAGES

ROOT = Path(__file__).parents[1]


def test_ci_runs_the_readmes_two_commands_word_for_word():
    commands = re.findall(r'^```(?:bash|sh)\n(.*?)\n```', (ROOT / 'README.md').read_text(), re.M | re.S)[:2]
    assert commands == ['pip install . && timm-finet demo', "pip install -e '.[test]' && pytest"]
    lines = (ROOT / '.ci' / 'run').read_text().splitlines()
    for command in commands:
        assert any(command in line for line in lines), command
    jobs = yaml.safe_load((ROOT / '.github' / 'workflows' / 'test.yml').read_text())['jobs']
    assert {'run': '.ci/run'} in jobs['test']['steps']
    oldest = re.search(r'^requires-python = ">=(.*)"$', (ROOT / 'pyproject.toml').read_text(), re.M)[1]
    assert jobs['test']['strategy']['matrix']['include'][0] == {'python': oldest, 'resolution': 'lowest-direct'}


def test_readmes_links_lead_somewhere_from_a_package_index_too():
    home = re.search(r'^Homepage = "(.*)"$', (ROOT / 'pyproject.toml').read_text(), re.M)[1]
    raw = home.replace('github.com', 'raw.githubusercontent.com')
    text = (ROOT / 'README.md').read_text()
    assert [target for target in re.findall(r'\]\(([^)]+)\)', text) if not target.startswith('https://')] == []
    targets = dict(re.findall(r'^\[(.+)\]: (.+)$', text, re.M))
    assert set(re.findall(r'\]\[([\w./#-]+)\]', text)) == set(targets) and len(targets) > 15
    for name, target in targets.items():
        folder = raw if name.endswith('.png') else f"{home}/{'tree' if (ROOT / name).is_dir() else 'blob'}"
        assert target == f'{folder}/main/{name}' and (ROOT / name.split('#')[0]).exists()


def test_citation_and_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == timm_finet.__version__
    assert (ROOT / 'CHANGELOG.md').read_text().split('## ')[1].startswith(timm_finet.__version__)


def test_recipes_weights_and_the_mark_of_types_are_in_the_wheel():
    settings = (ROOT / 'pyproject.toml').read_text()
    assert all(f'"{pattern}"' in settings for pattern in ('hub/card.md', 'recipes/*.yaml', 'weights/*', 'py.typed'))
    assert (ROOT / 'timm_finet' / 'py.typed').is_file()
    packages = re.search(r'^packages = (\[[^]]*\])', settings, re.M)[1]
    rooms = {path.parent.name for path in (ROOT / 'timm_finet').glob('*/__init__.py')}
    assert set(yaml.safe_load(packages)) == {'timm_finet', *(f'timm_finet.{room}' for room in rooms)}
    folders = {path.parent.name for path in (ROOT / 'timm_finet').glob('*/*')}
    assert folders - {'__pycache__'} == {*rooms, 'recipes', 'weights'}


def test_arrows_between_the_rooms_run_one_way():
    order = ['ops', 'fbn', 'fusion', 'rewrite', 'data', 'hub', 'commands']
    for room in ('ops', 'fusion', 'data', 'hub'):
        above = order[order.index(room) + 1:] + ['scripts']
        for file in (ROOT / 'timm_finet' / room).glob('*.py'):
            imported = re.findall(r'^ *from (?:\.\.(\w+)|(scripts)\b)', file.read_text(), re.M)
            if file.name not in ('checkpoint.py', 'card.py', 'repository.py'):  # which know the networks
                assert not {name for pair in imported for name in pair} & {*above, 'finet', 'resnet_fbn'}, file


@pytest.mark.parametrize('extra, packages', [('export', PACKAGES['onnx']), ('executorch', PACKAGES['executorch'])])
def test_export_asks_for_the_packages_of_its_extra(extra, packages):
    listed = re.search(rf'^{extra} = \[(.*)\]$', (ROOT / 'pyproject.toml').read_text(), re.M)[1]
    assert set(re.findall(r'"(\w+)>', listed)) == set(packages.split())


@pytest.mark.slow  # as it imports everything once more
def test_importing_prints_and_warns_nothing():
    result = subprocess.run(
        [sys.executable, '-W', 'error::UserWarning', '-c', 'import timm_finet, timm_finet.commands.main'],
        capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')


def test_version_is_installed():
    assert version('timm-finet') == timm_finet.__version__
