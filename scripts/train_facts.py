"""For train.py's --device-modules: print, when training ends, where and with which versions it ran, and its peak of memory.

The peak is of the bytes that PyTorch has allocated on the GPU over the whole run, evaluation and pictures held there included.
"""
import atexit
import json
import platform

import timm
import torch


@atexit.register
def report():
    gpu = torch.cuda.is_available()
    print('facts: ' + json.dumps(dict(
        peak_mb=round(torch.cuda.max_memory_allocated() / 2 ** 20) if gpu else None,
        device=torch.cuda.get_device_name() if gpu else platform.machine(),
        torch=torch.__version__, timm=timm.__version__)), flush=True)
