"""Synchronised FBN: two gloo processes with unequal batches against one process with the joined batch, in float64."""
import importlib
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
from processes import run_processes
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy

from timm_finet import FBNConv2d
from timm_finet.fbn import as_reference

pytestmark = pytest.mark.slow  # each process has to import torch

SPLIT = (3, 5)


def finet():
    """The depthwise and other BatchNorms are frozen: torch's own SyncBatchNorm refuses the CPU in training."""
    return timm.create_model('finet_small_se_g4', num_classes=5, drop_rate=0.)


NETWORKS = {
    '1x1': lambda: FBNConv2d(8, 6, fbn_groups=4),
    '1x1, one group': lambda: FBNConv2d(8, 6, fbn_groups=1),
    '1x1, strided': lambda: FBNConv2d(8, 6, stride=2, fbn_groups=2),
    '1x1, other precision in one process': lambda: FBNConv2d(60, 6, fbn_groups=2, dtype=torch.float32),
    '3x3': lambda: FBNConv2d(8, 6, 3, padding=1, fbn_groups=2),
    'finet': finet,
    'resnet stage': lambda: timm.create_model('resnet18_fbn').layer2,
    # Nothing frozen: what train.py gets by `--device-modules scripts.several_cpus`; last, as that changes torch.
    'several_cpus': finet,
}
SHAPES = {'finet': (3, 32, 32), 'several_cpus': (3, 32, 32), 'resnet stage': (64, 8, 8)}


def prepare(model, name):
    if name == 'several_cpus':
        return model.train()
    inside = {m for layer in model.modules() if isinstance(layer, FBNConv2d) for m in layer.modules()}
    for m in model.train().modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m not in inside:
            m.eval()
    return model


def train(model, x, weighting):
    x = x.clone().requires_grad_()
    y = model(x)
    (y * weighting).sum().backward()
    return y.detach(), x.grad


def worker(rank, folder):
    torch.set_default_dtype(torch.float64)
    results = {}
    for name, (model, x, weighting) in torch.load(f'{folder}/jobs.pt', weights_only=False).items():
        model = prepare(nn.SyncBatchNorm.convert_sync_batchnorm(model), name)
        if name == 'several_cpus':
            importlib.import_module('scripts.several_cpus')
            # It averages the gradients.
            model = nn.parallel.DistributedDataParallel(model, device_ids=[torch.device('cpu')])
        y, grad = train(model, x.split(SPLIT)[rank], weighting.split(SPLIT)[rank])
        results[name] = y, grad, [p.grad for p in model.parameters()], list(model.buffers())
    torch.save(results, f'{folder}/{rank}.pt')


@pytest.fixture(scope='module')
def jobs(tmp_path_factory):
    """Each network with its input and the gradient's weighting, and what the two processes made of them."""
    folder, made = tmp_path_factory.mktemp('jobs'), {}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        for name, make in NETWORKS.items():
            model = prepare(make(), name)
            parameter = next(model.parameters())
            x = torch.randn(sum(SPLIT), *SHAPES.get(name, (parameter.shape[1], 6, 5)), dtype=parameter.dtype)
            made[name] = model, x, torch.randn_like(deepcopy(model)(x))
    finally:
        torch.set_default_dtype(torch.float32)
    torch.save(made, folder / 'jobs.pt')
    run_processes(worker, folder)
    return made, [torch.load(folder / f'{rank}.pt') for rank in range(2)]


@pytest.mark.parametrize('name', NETWORKS)
def test_two_processes_equal_one_with_the_joined_batch(name, jobs):
    made, ranks = jobs
    model, x, weighting = made[name]
    results = [rank[name] for rank in ranks]
    y, grad = train(model, x, weighting)
    close = dict(rtol=1e-8, atol=1e-8) if x.dtype == torch.float64 else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat([r[0] for r in results]), y, **close)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), grad, **close)
    for p, a, b in zip(model.parameters(), results[0][2], results[1][2]):
        torch.testing.assert_close(a + b, p.grad, **close)
    for r in results:
        torch.testing.assert_close(r[3], list(model.buffers()), **close)


def quiet_worker(rank, folder):
    model = FBNConv2d(8, 6, fbn_groups=2)
    all_reduce, dist.all_reduce = dist.all_reduce, None  # calling it would raise
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    model(x).sum().backward()
    dist.all_reduce = all_reduce
    before = [torch.empty_like(model.bn.running_var) for _ in range(2)]
    dist.all_gather(before, model.bn.running_var)
    assert not torch.equal(*before)
    distribute_bn(model, 2, reduce=True)
    torch.testing.assert_close(model.bn.running_var, sum(before) / 2)


def test_unconverted_layers_do_not_communicate_and_timms_dist_bn_averages_them(tmp_path):
    run_processes(quiet_worker, tmp_path)


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_both_conversions_keep_names_and_one_process_alone_works(convert):
    model = timm.create_model('resnet18_fbn').layer1
    keys = list(model.state_dict())
    synced = convert(model)
    assert list(synced.state_dict()) == keys
    assert all(isinstance(m.bn, nn.SyncBatchNorm) for m in synced.modules() if isinstance(m, FBNConv2d))
    x = torch.randn(2, 64, 8, 8)
    synced(x).sum().backward()


def empty_worker(rank, folder):
    torch.set_default_dtype(torch.float64)
    for kernel in (1, 3):
        torch.manual_seed(0)
        alone = FBNConv2d(8, 6, kernel, padding=kernel // 2, fbn_groups=2)
        synced = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(alone))
        x = torch.randn(4, 8, 5, 5)
        expected = train(alone, x, x[:, :6])
        mine = x if rank == 0 else x[:0]
        y, grad = train(synced, mine, mine[:, :6])
        if rank == 0:
            torch.testing.assert_close((y, grad), expected)
        assert y.shape == (len(mine), 6, 5, 5) and grad.shape == mine.shape
        for p, q in zip(synced.parameters(), alone.parameters()):
            dist.all_reduce(p.grad)
            torch.testing.assert_close(p.grad, q.grad)
        torch.testing.assert_close(synced.bn.running_var, alone.bn.running_var)
        assert synced.bn.num_batches_tracked == 1


def test_a_process_without_images_takes_part(tmp_path):
    run_processes(empty_worker, tmp_path)


def wrap(model, kind, mesh):
    """`model` sharded over the processes, and the dtype that it computes in."""
    if kind == 'FSDP2, every leaf':
        for module in list(model.modules())[:0:-1]:
            if next(module.parameters(recurse=False), None) is not None:
                fully_shard(module, mesh=mesh)
        return fully_shard(model, mesh=mesh), torch.float32
    if kind == 'FSDP2, every layer':
        for layer in model:
            if isinstance(layer, FBNConv2d):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh), torch.float32
    shard = partial(FullyShardedDataParallel, device_id=torch.device('cpu'), use_orig_params='original' in kind)
    if 'every layer' in kind:
        return shard(model, auto_wrap_policy=ModuleWrapPolicy({FBNConv2d})), torch.float32
    # The ordinary recipe: torch then wraps every BatchNorm apart.
    return shard(
        model, auto_wrap_policy=partial(size_based_auto_wrap_policy, min_num_params=10),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)), torch.bfloat16


SHARDED = [
    'FSDP1, bfloat16', 'FSDP1, bfloat16, original parameters', 'FSDP1, every layer', 'FSDP2, every leaf',
    'FSDP2, every layer']


def sharded_worker(rank, folder):
    mesh = init_device_mesh('cpu', (2,))
    for kind in SHARDED:
        torch.manual_seed(0)
        model = nn.Sequential(
            FBNConv2d(8, 16, fbn_groups=4), nn.ReLU(), FBNConv2d(16, 8, 3, padding=1, fbn_groups=2))
        plain = nn.Sequential(*(as_reference(deepcopy(m)) if isinstance(m, FBNConv2d) else m for m in model))
        x = torch.randn(8, 8, 6, 6, generator=torch.Generator().manual_seed(rank))
        sharded, dtype = wrap(model, kind, mesh)
        close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.08)
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype != torch.float32):
            y, grad = train(plain, x, x)
        for a, b in zip(train(sharded, x, x), (y, grad)):
            torch.testing.assert_close(a, b, **close, check_dtype=False)
        buffers = {name.replace('_fsdp_wrapped_module.', ''): value for name, value in sharded.named_buffers()}
        for name, value in plain.named_buffers():
            torch.testing.assert_close(buffers[name], value, **close, check_dtype=False)
            assert 'tracked' not in name or value == 1
        with torch.no_grad():
            torch.testing.assert_close(sharded.eval()(x), plain.eval()(x), **close, check_dtype=False)


@pytest.mark.filterwarnings('ignore')
def test_sharded_layers_train_and_evaluate_as_unsharded_ones(tmp_path):
    run_processes(sharded_worker, tmp_path)
