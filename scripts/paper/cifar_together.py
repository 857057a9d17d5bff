"""Tables 5 to 7 on one GPU, several networks at once in one process: a single one leaves the card idle.

    python -m scripts.paper.cifar_together cifar100 --only g1_g8 --seeds 0 1 2 --data-dir DATA --output OUT --minutes 12

Each network's training step, its optimizer's too, is a CUDA graph on a stream of its own; the images lie on the card.
Networks, recipes, order of worth and results files are those of cifar_tables.py, which makes the tables. Once a minute
all networks are saved to OUT; the same command goes on from there. Without a GPU the networks take turns, step by step.
"""
import argparse
import ast
import sys
import time
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import yaml
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import random_seed

from scripts.cifar_runs import FILES, PROTOCOLS, folder, missing
from scripts.paper.cifar_tables import commit
from scripts.report import RESULTS, command, cpu_name, read_rows, write_rows
from timm_finet.commands.run import find_recipe

EVAL_BATCH = 500


def read_recipe(setting):
    """The recipe's numbers, by the names of train.py's arguments."""
    recipe = yaml.safe_load(Path(find_recipe(f'recipe:{setting.recipe}')).read_text())
    if recipe['opt'] != 'momentum' or recipe['sched'] != 'multistep' or recipe['smoothing'] or 'aa' in recipe:
        raise ValueError(f'recipe:{setting.recipe} needs more than SGD with momentum and steps: use cifar_tables.py.')
    return Namespace(**recipe)


def build(setting, recipe):
    """The network that train.py would build."""
    pairs = (pair.split('=', 1) for pair in setting.kwargs)
    kwargs = {name: ast.literal_eval(value) for name, value in pairs}
    return timm.create_model(
        setting.model, num_classes=int(setting.dataset.removeprefix('cifar')), drop_rate=recipe.drop, small_input=True,
        **kwargs)


def images(setting, recipe, root, split, batch_size):
    """A data set on the device whose `__getitems__` crops, flips and normalises a batch; timm's loader tells it how."""
    data = create_dataset(f'torch/{setting.dataset}_gpu', root=root, split=split)
    create_loader(
        data, tuple(recipe.input_size), batch_size, is_training=split == 'train', use_prefetcher=False, num_workers=0,
        mean=tuple(recipe.mean), std=tuple(recipe.std), crop_pct=recipe.crop_pct, interpolation=recipe.interpolation,
        scale=tuple(recipe.scale), ratio=tuple(recipe.ratio), hflip=recipe.hflip, color_jitter=recipe.color_jitter,
        persistent_workers=False)
    return data


class Training:
    """One network, its optimizer, schedule, random numbers and stream.

    Args:
        run: A setting of cifar_runs.py and a seed.
        updates: Training steps an epoch.
        device: On a GPU steps are replayed from a graph.
        dtype: Of autocast, or None.
    """

    def __init__(self, run, updates, device, dtype=None):
        self.run, self.updates, self.device, self.dtype = run, updates, device, dtype
        setting, seed = run
        self.recipe = read_recipe(setting)
        random_seed(seed, 0)
        self.model = build(setting, self.recipe).to(device, memory_format=torch.channels_last).train()
        self.numbers = torch.get_rng_state()  # of the order and the crops; each network draws from its own
        on_gpu = device.type == 'cuda'
        # Only the fused step reads its learning rate from the card, where it can change without another capture.
        fused = dict(fused=True) if on_gpu else {}
        self.optimizer = create_optimizer_v2(
            self.model, **optimizer_kwargs(self.recipe), **self.recipe.opt_kwargs, **fused)
        for parameter in self.model.parameters():  # SGD's first step is the same from zeros as from nothing
            self.optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(self.recipe), updates_per_epoch=updates)
        self.rate, self.loss = torch.zeros(2, device=device).unbind()
        self.stream, self.graph = torch.cuda.Stream() if on_gpu else None, None
        self.epoch, self.seconds, self.rows = 0, 0., []
        self.set_rate()

    @contextmanager
    def its_own(self):
        """Whatever runs inside takes this network's random numbers and, on a GPU, its stream."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.numbers)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            yield
        self.numbers = torch.get_rng_state()
        torch.set_rng_state(before)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None, cache_enabled=False)

    def tensors(self):
        """All that a step changes."""
        return [*self.model.state_dict().values(), *(s['momentum_buffer'] for s in self.optimizer.state.values())]

    def compute(self):
        """One step on `self.x` and `self.target`."""
        with self.autocast():
            loss = F.cross_entropy(self.model(self.x), self.target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss += loss.detach()

    def step(self, x, target):
        x = x.contiguous(memory_format=torch.channels_last)
        if self.stream is None:
            self.x, self.target = x, target
            self.compute()
            return
        if self.graph is None:
            self.capture(x, target)
        self.x.copy_(x)
        self.target.copy_(target)
        self.graph.replay()

    def capture(self, x, target):
        """Record a step as a CUDA graph. The steps that warm up for it are undone."""
        self.x, self.target = x.clone(), target.clone()
        before = [tensor.clone() for tensor in (*self.tensors(), self.loss)]
        for _ in range(3):
            self.compute()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.compute()
        with torch.no_grad():
            for tensor, value in zip((*self.tensors(), self.loss), before):
                tensor.copy_(value)

    def set_rate(self):
        """On a GPU the schedule's number goes into the tensor that the graph reads."""
        if self.stream is not None:
            for group in self.optimizer.param_groups:
                self.rate.fill_(float(group['lr']))
                group['lr'] = self.rate

    def order(self, count):
        """Indices of an epoch's batches, shuffled; the smaller last one is dropped, as by train.py."""
        size = self.recipe.batch_size
        return torch.randperm(count)[:self.updates * size].view(self.updates, size).tolist()

    def end_epoch(self, test):
        """Note the epoch, test every fifth and the last, and move the schedule."""
        self.epoch += 1
        train_loss, rate = self.loss.item() / self.updates, float(self.optimizer.param_groups[0]['lr'])
        self.loss.zero_()
        if self.epoch % 5 == 0 or self.epoch == self.epochs:
            self.rows.append(dict(epoch=self.epoch - 1, train_loss=train_loss, **self.evaluate(test), lr=rate))
        self.scheduler.step(self.epoch)
        self.set_rate()

    @torch.no_grad()
    def evaluate(self, test):
        self.model.eval()
        loss = top1 = top5 = 0
        for start in range(0, len(test), EVAL_BATCH):
            (x, target), = test.__getitems__(list(range(start, min(start + EVAL_BATCH, len(test)))))
            with self.autocast():
                logits = self.model(x.contiguous(memory_format=torch.channels_last)).float()
            found = logits.topk(5).indices == target[:, None]
            loss += F.cross_entropy(logits, target, reduction='sum').item()
            top1, top5 = top1 + found[:, 0].sum().item(), top5 + found.sum().item()
        self.model.train()
        return dict(eval_loss=loss / len(test), eval_top1=100 * top1 / len(test), eval_top5=100 * top5 / len(test))

    def state(self):
        return dict(
            tensors=self.tensors(), numbers=self.numbers, epoch=self.epoch, seconds=self.seconds, rows=self.rows)

    @torch.no_grad()
    def load(self, state):
        for tensor, value in zip(self.tensors(), state['tensors'], strict=True):
            tensor.copy_(value)
        self.numbers, self.epoch = state['numbers'].cpu(), state['epoch']
        self.seconds, self.rows = state['seconds'], state['rows']
        self.scheduler.step(self.epoch)
        self.set_rate()


def train(trainings, data, test, minutes, save):
    """An epoch of every network, step by step in turns, until all are done or the time is up.

    Args:
        save: Called once a minute and at the end, between epochs.
    """
    begun = saved = time.monotonic()
    active = [t for t in trainings if t.epoch < t.epochs]
    while active and time.monotonic() - begun < 60 * minutes:
        start = time.monotonic()
        orders = []
        for training in active:
            with training.its_own():
                orders.append(training.order(len(data)))
        for step in range(active[0].updates):
            for training, order in zip(active, orders):
                with training.its_own():
                    (x, target), = data.__getitems__(order[step])
                    training.step(x, target)
        for training in active:
            with training.its_own():
                training.end_epoch(test)
            training.seconds += time.monotonic() - start
        print(', '.join(f"{t.run[0].model} {t.run[1]}: epoch {t.epoch}"
                        + (f", {t.rows[-1]['eval_top1']:.2f}" if t.rows else '') for t in active), flush=True)
        active = [t for t in active if t.epoch < t.epochs]
        if time.monotonic() - saved > 60:
            save()
            saved = time.monotonic()
    save()


def line(training, args, together):
    """The results' line of a finished run, as cifar_runs.py writes them."""
    setting, seed = training.run
    top1 = [row['eval_top1'] for row in training.rows]
    gpu = training.device.type == 'cuda'
    return dict(
        setting=str(setting), seed=seed, epochs=training.epochs, top1_last=round(top1[-1], 3),
        top1_best=round(max(top1), 3), best_epoch=training.rows[top1.index(max(top1))]['epoch'] + 1,
        seconds=round(training.seconds), seconds_an_epoch=round(training.seconds / training.epochs, 2),
        peak_mb=round(torch.cuda.max_memory_allocated() / 2 ** 20) if gpu else '', jobs=together, sessions='',
        precision=args.amp_dtype or 'float32', compiled=False, commit=args.commit,
        device=torch.cuda.get_device_name() if gpu else cpu_name(), torch=torch.__version__, timm=timm.__version__,
        date=date.today(), command=command(DATA=args.data_dir, OUT=args.output))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('protocol', choices=('cifar10', 'cifar100'))
    parser.add_argument('--only', nargs='+', required=True, choices=[s.name for s in PROTOCOLS['cifar10']])
    parser.add_argument('--seeds', nargs='+', type=int, default=[])
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--output', required=True, help='folder of the checkpoint')
    parser.add_argument('--minutes', type=float, default=float('inf'))
    parser.add_argument('--amp-dtype', choices=('bfloat16',), help='(default: float32, as in the recipe)')
    parser.add_argument('--epochs', type=int, help="instead of the recipe's: for a rehearsal, which records nothing")
    parser.add_argument('--commit', default=commit(), help='for a copy of the repository that has no history')
    args = parser.parse_args()
    results = RESULTS / f'{next(stem for stem, protocols in FILES.items() if args.protocol in protocols)}.csv'
    rows = read_rows(results) if results.exists() else []
    runs = missing([args.protocol], args.only, args.seeds, rows)
    if not runs:
        sys.exit(f'{results} holds all of these runs.')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    dtype = args.amp_dtype and getattr(torch, args.amp_dtype)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True  # as train.py
    recipe = read_recipe(runs[0][0])
    if any(read_recipe(setting) != recipe for setting, _ in runs):
        parser.error(f"--only {' '.join(args.only)}: networks that train together need one recipe.")
    data, test = (
        images(runs[0][0], recipe, args.data_dir, split, recipe.batch_size) for split in ('train', 'validation'))
    trainings = [Training(run, len(data) // recipe.batch_size, device, dtype) for run in runs]
    for training in trainings:
        training.epochs = args.epochs or training.epochs
    file = Path(args.output, 'together.pt')
    file.parent.mkdir(parents=True, exist_ok=True)

    def key(training):
        return f'{training.run[0]} seed {training.run[1]} {args.amp_dtype}'

    if file.exists():
        states = torch.load(file, map_location=device)
        for training in trainings:
            if key(training) in states:
                training.load(states[key(training)])

    def save():
        part = file.with_suffix('.part')
        torch.save({key(training): training.state() for training in trainings}, part)
        part.replace(file)

    train(trainings, data, test, args.minutes, save)
    done = [training for training in trainings if training.epoch == training.epochs]
    print(f'{len(done)} of {len(trainings)} networks are done.')
    if args.epochs is None:
        for training in done:
            curves = results.with_suffix('')
            curves.mkdir(exist_ok=True)
            write_rows(curves / f"{folder('', training.run).name}.csv", training.rows)
            rows.append(line(training, args, len(trainings)))
            write_rows(results, rows)


if __name__ == '__main__':
    main()
