"""Find, check, split and link folders of images, one per class."""
import random
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from timm.data import create_dataset
from tqdm import tqdm

from ..images import read_image

__all__ = ['find_images', 'hold_out', 'link']

HELD_OUT = 5  # one image in HELD_OUT is for validation, if the folder is not split

Classes = Dict[str, List[Path]]


def find_classes(root: Path) -> Classes:
    """The images of each class folder in `root`, in order."""
    folder = f'FOLDER={str(root)!r}'
    classes = {path: [] for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != '.'}
    if len(classes) < 2:
        raise ValueError(
            f'{folder} has {len(classes)} class folders: give a folder with two or more, as FOLDER/CLASS/*.jpg.')
    try:
        files = create_dataset('', str(root), search_split=False).filenames(absolute=True)
    except RuntimeError:  # no images
        files = []
    for file in map(Path, files):
        if file.parent not in classes:  # timm would make its folder another class
            raise ValueError(f'{folder} has {file} outside of a class folder: move it to FOLDER/CLASS/{file.name}.')
        classes[file.parent].append(file)
    for path, images in classes.items():
        if not images:
            raise ValueError(f'{folder} has no images in {path.name!r}: add some, as .jpg or .png, or remove it.')
    return {path.name: images for path, images in classes.items()}


def find_images(source: Path) -> Tuple[Classes, Optional[Classes]]:
    """Training images and, if the folder is split, validation images, else None.

    Every image is read once, to check it.

    Raises:
        FileNotFoundError, ValueError: There is no such folder, or something in it cannot be used.
    """
    folder, validation = f'FOLDER={str(source)!r}', None
    if not source.is_dir():
        found = 'is a file' if source.exists() else 'does not exist'
        raise FileNotFoundError(f'{folder} {found}: give a folder with one folder of images per class.')
    root = source / 'train'
    if not root.is_dir() or not any(path.is_dir() for path in root.iterdir()):  # a class may be called train
        root = source
    training = find_classes(root)
    apart = [path for path in (source / 'validation', source / 'val', source / 'valid') if path.is_dir()]
    if root != source and apart:
        validation = find_classes(apart[0])
        odd = sorted(training.keys() ^ validation)
        if odd:
            raise ValueError(
                f'{folder} has {odd[0]!r} in only one of train and {apart[0].name}: both need all classes.')
    else:
        for name, images in training.items():
            if len(images) == 1:
                raise ValueError(f'{folder} has only one image in {name!r}: give two, as one is for validation.')
    files = sum([*training.values(), *(validation or {}).values()], [])
    with tqdm(files, 'check images', unit='image', leave=False, disable=None) as bar:  # cleared after errors too
        for file in bar:
            try:
                read_image(file)
            except (OSError, ValueError) as error:
                raise ValueError(f'{folder}: {error} Repair or remove it.') from error
    return training, validation


def hold_out(classes: Classes) -> Tuple[Classes, Classes]:
    """Split each class into training and validation images, always in the same way."""
    training, held = {}, {}
    for name, images in classes.items():
        held[name] = random.Random(0).sample(images, max(1, len(images) // HELD_OUT))
        training[name] = [file for file in images if file not in held[name]]
    return training, held


def link(splits: Dict[str, Classes], folder: Path) -> None:
    """Link the images as `folder`/SPLIT/CLASS/IMAGE, where timm reads them; the images themselves are not moved."""
    for split, classes in splits.items():
        for name, images in classes.items():
            (folder / split / name).mkdir(parents=True)
            for file in images:
                (folder / split / name / file.name).symlink_to(file)
