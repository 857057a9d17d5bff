"""The shipped CIFAR-10 images as WebDataset shards, to try timm's readers of sharded and streamed data on.

    python -m scripts.weights.write_shards FOLDER
"""
import argparse
import io
import json
import tarfile
from pathlib import Path

from timm_finet.images import shipped_images

SHARDS = {'train': 2, 'validation': 2}


def add(tar, name, content):
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = shipped_images()
    splits = {}
    for split, shards in SHARDS.items():
        mine = [i for i in range(len(labels)) if (i % 40 < 30) == (split == 'train')]
        names = [f'{split}-{shard:06}.tar' for shard in range(shards)]
        for shard, name in enumerate(names):
            with tarfile.open(folder / name, 'w') as tar:
                for i in mine[shard::shards]:
                    png = io.BytesIO()
                    images[i].save(png, 'PNG')
                    add(tar, f'{i:06}.png', png.getvalue())
                    add(tar, f'{i:06}.cls', str(labels[i]).encode())
        lengths = [len(mine[shard::shards]) for shard in range(shards)]
        splits[split] = dict(name=split, num_samples=len(mine), filenames=names, shard_lengths=lengths)
    (folder / '_info.json').write_text(json.dumps(dict(splits=splits), indent=1))
    print(f'wrote {folder}')


if __name__ == '__main__':
    main()
