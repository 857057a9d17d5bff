"""`timm-finet demo` as a user calls it."""
import errno
import itertools
import os
import re
import time

import pytest
import timm
import torch
from PIL import Image

from timm_finet.commands.demo import PHOTOGRAPHS, SHIPPED
from timm_finet.data.datasets import CIFAR10
from timm_finet.images import contact_sheet, find_images, read_images, shipped_images


def test_shipped_images_are_classified_fused_and_drawn(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = cli('demo')
    assert status == 0, err
    train, fused = re.findall(r'(?:train form|fused) +([\d.]+)% +([\d,]+) +([\d,]+) +(\d+)', out)
    assert float(train[0]) >= 88 and train[0] == fused[0]
    assert train[1:3] == ('1,387,730', '12,971,520') and fused[1:3] == ('1,369,338', '12,971,520')
    difference = float(re.search(r'largest difference of the logits: (\S+)', out)[1])
    assert 0 < difference < 1e-4
    assert '8/8' in err  # the progress bar
    images, labels = shipped_images()
    model = timm.create_model(SHIPPED, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model))
    with torch.inference_mode():
        guesses = model(torch.stack([transform(image) for image in images])).argmax(1).tolist()
    names, right = CIFAR10.classes, [guess == label for guess, label in zip(guesses, labels)]
    assert train[0] == f'{sum(right) / 4:.2f}'
    titles = [f'{names[guess]}\n' + ('' if ok else f'({names[label]})')
              for guess, label, ok in zip(guesses, labels, right)]
    contact_sheet(images, titles, right, 'expected.png')
    with Image.open('finet_demo.png') as sheet, Image.open('expected.png') as expected:
        assert sheet.size == (1280, 1840) and sheet.tobytes() == expected.tobytes()


def test_own_images_and_folders(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2)
    folder = tmp_path / 'mine'
    folder.mkdir()
    images, _ = shipped_images()
    images[0].resize((300, 200)).save(folder / 'plane.jpg')
    images[399].convert('L').save(tmp_path / 'gray.png')
    status, out, err = cli('demo', folder, tmp_path / 'gray.png', '--output', tmp_path / 'out.png')
    assert status == 0, err
    assert out.startswith(f'{PHOTOGRAPHS} on 2 images, 2 threads\n')
    for file in (folder / 'plane.jpg', tmp_path / 'gray.png'):
        percents = re.search(rf'^{re.escape(str(file))}: [\w -]+ (\d+)%, [\w -]+ (\d+)%, [\w -]+ (\d+)%$', out, re.M)
        first, second, third = map(int, percents.groups())
        assert 100 >= first >= second >= third
    best = re.findall(r'^/.*: ([\w -]+ \d+%),', out, re.M)
    read = read_images([folder / 'plane.jpg', tmp_path / 'gray.png'])
    contact_sheet(read, best, [True] * 2, str(tmp_path / 'expected.png'), size=128)
    assert 'The network knows only 200 classes: for an image of anything else the percentages mean little.\n' in out
    assert '156,085,376' in out  # multiply-adds at the size that they are tested at
    with Image.open(tmp_path / 'out.png') as sheet, Image.open(tmp_path / 'expected.png') as expected:
        assert sheet.size == (256, 142) and sheet.tobytes() == expected.tobytes()


def test_speed_is_the_median_of_an_image(cli, tmp_path, monkeypatch):
    """Here each run is one of two images in a tenth of a second."""
    for name in 'ab':
        Image.new('RGB', (32, 32)).save(tmp_path / f'{name}.png')
    clock = itertools.count()
    monkeypatch.setattr(time, 'perf_counter', lambda: next(clock) / 10)
    out = cli('demo', tmp_path / 'a.png', tmp_path / 'b.png', '--output', tmp_path / 'out.png')[1]
    assert re.findall(r'(?:train form|fused).* (\d+)\n', out) == ['20', '20']


def test_sheet_has_images_row_by_row_their_middle_alone_and_wrong_names_in_red(tmp_path):
    colours = [(0, 0, 200), (0, 200, 0), (10 * 8, 0, 200)] * 9
    images = [Image.new('RGB', (96, 32), 'white') for _ in colours]
    for image, colour in zip(images, colours):
        image.paste(colour, (32, 0, 64, 32))
    right = [i % 2 == 0 for i in range(27)]
    contact_sheet(images, ['name'] * 27, right, str(tmp_path / 'sheet.png'))
    with Image.open(tmp_path / 'sheet.png') as sheet:
        assert sheet.size == (20 * 64, 2 * (64 + 14))
        for i, (colour, ok) in enumerate(zip(colours, right)):
            x, y = i % 20 * 64, i // 20 * 78
            for corner in ((x + 2, y + 2), (x + 61, y + 2), (x + 2, y + 61), (x + 61, y + 61)):
                assert sheet.getpixel(corner) == pytest.approx(colour, abs=8)  # resized
            darkest = min(sheet.crop((x, y + 64, x + 64, y + 78)).getcolors(1 << 12), key=lambda pair: pair[1][1])[1]
            assert (max(darkest) < 128) == ok and (darkest[0] > 200) == (not ok)


def test_images_are_found_in_folders_of_folders_in_order_and_hidden_ones_are_not(tmp_path):
    for name in ('b.png', 'a/z.png', 'a/c/d.png', '.hidden.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (2, 2)).save(tmp_path / name)
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path, tmp_path / 'b.png'])]
    assert found == ['a/c/d.png', 'a/z.png', 'b.png', 'b.png']


def test_file_that_cannot_be_read_is_skipped_by_name_and_the_others_are_done(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 1)
    mine = tmp_path / 'mine'
    mine.mkdir()
    shipped_images()[0][0].save(mine / 'plane.png')
    (mine / 'notes.txt').write_text('no image')
    status, out, err = cli('demo', mine, tmp_path / 'none.png', '--output', tmp_path / 'out.png')
    assert status == 1 and f'{PHOTOGRAPHS} on 1 image, 1 thread\n' in out and f"\n{mine / 'plane.png'}: " in out
    skipped = [line for line in err.splitlines() if 'skipped' in line]
    assert skipped == [
        f"timm-finet demo: skipped: {mine / 'notes.txt'} is not an image that Pillow can read.",
        f"timm-finet demo: skipped: {tmp_path / 'none.png'} does not exist: give images, or folders that hold some."]
    with Image.open(tmp_path / 'out.png') as sheet:
        assert sheet.width == 128


@pytest.mark.parametrize('name, message', [
    ('no.png', 'no.png does not exist'), ('text.png', 'text.png is not an image'),
    ('empty', 'empty is an empty folder'),
    ('texts', 'none of 2 files can be read; the first: .*a.txt is not'), ('bomb.png', 'bomb.png has more pixels')])
def test_bad_images_give_one_line_and_no_file(name, message, refused, tmp_path, monkeypatch):
    (tmp_path / 'text.png').write_text('no image')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'texts').mkdir()
    for text in ('a.txt', 'b.txt'):
        (tmp_path / 'texts' / text).write_text('no image')
    Image.new('RGB', (20, 20)).save(tmp_path / 'bomb.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    refused(['demo', tmp_path / name, '--output', tmp_path / 'out.png'], message)
    assert not (tmp_path / 'out.png').exists()


def test_interrupt_ends_in_one_line_and_leaves_no_file(cli, monkeypatch, tmp_path):
    def interrupt(self, file, **kwargs):
        open(file, 'wb').close()
        raise KeyboardInterrupt
    Image.new('RGB', (32, 32)).save(tmp_path / 'own.png')
    monkeypatch.setattr(Image.Image, 'save', interrupt)
    status, _, err = cli('demo', tmp_path / 'own.png', '--output', tmp_path / 'out.png')
    assert status == 130 and err.endswith('timm-finet demo: interrupted.\n')
    assert [p.name for p in tmp_path.iterdir()] == ['own.png']


def test_full_disk_names_the_file(monkeypatch, tmp_path):
    def fail(self, file, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(Image.Image, 'save', fail)
    with pytest.raises(OSError, match=r"output='.*sheet.png' cannot be written: No space left"):
        contact_sheet([Image.new('RGB', (32, 32))], ['a'], [True], str(tmp_path / 'sheet.png'))


@pytest.mark.parametrize('output', ['no/out.png', '.', '/proc/out.png'])
def test_unwritable_output_is_refused_before_the_work(output, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(['demo', '--output', output], f'output={output!r} cannot be written')
