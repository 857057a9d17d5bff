"""What int8 costs at each G: the finished runs of `evidence` on finet_small, exported to ONNX and quantised.

    python -m scripts.paper.int8_groups --data-dir DATA --output OUT    # OUT as cifar_tables.py had it
    python -m scripts.paper.int8_groups                                 # the table alone

The files are those of `timm-finet export --int8`, calibrated on 400 crops of training images, judged on all 10,000 test
images of CIFAR-100. Runs are added to results/int8_groups.csv, from which the table of docs/cifar.md is made.
"""
import argparse
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch
from timm.data import create_transform
from timm.utils import random_seed

from scripts.cifar_runs import PROTOCOLS, collect, folder
from scripts.paper.cifar_tables import BN, against_bn, mean_deviation, pm
from scripts.report import RESULTS, command, cpu_name, markdown, read_rows, write_block, write_rows
from scripts.weights.int8 import scores
from timm_finet.commands import export
from timm_finet.data import CIFAR100Pad2

FILE = RESULTS / 'int8_groups.csv'
SECTION = next(section for section in PROTOCOLS['evidence'] if section.name == 'small')
SEED = 0  # of the crops


def measure(name, run, args, scratch):
    setting, seed = run
    model = export.build(setting.model, str(folder(args.output, run) / 'last.pth.tar'))
    transform = create_transform(**export.make_config(setting.model, model))
    train, test = (CIFAR100Pad2(args.data_dir, split, transform) for split in (True, False))
    random_seed(SEED)
    calibration = torch.stack([train[i][0] for i in range(export.CALIBRATION)])
    x = torch.stack([image for image, _ in test])
    file = str(Path(scratch, 'model.onnx'))
    export.to_onnx(model, x[:1], file, calibration)
    return dict(
        groups=name, setting=str(setting), seed=seed, images=len(x),
        **scores(model, export.load_onnx(file), x, torch.tensor(test.targets)), device=cpu_name(),
        onnxruntime=version('onnxruntime'), torch=torch.__version__, timm=version('timm'), date=date.today(),
        command=command(DATA=args.data_dir, OUT=args.output))


def table(rows):
    """By G: accuracy in both precisions and the loss, which is compared with that of plain BN seed by seed."""
    losses = {name: {
        int(row['seed']): dict(top1_last=float(row['top1']) - float(row['top1_pytorch']))
        for row in rows if row['groups'] == name} for name in SECTION.rows}
    cells = []
    for name, mine in sorted(losses.items()):
        if mine:
            means = [mean_deviation([float(row[column]) for row in rows if row['groups'] == name])
                     for column in ('top1_pytorch', 'top1')]
            loss = [line['top1_last'] for line in mine.values()]
            cells.append([name, *(pm(*figure) for figure in (*means, mean_deviation(loss))),
                          ', '.join(f'{value:+.2f}' for value in loss), *against_bn(mine, losses[BN])])
    return markdown(['', 'float32', 'int8', 'int8 minus float32', 'every seed', 'minus BN ± standard error',
                     'p, paired by seed'], cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir')
    parser.add_argument('--output', help='folder of the runs')
    args = parser.parse_args()
    if bool(args.data_dir) != bool(args.output):
        parser.error('--data-dir and --output go together: give both, or neither for the table alone.')
    rows = read_rows(FILE) if FILE.exists() else []
    if args.data_dir:
        done = {(row['setting'], row['seed']) for row in rows}
        for name, setting in SECTION.rows.items():
            for seed in SECTION.seeds:
                if (str(setting), str(seed)) not in done and collect((setting, seed), args.output):
                    with tempfile.TemporaryDirectory() as scratch:
                        rows.append(measure(name, (setting, seed), args, scratch))
                    write_rows(FILE, rows)
                    print(f"{setting}, seed {seed}: {rows[-1]['top1_pytorch']} in float32, {rows[-1]['top1']} in int8")
    write_block('int8_groups', table(read_rows(FILE)))


if __name__ == '__main__':
    main()
