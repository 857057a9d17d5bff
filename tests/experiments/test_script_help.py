"""Every script tells how it is used, and changes nothing when asked to."""
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / 'scripts').rglob('*.py'))
# A file without a main block is imported by others, and is no command.
COMMANDS = [file for file in FILES if "__name__ == '__main__'" in file.read_text()]


def changes():
    """What git sees of the working tree: changed and new files, and the content of the changed ones."""
    def git(*args):
        return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    return git('status', '--porcelain'), git('diff', 'HEAD')


def test_files_without_a_main_block_do_nothing_but_define():
    others = set(FILES) - set(COMMANDS)
    assert {file.stem for file in others} == {
        'cifar_plan', 'converted', 'draw_block', 'networks', 'quiet_branches', 'report', 'runs', 'several_cpus',
        'tied_affine', 'timing', 'train_facts'}


def test_every_script_has_its_line_in_the_overview():
    text = (ROOT / 'scripts' / 'README.md').read_text()
    assert [file.name for file in FILES if f'`{file.name}`' not in text] == []


@pytest.mark.parametrize('file', COMMANDS, ids=lambda file: file.stem)
def test_help_is_printed_and_nothing_is_changed(file, tmp_path, monkeypatch, capsys):
    in_git = shutil.which('git') and (ROOT / '.git').exists()
    before = changes() if in_git else None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [file.name, '--help'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(file), run_name='__main__')
    assert end.value.code == 0 and capsys.readouterr().out.startswith(f'usage: {file.name}')
    assert not list(tmp_path.iterdir())
    if in_git:
        assert changes() == before
