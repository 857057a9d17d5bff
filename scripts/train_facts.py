"""For train.py's --device-modules: print the device, the versions and the peak memory when training ends.

On a GPU, the peak is that of PyTorch's allocations over the whole run, including evaluation and images held there.
Without a GPU, it is that of the process's resident memory, including libraries and the data set.
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
