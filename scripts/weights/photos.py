"""Pack photographs into one tar a split, which timm reads as it lies, and check every image on the way.

    python -m scripts.weights.photos SOURCE PACK                           # --classes 5 --per-class 20 for a tiny one
    timm-finet run train --data-dir PACK --train-split train.tar --val-split validation.tar ...

SOURCE, a folder or a bare git repository, holds the folders `train` and `val` at any depth, with a folder of images a
class: ImageNet's own layout and mini-ImageNet-100's. Tiny-ImageNet-200 is taken as its archive unpacks, with the
validation labels in `val/val_annotations.txt`.

PACK gets train.tar, validation.tar (images byte by byte as they were, in a folder a class), classes.txt (the folders,
in the order of the class indices, and their names where they are ImageNet's synsets) and pack.csv (the counts).
"""
import argparse
import hashlib
import io
import re
import subprocess
import tarfile
from collections import Counter
from datetime import date
from pathlib import Path

from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from tqdm import tqdm

from scripts.report import write_rows

SPLITS = {'train': 'train', 'val': 'validation'}


def open_source(source):
    """The version of a folder or bare git repository, the paths of its files, and a function that reads one."""
    if not (source / 'HEAD').is_file():
        return '', [path.relative_to(source).as_posix() for path in source.rglob('*') if path.is_file()], (
            lambda path: (source / path).read_bytes())
    git = ['git', f'--git-dir={source}']
    commit = subprocess.run([*git, 'rev-parse', 'HEAD'], check=True, capture_output=True, text=True).stdout.strip()
    tree = subprocess.run([*git, 'ls-tree', '-r', '-z', commit], check=True, capture_output=True, text=True).stdout
    blobs = {path: line.split()[2] for line, path in (entry.split('\t') for entry in tree.split('\0')[:-1])}
    cat = subprocess.Popen([*git, 'cat-file', '--batch'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read(path):
        cat.stdin.write(f'{blobs[path]}\n'.encode())
        cat.stdin.flush()
        header = cat.stdout.readline().decode().split()
        if header[1] != 'blob':
            raise FileNotFoundError(f'{path} is listed in {source} but absent.')
        return cat.stdout.read(int(header[2]) + 1)[:-1]

    return commit, list(blobs), read


def find_images(paths, read):
    """Of each split, the path of every image by its place in the pack, `CLASS/NAME`, in the order timm reads them."""
    found, labels = {split: {} for split in SPLITS.values()}, {}
    for path in paths:
        if path.endswith('val/val_annotations.txt'):
            labels = dict(line.split('\t')[:2] for line in read(path).decode().splitlines())
    for path in paths:
        place = re.fullmatch(r'(?:.*/)?(train|val)/([^/]+)/(?:.*/)?([^/]+)', path)
        if place and Path(path).suffix.lower() in get_img_extensions():
            split, folder, name = place.groups()
            place = f'{labels.get(name, folder) if split == "val" else folder}/{name}'
            if place in found[SPLITS[split]]:
                raise ValueError(f'{path} and {found[SPLITS[split]][place]} have the same class and name.')
            found[SPLITS[split]][place] = path
    return {
        split: dict(sorted(images.items(), key=lambda item: natural_key(item[0]))) for split, images in found.items()}


def limit(images, classes, per_class):
    """The first images of the first classes."""
    counts = Counter()
    kept = {}
    for place, path in images.items():
        name = place.split('/')[0]
        if counts[name] < per_class and (name in counts or len(counts) < classes):
            counts[name] += 1
            kept[place] = path
    return kept


def pack(images, read, file):
    """Write a split's tar and return its counts."""
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('source', type=Path)
    parser.add_argument('pack', type=Path)
    parser.add_argument('--classes', type=int, default=10**9, metavar='N', help='the first N alone')
    parser.add_argument(
        '--per-class', type=int, default=10**9, metavar='N', help='the first N images of each, in both splits')
    args = parser.parse_args()
    try:
        version, paths, read = open_source(args.source)
        found = find_images(paths, read)
        splits = {split: limit(images, args.classes, args.per_class) for split, images in found.items()}
        folders, others = ({place.split('/')[0] for place in found} for found in splits.values())
        if not folders:
            raise ValueError(f'SOURCE={args.source} holds no folder `train` with a folder of images a class.')
        if folders != others:
            raise ValueError(
                f'SOURCE={args.source} must hold the same classes in train and val; in one alone: '
                f"{', '.join(sorted(folders ^ others)[:5])}.")
        folders = sorted(folders, key=natural_key)  # timm's class indices
        args.pack.mkdir(parents=True, exist_ok=True)
        rows = [
            dict(data=args.pack.name, version=version, split=split, **pack(found, read, args.pack / f'{split}.tar'),
                 date=date.today()) for split, found in splits.items()]
    except (OSError, ValueError) as error:
        parser.exit(2, f'photos.py: {error}\n')
    info = ImageNetInfo()
    known = set(info.label_names())
    names = [info.label_name_to_description(name).split(',')[0] if name in known else name for name in folders]
    (args.pack / 'classes.txt').write_text(''.join(f'{folder}\t{name}\n' for folder, name in zip(folders, names)))
    write_rows(args.pack / 'pack.csv', rows)
    for row in rows:
        print(*(f'{key}={value}' for key, value in row.items()))


if __name__ == '__main__':
    main()
