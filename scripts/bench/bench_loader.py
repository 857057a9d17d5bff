"""Images per second of the CIFAR loader in one worker, beside the networks' own training speed.

    python -m scripts.bench.bench_loader

The loaders are timm's, as train.py makes them from `recipe:cifar10` and `recipe:modern`, over 12,800 random images. A
network's step is forward, cross entropy, backward and SGD at the batch size of `recipe:cifar10`. Loaders and networks
take turns in one thread. A loader worker is a process with one such thread, so figures for sixteen workers are
extrapolated, not measured. This writes results/bench_loader.csv.
"""
import tempfile
from argparse import Namespace
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
import torch.nn.functional as F
import yaml
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2, optimizer_kwargs

from scripts.report import RESULTS, command_line, facts, write_rows
from scripts.timing import in_turns
from timm_finet.commands.run import find_recipe

RECIPES = ('cifar10', 'modern')
MODELS = ('finet_small_g4', 'finet_large_g8')
IMAGES, ROUNDS, SEED = 12800, 7, 0


def recipe(name):
    return Namespace(**{'aa': None, **yaml.safe_load(Path(find_recipe(f'recipe:{name}')).read_text())})


def loader(args, folder):
    """A function that does a worker's part: read, augment and collate. The training process normalises."""
    loader = create_loader(
        create_dataset(args.dataset, root=folder, split='train'), args.input_size, args.batch_size, is_training=True,
        scale=args.scale, ratio=args.ratio, hflip=args.hflip, color_jitter=args.color_jitter, auto_augment=args.aa,
        interpolation=args.train_interpolation, mean=args.mean, std=args.std, num_workers=0, device=torch.device('cpu'))
    return lambda: [None for _ in loader.loader]


def trainer(name, args):
    model = timm.create_model(name, num_classes=10, small_input=True, drop_rate=args.drop)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    x, labels = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))

    def train():
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return train


def main():
    command_line(__doc__).parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as folder:
        images, labels = rng.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, IMAGES)
        np.savez(Path(folder, 'cifar10.npz'), train=images, train_labels=labels)
        runs = {f'loader of recipe:{name}': loader(recipe(name), folder) for name in RECIPES}
    runs.update({f'training step of {name}': trainer(name, recipe('cifar10')) for name in MODELS})
    rows = []
    for subject, times in in_turns(runs, ROUNDS).items():
        images = IMAGES if subject.startswith('loader') else recipe('cifar10').batch_size
        rows.append(dict(
            subject=subject, images_per_second=round(images / median(times)), lowest=round(images / max(times)),
            highest=round(images / min(times)), threads=1, workers='in the process', rounds=ROUNDS, seed=SEED,
            **facts()))
    write_rows(RESULTS / 'bench_loader.csv', rows)


if __name__ == '__main__':
    main()
