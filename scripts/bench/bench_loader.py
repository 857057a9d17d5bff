"""Images a second of the CIFAR loader of `recipe:cifar10` in one worker, beside the networks' own training speed.

    python -m scripts.bench.bench_loader

The loader is timm's, as train.py makes it from the recipe, over 12,800 random images. A network's step is forward,
cross entropy, backward and SGD at the recipe's batch size. Loader and networks take turns in one thread. A loader
worker is one process with such a thread, so sixteen of them are extrapolated, not measured. Writes
results/bench_loader.csv.
"""
import argparse
import csv
import tempfile
import time
from argparse import Namespace
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
import yaml
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2, optimizer_kwargs

from scripts.report import cpu_name
from timm_finet.commands.run import find_recipe

RESULTS = Path(__file__).parents[1] / 'results' / 'bench_loader.csv'
RECIPES = ('cifar10', 'modern')
MODELS = ('finet_small_g4', 'finet_large_g8')
IMAGES, ROUNDS, STEPS, SEED = 12800, 7, 2, 0


def loader(recipe, folder):
    args = Namespace(**{'aa': None, **yaml.safe_load(Path(find_recipe(f'recipe:{recipe}')).read_text())})
    return create_loader(
        create_dataset(args.dataset, root=folder, split='train'), args.input_size, args.batch_size, is_training=True,
        scale=args.scale, ratio=args.ratio, hflip=args.hflip, color_jitter=args.color_jitter, auto_augment=args.aa,
        interpolation=args.train_interpolation, mean=args.mean, std=args.std, num_workers=0, device=torch.device('cpu'))


def epoch(batches):
    """Images a second of what a worker does: read, augment and collate. Normalising is the training process's part."""
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in batches.loader)
    return count / (time.perf_counter() - start)


def trainer(name):
    args = Namespace(**yaml.safe_load(Path(find_recipe('recipe:cifar10')).read_text()))
    model = timm.create_model(name, num_classes=10, small_input=True, drop_rate=args.drop)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    x, labels = torch.randn(args.batch_size, 3, 32, 32), torch.randint(10, (args.batch_size,))

    def train():
        start = time.perf_counter()
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()
        return STEPS * args.batch_size / (time.perf_counter() - start)
    return train


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    rng = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory() as folder:
        images, labels = rng.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, IMAGES)
        np.savez(Path(folder, 'cifar10.npz'), train=images, train_labels=labels)
        subjects = {f'loader of recipe:{recipe}': lambda b=loader(recipe, folder): epoch(b) for recipe in RECIPES}
    subjects.update({f'training step of {name}': trainer(name) for name in MODELS})
    rates = {subject: [] for subject in subjects}
    for _ in range(ROUNDS + 1):
        for subject, run in subjects.items():
            rates[subject].append(run())
    rows = [dict(
        subject=subject, images_per_second=round(median(found[1:])), lowest=round(min(found[1:])),
        highest=round(max(found[1:])), threads=1, workers='in the process', rounds=ROUNDS, seed=SEED,
        command='python -m scripts.bench.bench_loader', torch=torch.__version__, torchvision=torchvision.__version__,
        timm=timm.__version__, numpy=np.__version__, processor=cpu_name(), date=date.today(),
    ) for subject, found in rates.items()]
    for row in rows:
        print(f"{row['subject']:<36} {row['images_per_second']:>8,} ({row['lowest']:,} to {row['highest']:,})")
    with RESULTS.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


if __name__ == '__main__':
    main()
