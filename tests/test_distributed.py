"""Synchronised FBN: two gloo processes with unequal batches against one process with the joined batch, in float64."""
from copy import deepcopy

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn as nn
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn

from timm_finet import FBNConv2d
from timm_finet.patches import train_on_several_cpus

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
    # Nothing frozen: what `timm-finet run train` does for train.py on the CPU; last, as it patches torch.
    'launcher': finet,
}
SHAPES = {'finet': (3, 32, 32), 'launcher': (3, 32, 32), 'resnet stage': (64, 8, 8)}


def prepare(model, name):
    if name == 'launcher':
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
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    results = {}
    for name, (model, x, weighting) in torch.load(f'{folder}/jobs.pt', weights_only=False).items():
        model = prepare(nn.SyncBatchNorm.convert_sync_batchnorm(model), name)
        if name == 'launcher':
            train_on_several_cpus()
            # It averages the gradients.
            model = nn.parallel.DistributedDataParallel(model, device_ids=[torch.device('cpu')])
        y, grad = train(model, x.split(SPLIT)[rank], weighting.split(SPLIT)[rank])
        results[name] = y, grad, [p.grad for p in model.parameters()], list(model.buffers())
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


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
    mp.spawn(worker, (str(folder),), nprocs=2)
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
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
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
    dist.destroy_process_group()


def test_unconverted_layers_do_not_communicate_and_timms_dist_bn_averages_them(tmp_path):
    mp.spawn(quiet_worker, (str(tmp_path),), nprocs=2)


@pytest.mark.parametrize('convert', [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm])
def test_both_conversions_keep_names_and_one_process_alone_works(convert):
    model = timm.create_model('resnet18_fbn').layer1
    keys = list(model.state_dict())
    synced = convert(model)
    assert list(synced.state_dict()) == keys
    assert all(isinstance(m.bn, nn.SyncBatchNorm) for m in synced.modules() if isinstance(m, FBNConv2d))
    x = torch.randn(2, 64, 8, 8)
    synced(x).sum().backward()
