"""`timm-finet demo` as a user calls it."""
import errno
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from timm_finet import demo
from timm_finet.cli import main


def run(*args, cwd):
    return subprocess.run(
        [sys.executable, '-m', 'timm_finet', 'demo', *map(str, args)], cwd=cwd, capture_output=True, text=True)


def test_shipped_images_are_classified_fused_and_drawn(tmp_path):
    result = run(cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    train, fused = re.findall(r'(?:train form|fused) +([\d.]+)% +([\d,]+) +([\d,]+) +(\d+)', result.stdout)
    assert float(train[0]) >= 88 and train[0] == fused[0]
    assert train[1:3] == ('1,387,730', '12,971,520') and fused[1:3] == ('1,369,338', '12,971,520')
    difference = float(re.search(r'largest difference of the logits: (\S+)', result.stdout)[1])
    assert 0 < difference < 1e-4
    assert '8/8' in result.stderr  # the progress bar
    with Image.open(tmp_path / 'finet_demo.png') as sheet:
        assert sheet.size == (1280, 1560)


def test_own_images_and_folders(tmp_path):
    folder = tmp_path / 'mine'
    folder.mkdir()
    images, _ = demo.shipped_images()
    images[0].resize((300, 200)).save(folder / 'plane.jpg')
    images[399].convert('L').save(tmp_path / 'gray.png')
    result = run(folder, tmp_path / 'gray.png', '--output', tmp_path / 'out.png', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r'^\w+ \d+%$', result.stdout, re.M)) == 2 and (tmp_path / 'out.png').is_file()


@pytest.mark.parametrize('name, message', [
    ('no.png', 'does not exist'), ('text.png', 'not an image'), ('empty', 'empty folder')])
def test_bad_images_give_one_line_and_no_file(name, message, tmp_path):
    (tmp_path / 'text.png').write_text('no image')
    (tmp_path / 'empty').mkdir()
    result = run(tmp_path / name, cwd=tmp_path)
    assert result.returncode == 2
    assert name in result.stderr and message in result.stderr and 'Traceback' not in result.stderr
    assert not (tmp_path / 'finet_demo.png').exists()


def test_image_of_too_many_pixels_is_refused(monkeypatch, tmp_path, capsys):
    Image.new('RGB', (20, 20)).save(tmp_path / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(SystemExit) as exit:
        main(['demo', str(tmp_path / 'bomb.png'), '--output', str(tmp_path / 'out.png')])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and 'bomb.png has more pixels' in err and err.count('\n') == 1


def test_interrupt_ends_in_one_line_and_leaves_no_file(monkeypatch, tmp_path, capsys):
    def interrupt(self, file, **kwargs):
        open(file, 'wb').close()
        raise KeyboardInterrupt
    Image.new('RGB', (32, 32)).save(tmp_path / 'own.png')
    monkeypatch.setattr(Image.Image, 'save', interrupt)
    with pytest.raises(SystemExit) as exit:
        main(['demo', str(tmp_path / 'own.png'), '--output', str(tmp_path / 'out.png')])
    assert exit.value.code == 130 and capsys.readouterr().err.endswith('timm-finet demo: interrupted.\n')
    assert [p.name for p in tmp_path.iterdir()] == ['own.png']


def test_full_disk_names_the_file(monkeypatch, tmp_path):
    def fail(self, file, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Image.Image, 'save', fail)
    with pytest.raises(OSError, match=r"output='.*sheet.png' cannot be written: No space left"):
        demo.contact_sheet([Image.new('RGB', (32, 32))], ['a'], [True], str(tmp_path / 'sheet.png'))


@pytest.mark.parametrize('output', ['no/out.png', '.', '/proc/out.png'])
def test_unwritable_output_is_refused_before_the_work(output, tmp_path):
    result = run('--output', output, cwd=tmp_path)
    assert result.returncode == 2 and f'output={output!r} cannot be written' in result.stderr
    assert result.stdout == '' and len(result.stderr.splitlines()) == 1


def test_interrupted_sheet_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, 'save', lambda self, file, **kw: (open(file, 'wb').close(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        demo.contact_sheet([Image.new('RGB', (32, 32))], ['a'], [True], str(tmp_path / 'sheet.png'))
    assert not list(tmp_path.iterdir())
