"""Images: those shipped with the package, those at a path, and sheets of them."""
from pathlib import Path
from typing import List, Sequence, Tuple

from PIL import Image, ImageDraw, ImageOps

from .output import replace_file

__all__ = ['contact_sheet', 'find_images', 'read_images', 'shipped_images']

# Tiles of 32 px, class by class: 40 a class, and 10 a class
IMAGES = Path(__file__).parent / 'weights' / 'cifar10_test.webp'
TRAINING_IMAGES = Path(__file__).parent / 'weights' / 'cifar10_train.webp'


def shipped_images(file: Path = IMAGES) -> Tuple[List[Image.Image], List[int]]:
    """The 400 shipped CIFAR-10 test images, or the 100 of the training set, and their labels."""
    with Image.open(file) as sprite:
        sprite = sprite.convert('RGB')
    tiles = [
        sprite.crop((x, y, x + 32, y + 32)) for y in range(0, sprite.height, 32) for x in range(0, sprite.width, 32)]
    return tiles, [10 * i // len(tiles) for i in range(len(tiles))]


def find_images(paths: Sequence[str]) -> List[Path]:
    """Image files, and all files in folders and the folders in these, but for hidden ones.

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


def read_images(files: Sequence[Path]) -> List[Image.Image]:
    """Read image files.

    Raises:
        ValueError: A file is no image, or has too many pixels.
        FileNotFoundError: There is no such file.
    """
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(image.convert('RGB'))
        except FileNotFoundError as error:
            raise FileNotFoundError(f'{file} does not exist: give images, or folders that hold some.') from error
        except Image.DecompressionBombError as error:
            raise ValueError(f'{file} has more pixels than Pillow takes for safe: give a smaller image.') from error
        except (SyntaxError, OSError) as error:  # UnidentifiedImageError is an OSError
            raise ValueError(f'{file} is not an image that Pillow can read.') from error
    return images


def contact_sheet(
        images: Sequence[Image.Image], names: Sequence[str], right: Sequence[bool], file: str, size: int = 64,
) -> None:
    """Draw images, cut to squares, with their names, all of as many lines, below them; in red where not right."""
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
