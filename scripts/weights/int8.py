"""What int8 costs in accuracy: exported files in float32 and int8 on all 10,000 test images of CIFAR-10.

    python -m scripts.weights.int8 cifar10.npz

The files are those of `timm-finet export`, calibrated on the 100 shipped training images. Writes results/int8.csv and
the table of docs/export.md.
"""
import argparse
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from timm.data import create_transform
from tqdm import tqdm

from scripts.report import RESULTS, command, markdown, read_rows, write_block, write_rows
from timm_finet.commands import export
from timm_finet.data import CIFAR10Pad2

NAME = 'finet_small_g4.cifar10'
PACKAGE = {'onnx': 'onnxruntime', 'executorch': 'executorch'}
FILE = RESULTS / 'int8.csv'


def scores(model, run, x, targets):
    """Top-1 in per cent of a fused network and of its file, `run`, and how far they agree."""
    expected, got = export.compare(model, run, x)
    right, same = (expected.argmax(1) == targets, got.argmax(1) == targets), expected.argmax(1) == got.argmax(1)
    top1_pytorch, top1, same_top1 = (round(share.double().mean().item() * 100, 2) for share in (*right, same))
    return dict(
        top1_pytorch=top1_pytorch, top1=top1, same_top1=same_top1,
        largest_difference=f'{(expected - got).abs().max().item():.2g}')


def measure(data_dir, folder):
    model = export.build(NAME)
    data = CIFAR10Pad2(data_dir, train=False, transform=create_transform(**export.make_config(NAME, model)))
    x = torch.stack([image for image, _ in tqdm(data)])
    targets = torch.tensor(data.targets)
    for to in export.SUFFIXES:
        for int8 in (False, True):
            file = str(Path(folder) / f'model{export.SUFFIXES[to]}')
            export.export(NAME, to, file, int8)
            yield dict(
                model=NAME, to=to, precision='int8' if int8 else 'float32', images=len(x),
                **scores(model, export.LOAD[to](file), x, targets), bytes=Path(file).stat().st_size,
                runtime_version=version(PACKAGE[to]), torch=torch.__version__, timm=version('timm'), date=date.today(),
                command=command(DATA=data_dir))


def table(rows):
    return markdown(
        ('', '', 'top-1', "same top-1 as PyTorch's float32", 'largest difference of the logits', 'MiB'),
        [(row['to'], row['precision'], row['top1'], row['same_top1'], row['largest_difference'],
          f"{int(row['bytes']) / 2 ** 20:.2f}") for row in rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='cifar10.npz, or a folder as for --data-dir of torch/cifar10_pad2')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_rows(FILE, list(measure(args.data, folder)))
    write_block('int8', table(read_rows(FILE)))


if __name__ == '__main__':
    main()
