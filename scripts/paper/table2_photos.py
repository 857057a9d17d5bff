"""Table 2's comparison on photographs: every network from scratch on Tiny-ImageNet-200 under recipe:tiny_in200.

    python -m scripts.paper.table2_photos --data-dir PACK [--models finet_small mobilenetv2_035] [--seeds 0 1]

PACK is written by scripts/weights/photos.py. The runs that the results lack are started; cut off, by `--minutes` or
otherwise, they go on when started again with the same `--output`. Every finished run adds a line to
results/table2_photos.csv, out of which the table of docs/photographs.md is written, without `--data-dir` that alone.
Options that are not ours go to train.py, which makes another experiment: it needs a `--results` of its own, and its
table is printed.
"""
import argparse
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import timm

from scripts.cifar_runs import train
from scripts.paper import shufflenet, table2  # noqa: F401 (the first registers two networks)
from scripts.paper.cifar_tables import commit, mean_deviation, pm, top1
from scripts.report import RESULTS, markdown, read_rows, write_block
from timm_finet import fuse_fbn
from timm_finet.flops import count_flops

CSV = RESULTS / 'table2_photos.csv'
CLASSES, SIZE = 200, 128
PAPER = {name.removeprefix('torchvision:'): accuracy for name, (_, _, accuracy) in table2.PAPER.items()}  # on ImageNet


class Setting(NamedTuple):
    """What cifar_runs.train asks of a row of the table."""
    model: str
    processes = 1

    @property
    def module(self):
        return 'scripts.paper.shufflenet' if self.model.startswith('shufflenet') else ''

    def __str__(self):
        return f'tiny_in200 {self.model}'

    def args(self, seed):
        modules = ['--device-modules', 'timm_finet', self.module] if self.module else []
        return ['--config', 'recipe:tiny_in200', '--model', self.model, *modules, '--seed', str(seed)]


def rows_of(file):
    return read_rows(file) if file.exists() else []


def arguments(description, results):
    """What cifar_runs.train takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--data-dir')
    parser.add_argument(
        '--output', default=f'output/{results.stem}', help='folder for checkpoints and logs, kept until all is done')
    parser.add_argument('--jobs', type=int, default=1, help='runs at once (default: %(default)s)')
    parser.add_argument(
        '--minutes', type=float, default=float('inf'), help='time after which runs are cut (default: none)')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--commit', default=commit(), help='for a copy of the repository that has no history')
    parser.add_argument('--results', type=Path, default=results)
    return parser


def parse(parser, results):
    args, args.extra = parser.parse_known_args()
    if args.extra and args.results == results:
        parser.error(
            f'{shlex.join(args.extra)!r} for train.py makes another experiment: name a file for it by --results.')
    return args


def run(settings, args, parser):
    """Start the runs that the results lack, seed by seed."""
    done = {(row['setting'], row['seed']) for row in rows_of(args.results)}
    runs = [(setting, seed) for seed in args.seeds for setting in settings if (str(setting), str(seed)) not in done]
    try:
        failed = train(runs, args)
    except ValueError as error:
        parser.error(error)
    if failed:
        sys.exit(f'{len(failed)} of {len(runs)} runs failed.')


def count(name):
    """Parameters of the train form and multiply-adds of the fused one."""
    model = timm.create_model(name, num_classes=CLASSES).eval()
    params = sum(p.numel() for p in model.parameters())
    counts = count_flops(fuse_fbn(model) if name.startswith('finet') else model, (3, SIZE, SIZE))
    return params, counts['conv'] + counts['linear']


def table(rows):
    if not rows:
        return ''
    cells = []
    for name, figure in PAPER.items():
        mine = [row for row in rows if row['setting'] == str(Setting(name))]
        if mine:
            params, macs = count(name)
            cells.append([
                f'`{name}`', f'{params:,}', f'{macs:,}',
                pm(*mean_deviation([float(row['seconds_an_epoch']) for row in mine])),
                pm(*mean_deviation(top1(mine))), pm(*mean_deviation(top1(mine, 'top1_best'))),
                ', '.join(row['seed'] for row in mine), f'{figure:.1f}'])
    return markdown(
        ['', 'parameters', f'multiply-adds at {SIZE} px', 'seconds an epoch', 'top-1, last epoch', 'best epoch',
         'seeds',
         "paper's top-1 on ImageNet"], cells)


def main():
    parser = arguments(__doc__.splitlines()[0], CSV)
    parser.add_argument('--models', nargs='+', default=list(PAPER), choices=list(PAPER), metavar='NAME')
    args = parse(parser, CSV)
    if args.data_dir:
        run([Setting(name) for name in args.models], args, parser)
    text = table(rows_of(args.results))
    if args.results == CSV:
        write_block('table2_photos', text)
    else:
        print(text)


if __name__ == '__main__':
    main()
