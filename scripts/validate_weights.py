"""Accuracy of every embedded weight on its whole test set, by timm's validate.py, in train and in fused form.

    TIMM_SCRIPTS=CHECKOUT python scripts/validate_weights.py DATA    # DATA as for --data-dir

Writes results/weights.csv.
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

import timm_finet  # noqa: F401 (registers the names)
from report import RESULTS, write_rows

DATASETS = {  # by tag; packs of photos.py stand in DATA under the tag's name
    'cifar10': ['--data-dir', 'DATA', '--dataset', 'torch/cifar10_pad2'],
    'cifar100': ['--data-dir', 'DATA', '--dataset', 'torch/cifar100_pad2'],
    'tiny_in200': ['--data-dir', 'DATA/tiny_in200', '--split', 'validation.tar'],
    'mini_in100': ['--data-dir', 'DATA/mini_in100', '--split', 'validation.tar'],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', help='folder of the data sets')
    args = parser.parse_args()
    rows = []
    for name in timm.list_models(module=['finet', 'resnet_fbn'], pretrained=True):
        for form in ('train', 'fused'):
            with tempfile.NamedTemporaryFile(suffix='.json') as report:
                command = [
                    'run', 'validate', '--model', name, '--pretrained', *DATASETS[name.split('.')[1]],
                    '--device', 'cuda' if torch.cuda.is_available() else 'cpu', '--workers', '1',
                    '--results-format', 'json', '--results-file', report.name, *(['--reparam'] if form == 'fused' else [])]
                local = [arg.replace('DATA', args.data) for arg in command]
                subprocess.run([sys.executable, '-m', 'timm_finet', *local], check=True)
                result = json.loads(Path(report.name).read_text())
            command = [arg for arg in command if arg not in ('--results-file', report.name, '--results-format', 'json')]
            rows.append(dict(
                model=name, form=form, top1=result['top1'], top5=result['top5'], params_millions=result['param_count'],
                command=shlex.join(['timm-finet', *command]), torch=torch.__version__, timm=timm.__version__,
                machine=platform.machine(), date=date.today()))
    write_rows(RESULTS / 'weights.csv', rows)


if __name__ == '__main__':
    main()
