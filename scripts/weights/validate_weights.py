"""Measure the accuracy of all embedded weights with timm's validate.py, in train and in fused form.

This uses all test images of CIFAR, and all validation images of the other data sets.

    TIMM_SCRIPTS=CHECKOUT python -m scripts.weights.validate_weights DATA    # DATA as for --data-dir

Writes results/weights.csv. With `--models`, only the rows of these are measured and replaced.
"""
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

from scripts.report import RESULTS, command_line, markdown, merge_rows
from timm_finet import count_flops, fuse_fbn
from timm_finet.hub.pretrained import MODULES

NAMES = timm.list_models(module=MODULES, pretrained=True)
DATASETS = {  # by tag; a pack of photos.py is in DATA under the tag's name
    'cifar10': ['--data-dir', 'DATA', '--dataset', 'torch/cifar10_pad2'],
    'cifar100': ['--data-dir', 'DATA', '--dataset', 'torch/cifar100_pad2'],
    'tiny_in200': ['--data-dir', 'DATA/tiny_in200', '--split', 'validation.tar'],
}


def validate(*options):
    """Run timm's validate.py and return its report on a network."""
    with tempfile.NamedTemporaryFile(suffix='.json') as report:
        subprocess.run([
            sys.executable, '-m', 'timm_finet', 'run', 'validate', *options, '--results-format', 'json',
            '--results-file', report.name], check=True)
        return json.loads(Path(report.name).read_text())


def measure(data, name):
    for form in ('train', 'fused'):
        options = ['--model', name, '--pretrained', *DATASETS[name.split('.')[1]],
                   '--device', 'cuda' if torch.cuda.is_available() else 'cpu', '--workers', '1']
        options += ['--reparam'] if form == 'fused' else []
        result = validate(*(option.replace('DATA', data) for option in options))
        yield dict(
            model=name, form=form, top1=result['top1'], top5=result['top5'], img_size=result['img_size'],
            **count(name, form, result['img_size']), command=shlex.join(['timm-finet', 'run', 'validate', *options]),
            torch=torch.__version__, timm=timm.__version__, machine=platform.machine(), date=date.today())


def count(name, form, size):
    """Parameters and multiply-adds at `size` pixels."""
    model = timm.create_model(name, num_classes=timm.get_pretrained_cfg(name).num_classes).eval()
    counts = count_flops(fuse_fbn(model) if form == 'fused' else model, (3, size, size))
    return dict(params=counts['params'], madds=counts['conv'] + counts['linear'])


def table(rows, speeds):
    """Accuracy in both forms, size and speed of the fused form."""
    found = {(row['model'], row['form']): row for row in rows}
    speed = {(row['model'], row['form']): row['images_per_second'] for row in speeds}
    cells = []
    for name in dict.fromkeys(row['model'] for row in rows):
        train, fused = found[name, 'train'], found[name, 'fused']
        classes = timm.get_pretrained_cfg(name).num_classes
        top1 = train['top1'] if train['top1'] == fused['top1'] else f"{train['top1']} ({fused['top1']} fused)"
        cells.append([
            f'`{name}`', f"{classes}, {fused['img_size']} px", top1, f"{int(fused['params']):,}",
            f"{int(fused['madds']):,}", speed.get((name, 'fused'), '')])
    return markdown(['', 'classes, input', 'top-1', 'parameters', 'multiply-adds', 'images/s'], cells)


def main():
    parser = command_line(__doc__)
    parser.add_argument('data', help='folder of the data sets')
    parser.add_argument('--models', nargs='+', default=NAMES, choices=NAMES, metavar='MODEL.TAG')
    args = parser.parse_args()
    for name in args.models:
        merge_rows(RESULTS / 'weights.csv', list(measure(args.data, name)), ('model', 'form'))


if __name__ == '__main__':
    main()
