"""Compare the times of functions on a machine with other work: in turns, after a warm-up, by medians."""
import time
from statistics import median, quantiles

import torch
from torch.profiler import ProfilerActivity, profile


def seconds(run, device='cpu'):
    if device == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def in_turns(runs, rounds, repeats=1, device='cpu'):
    """Seconds of each of the functions `runs`, one value per round: the median of `repeats` calls.

    An additional first round warms up and does not count.
    """
    times = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            middle = median(seconds(run, device) for _ in range(repeats))
            if i:
                times[name].append(middle)
    return times


def spread(name, values, digits):
    """Median and quartiles, as columns of a results file."""
    low, _, high = quantiles(values, n=4)
    return {name: round(median(values), digits), f'{name}_low': round(low, digits), f'{name}_high': round(high, digits)}


def peak_bytes(run, device='cpu'):
    """Peak of the bytes that `run` allocates in addition to those held before."""
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = sorted(
        (e.start_ns(), e.nbytes()) for e in prof.profiler.kineto_results.events() if e.name() == '[memory]')
    peak = held = 0
    for _, size in events:
        held += size
        peak = max(peak, held)
    return peak
