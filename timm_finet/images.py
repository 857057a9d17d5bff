"""Read the shipped images and image files, and draw sheets of images."""
from contextlib import suppress
from pathlib import Path
from typing import List, Sequence, Tuple, Union

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from .data.datasets import WEIGHTS
from .data.files import replace_file

__all__ = ['contact_sheet', 'draw_confusion', 'find_images', 'read_image', 'read_images', 'shipped_images']

# Tiles of 32 px in order of class: CIFAR-10's first 40 test images of each class, and first 10 training images of each
IMAGES = WEIGHTS / 'cifar10_test.webp'
TRAINING_IMAGES = WEIGHTS / 'cifar10_train.webp'


def shipped_images(file: Path = IMAGES) -> Tuple[List[Image.Image], List[int]]:
    """The shipped CIFAR-10 images and their labels: 400 test images, or 100 training images."""
    with Image.open(file) as sprite:
        sprite = sprite.convert('RGB')
    tiles = [
        sprite.crop((x, y, x + 32, y + 32)) for y in range(0, sprite.height, 32) for x in range(0, sprite.width, 32)]
    return tiles, [10 * i // len(tiles) for i in range(len(tiles))]


def find_images(paths: Sequence[str]) -> List[Path]:
    """List image files; a folder stands for all files in it and its subfolders, except hidden ones.

    Raises:
        ValueError: A folder is empty.
    """
    files = []
    for path in map(Path, paths):
        found = sorted(p for p in path.rglob('*') if p.is_file() and p.name[0] != '.') if path.is_dir() else [path]
        if not found:
            raise ValueError(f'{path} is an empty folder: give images, or folders that hold some.')
        files += found
    return files


def read_image(file: Union[str, Path]) -> Image.Image:
    """Read an image file as 8-bit RGB, turned as its EXIF data say.

    Gray images of more than 8 bits are scaled to 8 bits: integers from 0 to 65535, floats from 0 to 1. The first
    frame of an animation is read. Transparency is dropped, as by timm's and torchvision's loaders, so that transparent
    pixels keep their colour.

    Raises:
        ValueError: Pillow cannot read the file, it has too many pixels, or its levels are outside of these ranges.
        FileNotFoundError: There is no such file.
    """
    try:
        with Image.open(file) as image:
            image.load()
            with suppress(Exception):  # it may fail to write the data back after it has turned the pixels
                ImageOps.exif_transpose(image, in_place=True)
            if image.mode[0] in 'IF':
                return to_8_bits(image).convert('RGB')
            if image.mode == 'P':  # converting straight to RGB, Pillow warns about several transparent colours
                image = image.convert('RGBA')
            return image.convert('RGB')
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{file} does not exist: give images, or folders that hold some.') from error
    except Image.DecompressionBombError as error:
        raise ValueError(f'{file} has more pixels than Pillow considers safe: give a smaller image.') from error
    except UnidentifiedImageError as error:
        if is_heif(file):
            raise ValueError(f'{file} is HEIC or AVIF, which this Pillow cannot read: convert it to JPEG.') from error
        raise ValueError(f'{file} is not an image that Pillow can read.') from error
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        reason = getattr(error, 'strerror', None) or str(error) or type(error).__name__
        raise ValueError(f'{file} cannot be read ({reason}): save it again as JPEG or PNG.') from error


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scale an image of mode I;16, I or F to mode L; Pillow's own `convert` would clip all levels above 255."""
    levels, highest = np.asarray(image), 1 if image.mode == 'F' else 65535
    if not (levels.min() >= 0 and levels.max() <= highest):  # true for NaN too
        raise ValueError(f'levels from {levels.min():g} to {levels.max():g}, not within 0 to {highest}')
    return Image.fromarray((levels * (255 / highest) + 0.5).astype(np.uint8))


def is_heif(file: Union[str, Path]) -> bool:
    """Whether a file is HEIC or AVIF, the containers that phones write."""
    with open(file, 'rb') as start:
        head = start.read(12)
    return head[4:8] == b'ftyp' and head[8:] in (
        b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1', b'avif', b'avis')


def read_images(files: Sequence[Union[str, Path]]) -> List[Image.Image]:
    """Read each file with `read_image`, and raise its errors."""
    return [read_image(file) for file in files]


def contact_sheet(
        images: Sequence[Image.Image], names: Sequence[str], right: Sequence[bool], file: str, size: int = 64,
) -> None:
    """Draw images, cropped to squares, with their names below; a name is red if it is not right.

    All names have the same number of lines.
    """
    label, columns = 14 * (1 + names[0].count('\n')), min(1280 // size, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new('RGB', (columns * size, rows * (size + label)), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (image, name, ok) in enumerate(zip(images, names, right)):
        x, y = i % columns * size, i // columns * (size + label)
        sheet.paste(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC), (x, y))
        fill = 'black' if ok else 'red'
        draw.text((x + size // 2, y + size), name, fill=fill, anchor='ma', align='center', font_size=10)
    with replace_file(file) as part:
        sheet.save(part, format='PNG')


def draw_confusion(counts: Sequence[Sequence[int]], names: Sequence[str], file: str) -> None:
    """Draw a confusion matrix: how many images of a class (row) were classified as a class (column).

    Right guesses are blue, wrong ones red.
    """
    n, corner, short = len(names), 'row: class\ncolumn: guess', [f'{name:.20}' for name in names]
    cell = max(6, min(32, 2400 // n))
    font = dict(font_size=min(12, cell * 2 // 3))
    measure = ImageDraw.Draw(Image.new('RGB', (1, 1))).textlength
    margin = 8 + round(max(measure(text, **font) for text in (*corner.split('\n'), *short)))
    titles = Image.new('RGB', (margin, n * cell), 'white')
    draw = ImageDraw.Draw(titles)
    for i, name in enumerate(short):
        draw.text((margin - 4, i * cell + cell // 2), name, fill='black', anchor='rm', **font)
    sheet = Image.new('RGB', (margin + n * cell + 8, 8 + n * cell + margin), 'white')
    sheet.paste(titles, (0, 8))
    sheet.paste(titles.rotate(90, expand=True), (margin, 8 + n * cell))
    draw = ImageDraw.Draw(sheet)
    draw.text((margin - 4, n * cell + 14), corner, fill='gray', anchor='ra', align='right', **font)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            x, y, pale = margin + j * cell, 8 + i * cell, round(255 - 155 * count / max(1, sum(row)))
            fill = (pale, pale, 255) if i == j else (255, pale, pale)
            draw.rectangle((x, y, x + cell, y + cell), fill=fill, outline='lightgray')
            if count:
                draw.text((x + cell / 2, y + cell / 2), str(count), fill='black', anchor='mm', **font)
    with replace_file(file) as part:
        sheet.save(part, format='PNG')
