"""Accuracy of every embedded weight by timm's validate.py, in train and in fused form.

All test images of CIFAR, all validation images of the others, are judged.

    TIMM_SCRIPTS=CHECKOUT python -m scripts.weights.validate_weights DATA    # DATA as for --data-dir

Writes results/weights.csv and the README's table. `--models` measures those alone, and the others stand.
"""
import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import timm
import torch

from scripts.report import RESULTS, markdown, read_rows, write_block, write_rows
from timm_finet import count_flops, fuse_fbn
from timm_finet.hub.pretrained import MODULES

FILE = RESULTS / 'weights.csv'
DATASETS = {  # by tag; packs of photos.py stand in DATA under the tag's name
    'cifar10': ['--data-dir', 'DATA', '--dataset', 'torch/cifar10_pad2'],
    'cifar100': ['--data-dir', 'DATA', '--dataset', 'torch/cifar100_pad2'],
    'tiny_in200': ['--data-dir', 'DATA/tiny_in200', '--split', 'validation.tar'],
    'mini_in100': ['--data-dir', 'DATA/mini_in100', '--split', 'validation.tar'],
}


def measure(data, names):
    for name in names:
        for form in ('train', 'fused'):
            with tempfile.NamedTemporaryFile(suffix='.json') as report:
                command = [
                    'run', 'validate', '--model', name, '--pretrained', *DATASETS[name.split('.')[1]],
                    '--device', 'cuda' if torch.cuda.is_available() else 'cpu', '--workers', '1',
                    '--results-format', 'json', '--results-file', report.name,
                    *(['--reparam'] if form == 'fused' else [])]
                local = [arg.replace('DATA', data) for arg in command]
                subprocess.run([sys.executable, '-m', 'timm_finet', *local], check=True)
                result = json.loads(Path(report.name).read_text())
            command = [arg for arg in command if arg not in ('--results-file', report.name, '--results-format', 'json')]
            yield dict(
                model=name, form=form, top1=result['top1'], top5=result['top5'], img_size=result['img_size'],
                params_millions=result['param_count'],
                command=shlex.join(['timm-finet', *command]), torch=torch.__version__, timm=timm.__version__,
                machine=platform.machine(), date=date.today())


def table(rows, speeds):
    """Accuracy in both forms, size and speed of the fused form."""
    cells = []
    for name in dict.fromkeys(row['model'] for row in rows):
        train, fused = (
            next(row for row in rows if row['model'] == name and row['form'] == form) for form in ('train', 'fused'))
        cfg = timm.get_pretrained_cfg(name)
        size = int(fused['img_size'])
        counts = count_flops(fuse_fbn(timm.create_model(name, num_classes=cfg.num_classes).eval()), (3, size, size))
        speed = next(
            (row['images_per_second'] for row in speeds if (row['model'], row['form']) == (name, 'fused')), '')
        top1 = train['top1'] if train['top1'] == fused['top1'] else f"{train['top1']} ({fused['top1']} fused)"
        cells.append([
            f'`{name}`', f'{cfg.num_classes}, {size} px', top1, f"{counts['params']:,}",
            f"{counts['conv'] + counts['linear']:,}", speed])
    return markdown(['', 'classes, input', 'top-1', 'parameters', 'multiply-adds', 'images/s'], cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='?', help='folder of the data sets; without it the table alone is written')
    names = timm.list_models(module=MODULES, pretrained=True)
    parser.add_argument('--models', nargs='+', default=names, choices=names, metavar='MODEL.TAG')
    args = parser.parse_args()
    if args.data:
        others = [row for row in read_rows(FILE) if row['model'] in {*names} - {*args.models}]
        rows = [*others, *measure(args.data, args.models)]
        write_rows(FILE, sorted(rows, key=lambda row: names.index(row['model'])))
    write_block('weights', table(read_rows(FILE), read_rows(RESULTS / 'weights_speed.csv')))


if __name__ == '__main__':
    main()
