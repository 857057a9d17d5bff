"""Images a second of every embedded weight at batch 1, in train form and fused, in turns.

    OMP_NUM_THREADS=1 python -m scripts.weights.weights_speed

In eval mode the train form folds its weights anew for every image. A round runs each form ten times and takes the
median. Writes results/weights_speed.csv, then run scripts/weights/push_to_hub.py for the cards.
"""
import argparse
import time
from datetime import date
from importlib.metadata import version
from statistics import median, quantiles

import timm
import torch
from timm.data import resolve_data_config

from scripts.report import RESULTS, command, cpu_name, write_rows
from timm_finet import fuse_fbn
from timm_finet.hub.pretrained import MODULES

ROUNDS, RUNS = 100, 10


@torch.inference_mode()
def measure(name):
    """The images' size in pixels, and milliseconds of each form, one median a round."""
    model = timm.create_model(name, pretrained=True).eval()
    forms = {'train': model, 'fused': fuse_fbn(model)}
    x = torch.randn(1, *resolve_data_config(model=model, use_test_size=True)['input_size'])
    times = {form: [] for form in forms}
    for i in range(ROUNDS + 1):
        for form, network in forms.items():
            each = []
            for _ in range(RUNS):
                start = time.perf_counter()
                network(x)
                each.append(time.perf_counter() - start)
            if i:  # the first round warms up
                times[form].append(1e3 * median(each))
    return x.shape[-1], times


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in timm.list_models(module=MODULES, pretrained=True):
        size, measured = measure(name)
        for form, times in measured.items():
            low, _, high = quantiles(times, n=4)
            rows.append(dict(
                model=name, form=form, runtime='PyTorch eager', threads=1, img_size=size,
                images_per_second=round(1e3 / median(times), 1), ms=round(median(times), 3), ms_low=round(low, 3),
                ms_high=round(high, 3), rounds=ROUNDS, runs=RUNS, device=cpu_name(), torch=version('torch'),
                timm=version('timm'), date=date.today(), command=command()))
    write_rows(RESULTS / 'weights_speed.csv', rows)


if __name__ == '__main__':
    main()
