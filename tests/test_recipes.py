"""What the recipes mean to timm: its optimizer, scheduler, transforms and networks, made as train.py makes them."""
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torchvision.transforms import InterpolationMode

from timm_finet.commands import run as launch

PAPER = ['imagenet', 'tiny_in200', 'cifar10', 'cifar100', 'resnet_cifar']
RECIPES = [
    *PAPER, 'cifar_long', 'cifar10_short', 'cifar_short', 'finetune', 'modern', 'modern_finetune', 'photos', 'smoke']
CIFAR = ['cifar10', 'cifar100', 'resnet_cifar', 'modern', 'smoke', 'cifar10_short', 'cifar_short', 'cifar_long']
UPDATES = 10  # an epoch
ARRAY = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def read(name):
    recipe = yaml.safe_load(Path(launch.find_recipe(f'recipe:{name}')).read_text())
    return Namespace(**{'momentum': 0.9, **recipe})  # which train.py hands to every optimizer


def build(name):
    args = read(name)
    model = 'resnet18_fbn' if name == 'resnet_cifar' else 'finet_small_g4'
    return timm.create_model(
        model, num_classes=getattr(args, 'num_classes', 3), drop_rate=args.drop, **getattr(args, 'model_kwargs', {}))


def rates(args):
    """The learning rate in front of each epoch and at the end, from the first update on as train.py steps it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=UPDATES)
    found = []
    for epoch in range(epochs):
        found.append(optimizer.param_groups[0]['lr'])
        for update in range(UPDATES):
            scheduler.step_update(epoch * UPDATES + update + 1)
        scheduler.step(epoch + 1)
    return found + [optimizer.param_groups[0]['lr']]


@pytest.mark.parametrize('name', RECIPES)
def test_numbers_are_numbers_and_traps_are_named(name):
    args = vars(read(name))
    assert args['device_modules'] == ['timm_finet'] and 'seed' in args
    traps = {'opt', 'weight_decay', 'sched', 'warmup_epochs', 'smoothing', 'color_jitter', 'train_interpolation',
             'drop', 'scale', 'ratio', 'hflip', 'lr', 'epochs', 'batch_size', 'interpolation'}
    assert traps <= set(args)
    for key in ('lr', 'weight_decay', 'momentum', 'min_lr', 'warmup_lr', 'drop', 'smoothing', 'model_ema_decay'):
        assert isinstance(args.get(key, 0), (int, float)), f'{key}: YAML reads 1e-3 as a string'


@pytest.mark.parametrize('name', RECIPES)
def test_timm_knows_the_optimizer_and_the_schedule_which_ends_at_zero(name):
    args = read(name)
    optimizer = create_optimizer_v2(
        torch.nn.Linear(1, 1), **optimizer_kwargs(args), **getattr(args, 'opt_kwargs', {}))
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=UPDATES)
    assert scheduler is not None and epochs == args.epochs
    assert args.sched == 'multistep' or args.min_lr == 0


@pytest.mark.parametrize('name, expected', [
    ('imagenet', [0.2 * (1 - epoch / 320) for epoch in range(321)]),
    ('tiny_in200', [0.2 * (1 - epoch / 40) for epoch in range(41)]),
    ('cifar_long', [0.1] * 25 + [0.01] * 13 + [0.001] * 13),
    *((name, [0.1] * 100 + [0.01] * 50 + [0.001] * 51) for name in ('cifar10', 'cifar100', 'resnet_cifar')),
])
def test_learning_rate_at_every_epoch_boundary(name, expected):
    assert rates(read(name)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('name, batch, decay', [
    ('imagenet', 512, 4e-5), ('tiny_in200', 512, 4e-5), ('cifar10', 128, 5e-4), ('cifar100', 128, 5e-4),
    ('cifar_long', 128, 5e-4), ('resnet_cifar', 64, 5e-4)])
def test_papers_optimizer_is_sgd_without_nesterov_that_decays_every_parameter(name, batch, decay):
    args = read(name)
    model = build(name)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    assert type(optimizer) is torch.optim.SGD and args.batch_size == batch
    assert all((g['momentum'], g['dampening'], g['nesterov']) == (0.9, 0, False) for g in optimizer.param_groups)
    decayed = {id(p): g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    assert decayed == {id(p): decay for p in model.parameters()}


@pytest.mark.parametrize('name', RECIPES)
def test_drop_rate_and_classes_reach_the_network(name):
    model = build(name)
    assert model.drop_rate == {'resnet_cifar': 0, 'cifar10_short': 0, 'cifar_short': 0, 'photos': 0}.get(name, 0.2)
    classes = {
        'imagenet': 1000, 'tiny_in200': 200, 'photos': 200, 'cifar100': 100, 'cifar_short': 100, 'cifar_long': 100,
        'finetune': 3, 'modern_finetune': 3}
    classes = classes.get(name, 10)
    assert model.num_classes == classes


def training_transform(args, data):
    return create_transform(
        data['input_size'], is_training=True, scale=args.scale, ratio=args.ratio, hflip=args.hflip,
        color_jitter=args.color_jitter, auto_augment=getattr(args, 'aa', None), interpolation=args.train_interpolation,
        mean=data['mean'], std=data['std'], use_prefetcher=True)


@pytest.mark.parametrize('name', CIFAR)
def test_cifar_recipes_leave_the_padded_crop_as_it_is_and_flip(name):
    args = read(name)
    data = resolve_data_config(vars(args), model=build(name))
    assert tuple(data['input_size']) == (3, 32, 32)
    train = training_transform(args, data)
    extra = {'modern': ['RandAugment'], 'cifar10_short': ['ColorJitter']}.get(name, [])
    kinds = ['RandomResizedCropAndInterpolation', 'RandomHorizontalFlip', *extra, 'MaybePILToTensor']
    assert [type(t).__name__ for t in train.transforms] == kinds
    train.transforms = [t for t in train.transforms if type(t).__name__ != 'RandAugment']
    seen = {train(Image.fromarray(ARRAY)).numpy().tobytes() for _ in range(50)}
    assert seen == {a.transpose(2, 0, 1).tobytes() for a in (ARRAY, ARRAY[:, ::-1])}
    evaluation = create_transform(
        data['input_size'], interpolation=data['interpolation'], crop_pct=data['crop_pct'], use_prefetcher=True)
    assert np.array_equal(evaluation(Image.fromarray(ARRAY)), ARRAY.transpose(2, 0, 1))


def test_imagenet_transforms_are_those_of_pytorchs_example():
    args = read('imagenet')
    data = resolve_data_config(vars(args), model=build('imagenet'))
    assert [tuple(data[key]) for key in ('mean', 'std')] == [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]
    crop, flip, _ = training_transform(args, data).transforms
    assert (crop.size, tuple(crop.scale)) == ((224, 224), (0.08, 1)) and crop.ratio == pytest.approx((3 / 4, 4 / 3))
    assert crop.interpolation is InterpolationMode.BILINEAR and flip.p == 0.5
    resize, centre, _ = create_transform(
        data['input_size'], interpolation=data['interpolation'], crop_pct=data['crop_pct'],
        use_prefetcher=True).transforms
    assert (resize.size, resize.interpolation, centre.size) == (256, InterpolationMode.BILINEAR, (224, 224))


def test_tiny_imagenet_is_imagenets_recipe_but_for_size_length_and_precision():
    ours, imagenet = vars(read('tiny_in200')), vars(read('imagenet'))
    assert {key for key in ours.keys() | imagenet.keys() if ours.get(key) != imagenet.get(key)} == {
        'train_split', 'val_split', 'num_classes', 'input_size', 'epochs', 'amp', 'amp_dtype', 'channels_last',
        'workers', 'checkpoint_hist'}
