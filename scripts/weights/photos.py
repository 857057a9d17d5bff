"""Pack photographs into one tar per split, which timm reads without unpacking, and check every image.

    python -m scripts.weights.photos SOURCE PACK
    timm-finet run train --data-dir PACK --train-split train.tar --val-split validation.tar ...

SOURCE holds the folders `train` and `val` at any depth, each with one folder of images per class, like ImageNet and
mini-ImageNet-100. Tiny-ImageNet-200 is read as its archive unpacks, with the validation labels in
`val/val_annotations.txt`.

PACK gets train.tar and validation.tar (the files as they were, in one folder per class), classes.txt (the folders in
the order of the class indices, with their names if they are ImageNet's synsets) and pack.csv (the counts).
"""
import hashlib
import io
import re
import tarfile
from collections import Counter
from datetime import date
from pathlib import Path

from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from tqdm import tqdm

from scripts.report import command_line, write_rows

SPLITS = {'train': 'train', 'val': 'validation'}


def find_images(source):
    """For each split, the paths of the images by their places in the pack, `CLASS/NAME`, in timm's order."""
    found, labels = {split: {} for split in SPLITS.values()}, {}
    for file in source.rglob('val/val_annotations.txt'):
        labels = dict(line.split('\t')[:2] for line in file.read_text().splitlines())
    for path in source.rglob('*'):
        parts = re.fullmatch(r'(?:.*/)?(train|val)/([^/]+)/(?:.*/)?([^/]+)', path.relative_to(source).as_posix())
        if parts and path.suffix.lower() in get_img_extensions():
            split, folder, name = parts.groups()
            images, place = found[SPLITS[split]], f'{labels.get(name, folder) if split == "val" else folder}/{name}'
            if place in images:
                raise ValueError(f'{path} and {images[place]} have the same class and name.')
            images[place] = path
    return {
        split: dict(sorted(images.items(), key=lambda item: natural_key(item[0]))) for split, images in found.items()}


def pack(images, read, file):
    """Write a split's tar and return its counts.

    Args:
        images: By an image's place in the tar, the argument with which `read` returns the image's bytes.
    """
    modes, sizes, names = Counter(), Counter(), hashlib.sha256()
    part = file.with_suffix('.part')
    try:
        with tarfile.open(part, 'w', format=tarfile.USTAR_FORMAT) as tar:
            for place, path in tqdm(images.items(), desc=file.stem, unit='image'):
                data = read(path)
                try:
                    with Image.open(io.BytesIO(data)) as image:
                        image.load()
                        modes[image.mode] += 1
                        sizes['x'.join(map(str, image.size))] += 1
                except (OSError, SyntaxError) as error:
                    raise ValueError(f'{path} is not an image that Pillow can read: {error}') from error
                names.update(f'{hashlib.sha256(data).hexdigest()}  {place}\n'.encode())
                info = tarfile.TarInfo(place)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    per_class = Counter(place.split('/')[0] for place in images)
    return {
        'images': len(images), 'classes': len(per_class),
        'per_class': ' to '.join(map(str, sorted({min(per_class.values()), max(per_class.values())}))),
        'sizes': ' '.join(f'{size}:{n}' for size, n in sizes.most_common()),
        'modes': ' '.join(f'{mode}:{n}' for mode, n in modes.most_common()), 'sha256_of_list': names.hexdigest()}


def main():
    parser = command_line(__doc__)
    parser.add_argument('source', type=Path)
    parser.add_argument('pack', type=Path)
    args = parser.parse_args()
    try:
        splits = find_images(args.source)
        folders, others = ({place.split('/')[0] for place in found} for found in splits.values())
        if not folders:
            raise ValueError(f'SOURCE={args.source} holds no folder `train` with one folder of images per class.')
        if folders != others:
            raise ValueError(
                f'SOURCE={args.source} must hold the same classes in train and val; these are in only one: '
                f"{', '.join(sorted(folders ^ others)[:5])}.")
        args.pack.mkdir(parents=True, exist_ok=True)
        rows = [
            dict(data=args.pack.name, split=split, **pack(found, Path.read_bytes, args.pack / f'{split}.tar'),
                 date=date.today()) for split, found in splits.items()]
    except (OSError, ValueError) as error:
        parser.exit(2, f'photos.py: {error}\n')
    info = ImageNetInfo()
    synsets = set(info.label_names())
    with open(args.pack / 'classes.txt', 'w') as file:
        for folder in sorted(folders, key=natural_key):  # the order of timm's class indices
            name = info.label_name_to_description(folder).split(',')[0] if folder in synsets else folder
            file.write(f'{folder}\t{name}\n')
    write_rows(args.pack / 'pack.csv', rows)


if __name__ == '__main__':
    main()
