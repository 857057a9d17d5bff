"""Every script tells how it is used, and changes nothing when asked to."""
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / 'scripts'
# A file without a main block is imported by others, and is no command.
COMMANDS = sorted(file.name for file in SCRIPTS.glob('*.py') if "__name__ == '__main__'" in file.read_text())


def changes():
    """What git sees of the working tree: changed and new files, and the content of the changed ones."""
    def git(*args):
        return subprocess.run(['git', *args], cwd=SCRIPTS.parent, capture_output=True, text=True, check=True).stdout

    return git('status', '--porcelain'), git('diff', 'HEAD')


def test_files_without_a_main_block_do_nothing_but_define():
    others = {file.name for file in SCRIPTS.glob('*.py')} - set(COMMANDS)
    assert others == {'cifar_runs.py', 'report.py', 'shufflenet.py', 'tied_affine.py', 'train_facts.py'}


@pytest.mark.parametrize('name', COMMANDS)
def test_help_is_printed_and_nothing_is_changed(name, tmp_path, monkeypatch, capsys):
    in_git = shutil.which('git') and (SCRIPTS.parent / '.git').exists()
    before = changes() if in_git else None
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(sys, 'argv', [name, '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / name), run_name='__main__')
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f'usage: {name}')
    assert not list(tmp_path.iterdir())
    if in_git:
        assert changes() == before
