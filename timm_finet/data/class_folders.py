"""Folders of images, one a class: found, tried, split and linked."""
import random
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from timm.data import create_dataset
from tqdm import tqdm

from ..images import read_image

__all__ = ['find_images', 'hold_out', 'link']

HELD_OUT = 5  # one image in as many is for validation, where the folder does not tell

Classes = Dict[str, List[Path]]


def find_classes(root: Path) -> Classes:
    """The images of each class folder in `root`, in order.

    Raises:
        ValueError: There are no two classes, or images in no class folder, or a class without images.
    """
    folder = f'FOLDER={str(root)!r}'
    classes = {path: [] for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != '.'}
    if len(classes) < 2:
        raise ValueError(f'{folder} has {len(classes)} class folders: give one with two or more, FOLDER/CLASS/*.jpg.')
    try:
        files = create_dataset('', str(root), search_split=False).filenames(absolute=True)
    except RuntimeError:  # there are none
        files = []
    for file in map(Path, files):
        if file.parent not in classes:  # timm would make another class of its folder
            raise ValueError(f'{folder} has {file} outside of a class folder: move it to FOLDER/CLASS/{file.name}.')
        classes[file.parent].append(file)
    for path, images in classes.items():
        if not images:
            raise ValueError(f'{folder} has no images in {path.name!r}: add some, as .jpg or .png, or remove it.')
    return {path.name: images for path, images in classes.items()}


def find_images(source: Path) -> Tuple[Classes, Optional[Classes]]:
    """The images to train on, and to validate on where the folder has these apart; all are tried.

    Raises:
        FileNotFoundError, ValueError: There is no such folder, or something in it cannot be used.
    """
    folder, validation = f'FOLDER={str(source)!r}', None
    if not source.is_dir():
        found = 'is a file' if source.exists() else 'does not exist'
        raise FileNotFoundError(f'{folder} {found}: give a folder with a folder of images a class.')
    root = source / 'train'
    if not root.is_dir() or not any(path.is_dir() for path in root.iterdir()):  # it may be a class, of railways
        root = source
    training = find_classes(root)
    apart = [path for path in (source / 'validation', source / 'val', source / 'valid') if path.is_dir()]
    if root != source and apart:
        validation = find_classes(apart[0])
        odd = sorted(training.keys() ^ validation)
        if odd:
            raise ValueError(
                f'{folder} has {odd[0]!r} in one of train and {apart[0].name} alone: both need all classes.')
    else:
        for name, images in training.items():
            if len(images) == 1:
                raise ValueError(f'{folder} has one image in {name!r}: two are needed, one of them for validation.')
    files = sum([*training.values(), *(validation or {}).values()], [])
    with tqdm(files, 'try images', unit='image', leave=False, disable=None) as bar:  # an error too clears the bar
        for file in bar:
            try:
                read_image(file)
            except (OSError, ValueError) as error:
                raise ValueError(f'{folder}: {error} Repair or remove it.') from error
    return training, validation


def hold_out(classes: Classes) -> Tuple[Classes, Classes]:
    """Split each class, always alike: images to train on, and to validate on."""
    training, held = {}, {}
    for name, images in classes.items():
        held[name] = random.Random(0).sample(images, max(1, len(images) // HELD_OUT))
        training[name] = [file for file in images if file not in held[name]]
    return training, held


def link(splits: Dict[str, Classes], folder: Path) -> None:
    """Make `folder`/SPLIT/CLASS/IMAGE, links to the images: these stay where they are, and timm reads them so."""
    for split, classes in splits.items():
        for name, images in classes.items():
            (folder / split / name).mkdir(parents=True)
            for file in images:
                (folder / split / name / file.name).symlink_to(file)
