"""Images per second of all embedded weights at batch size 1, in train form and fused, timed in turns.

    OMP_NUM_THREADS=1 python -m scripts.weights.weights_speed

In eval mode, the train form folds its weights again for every image. A round runs each form ten times and takes the
median. This writes results/weights_speed.csv; afterwards, run scripts/weights/push_to_hub.py to update the cards.
"""
from statistics import median

import timm
import torch
from timm.data import resolve_data_config

from scripts.report import RESULTS, command_line, facts, write_rows
from scripts.timing import in_turns, spread
from scripts.weights.validate_weights import NAMES
from timm_finet import fuse_fbn

ROUNDS, RUNS = 100, 10


@torch.inference_mode()
def measure(name):
    model = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(1, *resolve_data_config(model=model, use_test_size=True)['input_size'])
    fused = fuse_fbn(model)
    for form, times in in_turns(dict(train=lambda: model(x), fused=lambda: fused(x)), ROUNDS, RUNS).items():
        yield dict(
            model=name, form=form, runtime='PyTorch eager', threads=1, img_size=x.shape[-1],
            images_per_second=round(1 / median(times), 1), **spread('ms', [1e3 * t for t in times], 3),
            rounds=ROUNDS, runs=RUNS, **facts())


def main():
    command_line(__doc__).parse_args()
    torch.set_num_threads(1)
    write_rows(RESULTS / 'weights_speed.csv', [row for name in NAMES for row in measure(name)])


if __name__ == '__main__':
    main()
