"""Runs a function in several processes that make one process group, as DistributedDataParallel would have it."""
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(work, folder, nprocs=2):
    """Calls `work(rank, folder)` in each of `nprocs` processes, joined by gloo, a thread each.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what one of them raised.
    """
    mp.spawn(_run, (work, str(folder), nprocs), nprocs=nprocs)


def _run(rank, work, folder, nprocs):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=nprocs)
    work(rank, folder)
    dist.barrier()
    # Without torch's own teardown: now and then it aborts a process whose gloo threads still run.
    os._exit(0)
