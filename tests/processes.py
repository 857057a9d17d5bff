"""Runs a function in several processes that make one process group, as DistributedDataParallel would have it."""
import multiprocessing
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Where there is a fork server, it imports torch and timm once for all processes to come: to each that takes seconds.
METHOD = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'


def run_processes(work, folder, nprocs=2):
    """Calls `work(rank, folder)` in each of `nprocs` processes, joined by gloo, a thread each.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what one of them raised.
    """
    multiprocessing.set_forkserver_preload(['timm_finet', 'torch.distributed.fsdp'])
    mp.start_processes(_run, (work, str(folder), nprocs), nprocs, start_method=METHOD)


def _run(rank, work, folder, nprocs):
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group('gloo', init_method=(Path(folder) / 'store').as_uri(), rank=rank, world_size=nprocs)
    work(rank, folder)
    dist.barrier()
    # Without torch's own teardown: now and then it aborts a process whose gloo threads still run.
    os._exit(0)
