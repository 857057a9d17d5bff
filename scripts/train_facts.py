"""For train.py's --device-modules: print, when training ends, where, with which versions and in how much memory it ran.

The peak is of what PyTorch has allocated on the GPU over the whole run, evaluation and images held there included;
without a GPU, of the process's resident memory, libraries and data set included.
"""
import atexit
import json
import resource

import timm
import torch

from scripts.report import device_name


@atexit.register
def report():
    gpu = torch.cuda.is_available()
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    peak = torch.cuda.max_memory_allocated() if gpu else resident
    print('facts: ' + json.dumps(dict(
        peak_mb=round(peak / 2 ** 20), device=device_name('cuda' if gpu else 'cpu'), torch=torch.__version__,
        timm=timm.__version__)), flush=True)
