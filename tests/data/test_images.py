"""Image files of every mode that Pillow opens, read pixel for pixel as they are looked at."""
import math
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from timm_finet.images import read_image, read_images

# Red, green, blue and white, half of them transparent; and gray as bytes
COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)
ALPHA = np.array([[0, 255], [128, 1]], np.uint8)[..., None]
GRAY = np.array([[0, 100], [200, 255]], np.uint8)


def read(file):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        image = read_image(file)
    assert image.mode == 'RGB'
    return np.asarray(image)


def as_rgb(gray):
    return np.repeat(np.asarray(gray, np.uint8)[..., None], 3, -1)


@pytest.mark.parametrize('mode, suffix, levels, expected', [
    ('RGB', '.png', COLOURS, COLOURS),
    ('L', '.png', GRAY, as_rgb(GRAY)),
    ('1', '.png', np.array([[False, True], [True, False]]), as_rgb([[0, 255], [255, 0]])),
    # Transparent or not, a pixel keeps its colour.
    ('RGBA', '.png', np.concatenate([COLOURS, ALPHA], -1), COLOURS),
    ('RGBA', '.tif', np.concatenate([COLOURS, ALPHA], -1), COLOURS),
    ('LA', '.png', np.concatenate([GRAY[..., None], ALPHA], -1), as_rgb(GRAY)),
    # Print: as much light as ink is missing, times that without black
    ('CMYK', '.tif', np.array([[[0, 255, 255, 0], [255, 0, 255, 0]], [[255, 255, 0, 0], [0, 0, 0, 0]]], np.uint8),
     COLOURS),
    # 16 bits, from black to white: 257 is one level of 8 bits
    ('I;16', '.png', np.array([[0, 257 * 100], [257 * 200 + 128, 65535]], np.uint16), as_rgb(GRAY)),
    ('I;16', '.tif', np.array([[0, 257 * 100 - 128], [257 * 200, 65535]], np.uint16), as_rgb(GRAY)),
    ('I;16B', '.tif', np.array([[0, 257 * 100], [257 * 200, 65535]], '>u2'), as_rgb(GRAY)),
    ('I', '.tif', np.array([[0, 257 * 100], [257 * 200, 65535]], np.int32), as_rgb(GRAY)),
    ('F', '.tif', np.array([[0, 100 / 255], [200 / 255, 1]], np.float32), as_rgb(GRAY)),
])
def test_pixels_of_each_mode(mode, suffix, levels, expected, tmp_path):
    file = tmp_path / f'image{suffix}'
    Image.fromarray(levels).save(file) if mode != 'CMYK' else Image.fromarray(levels, 'CMYK').save(file)
    with Image.open(file) as image:
        assert image.mode == mode  # the file is of the kind that it is meant to be
    np.testing.assert_array_equal(read(file), expected)


@pytest.mark.parametrize('transparency', [None, 1, b'\x00\x80\xff\x01'])
def test_palette_gives_its_colours_whatever_is_transparent(transparency, tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 3]], np.uint8), 'P')
    image.putpalette(COLOURS.reshape(-1).tolist())
    image.save(tmp_path / 'image.png', **({} if transparency is None else dict(transparency=transparency)))
    with Image.open(tmp_path / 'image.png') as opened:
        assert opened.mode == 'P' and opened.info.get('transparency') == transparency
    np.testing.assert_array_equal(read(tmp_path / 'image.png'), COLOURS)


@pytest.mark.parametrize('suffix', ['.gif', '.png', '.webp'])
def test_of_what_moves_the_first_image_is_taken(suffix, tmp_path):
    frames = [Image.fromarray(COLOURS), Image.fromarray(COLOURS[::-1].copy())]
    lossless = dict(lossless=True) if suffix == '.webp' else {}
    frames[0].save(tmp_path / f'image{suffix}', save_all=True, append_images=frames[1:], duration=100, **lossless)
    with Image.open(tmp_path / f'image{suffix}') as image:
        assert image.n_frames == 2
    np.testing.assert_array_equal(read(tmp_path / f'image{suffix}'), COLOURS)


# What a camera held so writes: undo it by hand. Rows are y, columns x.
HELD = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1)}


@pytest.mark.parametrize('orientation', HELD)
@pytest.mark.parametrize('suffix', ['.png', '.tif', '.webp'])
def test_photograph_stands_upright_however_the_camera_was_held(suffix, orientation, tmp_path):
    upright = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = dict(lossless=True) if suffix == '.webp' else {}
    Image.fromarray(HELD[orientation](upright).copy()).save(tmp_path / f'image{suffix}', exif=exif, **lossless)
    np.testing.assert_array_equal(read(tmp_path / f'image{suffix}'), upright)


def write_turned(file, exif=b'', mode='RGB'):
    """A JPEG file or a PNG file, 6 px wide and 4 px high, of orientation 6."""
    orientation = Image.Exif()
    orientation[0x0112] = 6
    Image.new(mode, (6, 4)).save(file, exif=exif or orientation)


def test_jpeg_and_16_bits_are_turned_too(tmp_path):
    write_turned(tmp_path / 'image.jpg')
    write_turned(tmp_path / 'image.png', mode='I;16')
    assert [image.size for image in read_images([tmp_path / 'image.jpg', tmp_path / 'image.png'])] == [(4, 6)] * 2


def test_odd_exif_data_do_not_keep_a_photograph_from_being_read(tmp_path):
    orientation, make = struct.pack('<HHIHH', 0x0112, 3, 1, 6, 0), struct.pack('<HHIf', 0x010f, 11, 1, 0)
    # The maker's name as a number: Pillow turns the image, and then fails to write these data back.
    write_turned(tmp_path / 'image.jpg', struct.pack('<6s4sIH', b'Exif', b'II*', 8, 2) + make + orientation + bytes(4))
    with Image.open(tmp_path / 'image.jpg') as image, pytest.raises(AttributeError):
        ImageOps.exif_transpose(image)
    assert read_image(tmp_path / 'image.jpg').size == (4, 6)
    write_turned(tmp_path / 'image.jpg', b'Exif\x00\x00no such data')
    assert read_image(tmp_path / 'image.jpg').size == (6, 4)


@pytest.mark.parametrize('levels', [
    np.array([[0, 65536]], np.int32), np.array([[-1, 5]], np.int32), np.array([[0, 255]], np.float32),
    np.array([[-0.1, 1]], np.float32), np.array([[0, math.nan]], np.float32)])
def test_levels_that_have_no_known_white_are_refused(levels, tmp_path):
    Image.fromarray(levels).save(tmp_path / 'image.tif')
    with pytest.raises(ValueError, match=r'image.tif cannot be read \(levels from .* to .*, not within 0 to'):
        read_image(tmp_path / 'image.tif')


@pytest.mark.parametrize('brand', [b'heic', b'mif1'])
def test_heic_is_named_with_the_way_out(brand, tmp_path):
    (tmp_path / 'image.HEIC').write_bytes(b'\x00\x00\x00\x18ftyp' + brand + bytes(100))
    with pytest.raises(ValueError, match='image.HEIC is HEIC or AVIF, which this Pillow cannot read: convert'):
        read_image(tmp_path / 'image.HEIC')


@pytest.mark.skipif(not features.check('avif'), reason='Pillow cannot read AVIF: pip install -U pillow')
def test_avif_is_read_where_pillow_can(tmp_path):
    Image.new('RGB', (6, 4)).save(tmp_path / 'image.avif')
    assert read_image(tmp_path / 'image.avif').size == (6, 4)


def test_damaged_file_is_named_with_the_reason(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / 'image.jpg')
    (tmp_path / 'image.jpg').write_bytes((tmp_path / 'image.jpg').read_bytes()[:-500])
    with pytest.raises(ValueError, match=r'image.jpg cannot be read \(.*truncated.*\): save it again'):
        read_image(tmp_path / 'image.jpg')
    (tmp_path / 'empty.jpg').touch()
    with pytest.raises(ValueError, match='empty.jpg is not an image that Pillow can read'):
        read_image(tmp_path / 'empty.jpg')
    with pytest.raises(FileNotFoundError, match='none.jpg does not exist'):
        read_image(tmp_path / 'none.jpg')
