"""Train many networks on CIFAR at once, on one GPU and in one process, as a single network leaves the GPU idle.

    python -m scripts.paper.cifar_together long --only small groups --data-dir DATA --output OUT --jobs 30
    python -m scripts.paper.cifar_together paper --data-dir DATA --output OUT --amp-dtype bfloat16 --minutes 12

`long` trains the networks that cifar_tables.py trains under that name, with the same settings and number of seeds, and
with timm's optimizer and schedule. `paper` is Table 5's own protocol on CIFAR-100. Each network's training step,
including its optimizer, is a CUDA graph on its own stream, and the images are on the GPU. Results go to
results/cifar_long_gpu.csv and cifar_paper.csv, with the columns of the other tables.

The runs that the results lack are trained `--jobs` at a time, the most important first. Once a minute all networks are
saved to OUT, from where the same command continues. Without a GPU, the networks take turns step by step.
"""
import argparse
import importlib
import sys
import time
from argparse import Namespace
from contextlib import contextmanager, nullcontext
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import yaml
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ParseKwargs, random_seed

from scripts.paper.cifar_plan import PROTOCOLS, TOGETHER
from scripts.report import RESULTS, command_line, facts
from scripts.runs import add_run, commit, missing
from timm_finet.commands.run import find_recipe
from timm_finet.data.cifar import PAD

EVAL_BATCH = 2000


def train_args(setting):
    """The recipe's values, overridden by the setting's, by the names of train.py's arguments."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    for name in ('--config', '--model', '--dataset'):
        parser.add_argument(name)
    parser.add_argument('--model-kwargs', nargs='*', action=ParseKwargs)
    parser.add_argument('--num-classes', type=int)
    parser.add_argument('--lr', type=float)
    parser.add_argument('--mean', nargs=3, type=float)
    parser.add_argument('--std', nargs=3, type=float)
    parser.add_argument('--device-modules', nargs='*')
    parser.add_argument('--channels-last', action='store_true')
    args = parser.parse_args(setting.args)
    return Namespace(**yaml.safe_load(Path(find_recipe(args.config)).read_text()) | vars(args))


def build(args):
    """Build the network that train.py would build."""
    for module in args.device_modules:
        importlib.import_module(module)
    return timm.create_model(args.model, num_classes=args.num_classes, drop_rate=args.drop, **args.model_kwargs)


def images(args, root, split):
    """A data set on the device; its `__getitems__` crops, flips and normalises a batch as timm's loader set it up."""
    data = create_dataset(args.dataset.removesuffix('_pad2') + '_gpu', root=root, split=split)
    create_loader(
        data, tuple(args.input_size), args.batch_size, is_training=split == 'train', use_prefetcher=False,
        num_workers=0, mean=tuple(args.mean), std=tuple(args.std), crop_pct=args.crop_pct,
        interpolation=args.interpolation, scale=tuple(args.scale), ratio=tuple(args.ratio), hflip=args.hflip,
        color_jitter=args.color_jitter, persistent_workers=False)
    return data


class Training:
    """One network, its optimizer, schedule, random numbers and stream.

    Args:
        run: A setting and a seed.
        data, test: Images to train and to test on.
        device: On a GPU, steps are replayed from a graph.
        amp_dtype: dtype of autocast, instead of the recipe's.
    """

    def __init__(self, run, data, test, device, amp_dtype=None):
        self.run, self.data, self.test, self.device = run, data, test, device
        setting, seed = run
        self.args = train_args(setting)
        self.updates = updates = len(data) // self.args.batch_size
        self.precision = amp_dtype or (self.args.amp_dtype if vars(self.args).get('amp') else 'float32')
        random_seed(seed, 0)
        self.model = build(self.args).to(device, memory_format=torch.channels_last).train()
        self.numbers = torch.get_rng_state()  # for order and crops; each network has its own
        on_gpu = device.type == 'cuda'
        # Only the fused optimizer reads its learning rate from the GPU, where it can change without another capture.
        fused = dict(fused=True) if on_gpu else {}
        self.optimizer = create_optimizer_v2(
            self.model, **optimizer_kwargs(self.args), **self.args.opt_kwargs, **fused)
        for parameter in self.model.parameters():  # SGD's first step is the same with zeros as without a buffer
            self.optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(self.args), updates_per_epoch=updates)
        self.rate, self.loss = torch.zeros(2, device=device).unbind()
        self.stream, self.graph = torch.cuda.Stream() if on_gpu else None, None
        self.epoch, self.seconds, self.rows = 0, 0., []
        self.set_rate()

    @contextmanager
    def its_own(self):
        """Run what is inside with this network's random numbers and, on a GPU, on its stream.

        The random numbers are the host's: order, crops and flips. Dropout on a GPU uses one generator for all networks.
        """
        before = torch.get_rng_state()
        torch.set_rng_state(self.numbers)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            yield
        self.numbers = torch.get_rng_state()
        torch.set_rng_state(before)

    def autocast(self):
        dtype = getattr(torch, self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False)

    def tensors(self):
        """All tensors that a step changes."""
        return [*self.model.state_dict().values(), *(s['momentum_buffer'] for s in self.optimizer.state.values())]

    def compute(self):
        """Take one step on `self.x` and `self.target`."""
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
        """Record a step as a CUDA graph, and undo the warm-up steps."""
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
        """On a GPU, write the schedule's learning rate into the tensor that the graph reads."""
        if self.stream is not None:
            for group in self.optimizer.param_groups:
                self.rate.fill_(float(group['lr']))
                group['lr'] = self.rate

    def order(self):
        """Shuffled indices of an epoch's batches; a smaller last batch is dropped, as in train.py."""
        size = self.args.batch_size
        return torch.randperm(len(self.data))[:self.updates * size].view(self.updates, size).tolist()

    def end_epoch(self):
        """Record the epoch, test after every fifth and the last, and step the schedule."""
        self.epoch += 1
        train_loss, rate = self.loss.item() / self.updates, float(self.optimizer.param_groups[0]['lr'])
        self.loss.zero_()
        if self.epoch % 5 == 0 or self.epoch == self.epochs:
            with self.autocast():
                loss, top1, top5 = self.judge(self.test_batches())
            self.rows.append(dict(
                epoch=self.epoch - 1, train_loss=train_loss, eval_loss=loss, eval_top1=top1, eval_top5=top5, lr=rate))
        self.scheduler.step(self.epoch)
        self.set_rate()

    def test_batches(self):
        for start in range(0, len(self.test), EVAL_BATCH):
            (x, target), = self.test.__getitems__(list(range(start, min(start + EVAL_BATCH, len(self.test)))))
            yield x, target

    def uncropped_batches(self):
        """Batches of the training images, preprocessed as for testing."""
        data = self.data
        data.__getitems__([0])  # moves the images to the device, if no step has done so
        for x, target in zip(data.images[:, PAD:-PAD, PAD:-PAD].split(EVAL_BATCH), data.labels.split(EVAL_BATCH)):
            yield x.permute(0, 3, 1, 2).float().div_(255).sub_(data.mean).div_(data.std), target

    @torch.no_grad()
    def judge(self, batches):
        """Mean loss, top-1 and top-5 in per cent, in eval mode."""
        self.model.eval()
        sums, count = torch.zeros(3, dtype=torch.float64, device=self.device), 0
        for x, target in batches:
            logits = self.model(x.contiguous(memory_format=torch.channels_last)).float()
            found = logits.topk(5).indices == target[:, None]
            loss = F.cross_entropy(logits, target, reduction='sum')
            sums += torch.stack([loss.double(), *(found[:, :k].sum().double() for k in (1, 5))])
            count += len(target)
        self.model.train()
        loss, top1, top5 = (sums / count).tolist()
        return loss, 100 * top1, 100 * top5

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


def train(trainings, end, save):
    """Train the networks an epoch at a time, step by step in turns, until all are done or the time is up.

    Args:
        end: Time of the monotonic clock after which no epoch is started.
        save: Called once a minute and at the end, between epochs.
    """
    if trainings[0].stream:
        torch.cuda.synchronize()  # the networks' streams do not wait for the default one, on which they were built
    saved = time.monotonic()
    active = [t for t in trainings if t.epoch < t.epochs]
    while active and time.monotonic() < end:
        start = time.monotonic()
        orders = []
        for training in active:
            with training.its_own():
                orders.append(training.order())
        for step in range(max(training.updates for training in active)):
            for training, order in zip(active, orders):
                if step < training.updates:
                    with training.its_own():
                        (x, target), = training.data.__getitems__(order[step])
                        training.step(x, target)
        for training in active:
            with training.its_own():
                training.end_epoch()
            training.seconds += time.monotonic() - start
        print(f'[{time.monotonic():.0f}]', ', '.join(
            f"{t.args.model} {t.run[1]}: epoch {t.epoch}" + (f", {t.rows[-1]['eval_top1']:.2f}" if t.rows else '')
            for t in active), flush=True)
        active = [t for t in active if t.epoch < t.epochs]
        if time.monotonic() - saved > 60:
            save()
            saved = time.monotonic()
    save()


def line(training, args, together):
    """The row of a finished run, with the columns of `collect` in runs.py and of `fit` in cifar_tables.py."""
    setting, seed = training.run
    top1 = [row['eval_top1'] for row in training.rows]
    gpu = training.device.type == 'cuda'
    fit_loss, fit_top1, _ = training.judge(training.uncropped_batches())
    return dict(
        setting=setting.name, seed=seed, epochs=training.epochs, top1_last=round(top1[-1], 3),
        top1_best=round(max(top1), 3), best_epoch=training.rows[top1.index(max(top1))]['epoch'] + 1,
        seconds=round(training.seconds), seconds_an_epoch=round(training.seconds / training.epochs, 2),
        peak_mb=round(torch.cuda.max_memory_allocated() / 2 ** 20) if gpu else '', jobs=together, sessions='',
        precision=training.precision, compiled=False, commit=args.commit,
        **facts(training.device.type, DATA=args.data_dir, OUT=args.output),
        fit_loss=round(fit_loss, 4), fit_top1=round(fit_top1, 3))


def train_together(runs, args, device, end):
    """Train the runs at once, record those that finish in time, and return how many these are."""
    sets = {}

    def load(run):
        recipe = train_args(run[0])
        if recipe.dataset not in sets:
            sets[recipe.dataset] = [images(recipe, args.data_dir, split) for split in ('train', 'validation')]
        return sets[recipe.dataset]
    trainings = [Training(run, *load(run), device, args.amp_dtype) for run in runs]
    for training in trainings:
        training.epochs = args.epochs or training.epochs
    file = Path(args.output, 'together.pt')
    file.parent.mkdir(parents=True, exist_ok=True)

    def key(training):
        return f'{training.run[0].name} seed {training.run[1]} {training.precision}'

    states = torch.load(file, map_location=device) if file.exists() else {}  # of other runs too
    for training in trainings:
        if key(training) in states:
            training.load(states[key(training)])

    def save():
        part = file.with_suffix('.part')
        torch.save(states | {key(training): training.state() for training in trainings}, part)
        part.replace(file)

    train(trainings, end, save)
    done = [training for training in trainings if training.epoch == training.epochs]
    if args.epochs is None:
        for training in done:
            add_run(args.results, training.run, line(training, args, len(trainings)), training.rows)
    return len(done)


def main():
    parser = command_line(__doc__)
    names = [section.name for protocol in TOGETHER for section in PROTOCOLS[protocol]]
    parser.add_argument('protocol', choices=list(TOGETHER))
    parser.add_argument('--only', nargs='+', choices=names, metavar='SECTION', default=names, help=', '.join(names))
    parser.add_argument('--jobs', type=int, default=30, help='networks at once (default: 30)')
    parser.add_argument('--data-dir', required=True)
    parser.add_argument('--output', required=True, help='folder of the checkpoint')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='start no epoch after these minutes')
    parser.add_argument('--amp-dtype', choices=('bfloat16',), help="(default: the recipe's)")
    parser.add_argument('--epochs', type=int, help="instead of the recipe's, for a rehearsal that records nothing")
    parser.add_argument('--commit', default=commit(), help='to record, for a copy of the repository without history')
    parser.add_argument('--results', type=Path, help='results file (default: that of the documents)')
    args = parser.parse_args()
    args.results = args.results or RESULTS / f'{TOGETHER[args.protocol]}.csv'
    sections = [section for section in PROTOCOLS[args.protocol] if section.name in args.only]
    runs = missing([run for section in sections for run in section.runs], args.results)
    if not runs:
        sys.exit(f'{args.results} holds all of these runs.')
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True  # as train.py
    end, done = time.monotonic() + 60 * args.minutes, 0
    for first in range(0, len(runs), args.jobs):
        if time.monotonic() < end:
            done += train_together(runs[first:first + args.jobs], args, device, end)
    print(f'{done} of {len(runs)} networks are done.')


if __name__ == '__main__':
    main()
