"""What int8 costs in accuracy, on all 10,000 test images of CIFAR.

    python -m scripts.weights.int8 DATA               # embedded weights in both formats: results/int8.csv
    python -m scripts.weights.int8 DATA --runs OUT    # networks with several G: results/int8_groups.csv

The files are made as in `timm-finet export --int8`. Embedded weights are calibrated on the 100 shipped training images.
`--runs` takes the finished runs of `evidence` in the OUT of cifar_tables.py and calibrates them on 400 crops of
training images. DATA is as for cifar_tables.py.
"""
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from timm.data import create_transform
from timm.utils import random_seed

from scripts.paper.cifar_plan import PROTOCOLS
from scripts.paper.cifar_tables import BN, against_bn
from scripts.report import RESULTS, command_line, facts, markdown, merge_rows, pm, write_rows
from scripts.runs import collect, folder
from timm_finet.commands import export
from timm_finet.data import CIFAR10Pad2, CIFAR100Pad2

NAME = 'finet_small_g4.cifar10'
PACKAGE = {'onnx': 'onnxruntime', 'executorch': 'executorch'}
SECTION = next(section for section in PROTOCOLS['evidence'] if section.name == 'small')
SEED = 0  # for the crops


def scores(model, run, data):
    """Top-1 in per cent of a fused network and of its file, `run`, and how far they agree."""
    x, targets = torch.stack([image for image, _ in data]), torch.tensor(data.targets)
    expected, got = export.compare(model, run, x, batch=1)
    right, same = (expected.argmax(1) == targets, got.argmax(1) == targets), expected.argmax(1) == got.argmax(1)
    top1_pytorch, top1, same_top1 = (round(share.double().mean().item() * 100, 2) for share in (*right, same))
    return dict(
        images=len(x), top1_pytorch=top1_pytorch, top1=top1, same_top1=same_top1,
        largest_difference=f'{(expected - got).abs().max().item():.2g}')


def measure_formats(root, scratch):
    model = export.build(NAME)
    data = CIFAR10Pad2(root, train=False, transform=create_transform(**export.make_config(NAME, model)))
    for to, suffix in export.SUFFIXES.items():
        for precision in ('float32', 'int8'):
            file = f'{scratch}/model{suffix}'
            export.export(NAME, to, file, precision == 'int8')
            yield dict(
                model=NAME, to=to, precision=precision, **scores(model, export.LOAD[to](file), data),
                bytes=Path(file).stat().st_size, runtime_version=version(PACKAGE[to]), **facts(DATA=root))


def measure_groups(root, output, scratch):
    for name, setting in SECTION.rows.items():
        network = setting.args[setting.args.index('--model') + 1]
        for seed in filter(lambda seed: collect((setting, seed), output), SECTION.seeds):
            model = export.build(network, str(folder(output, (setting, seed)) / 'last.pth.tar'))
            transform = create_transform(**export.make_config(network, model))
            train, test = (CIFAR100Pad2(root, split, transform) for split in (True, False))
            random_seed(SEED)
            calibration = torch.stack([train[i][0] for i in range(export.CALIBRATION)])
            file = f'{scratch}/model.onnx'
            export.to_onnx(model, calibration[:1], file, calibration)
            yield dict(
                groups=name, setting=setting.name, seed=seed, **scores(model, export.load_onnx(file), test),
                onnxruntime=version('onnxruntime'), **facts(DATA=root, OUT=output))


def table(rows):
    return markdown(
        ('', '', 'top-1', "same top-1 as PyTorch's float32", 'largest difference of the logits', 'MiB'),
        [(row['to'], row['precision'], row['top1'], row['same_top1'], row['largest_difference'],
          f"{int(row['bytes']) / 2 ** 20:.2f}") for row in rows])


def table_of_groups(rows):
    """Accuracy by G in both precisions, and its loss, which is compared with that of plain BN seed by seed."""
    losses = {name: {
        int(row['seed']): dict(top1_last=float(row['top1']) - float(row['top1_pytorch']))
        for row in rows if row['groups'] == name} for name in SECTION.rows}
    cells = []
    for name, mine in sorted(losses.items()):
        if mine:
            float32, int8 = ([float(row[column]) for row in rows if row['groups'] == name]
                             for column in ('top1_pytorch', 'top1'))
            loss = [line['top1_last'] for line in mine.values()]
            cells.append([name, pm(float32), pm(int8), pm(loss), ', '.join(f'{value:+.2f}' for value in loss),
                          *against_bn(mine, losses[BN])])
    return markdown(['', 'float32', 'int8', 'int8 minus float32', 'every seed', 'minus BN ± standard error',
                     'p, paired by seed'], cells)


def main():
    parser = command_line(__doc__)
    parser.add_argument('data')
    parser.add_argument('--runs', metavar='OUT')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.runs:
            rows = list(measure_groups(args.data, args.runs, scratch))
            merge_rows(RESULTS / 'int8_groups.csv', rows, ('setting', 'seed'))
        else:
            write_rows(RESULTS / 'int8.csv', list(measure_formats(args.data, scratch)))


if __name__ == '__main__':
    main()
