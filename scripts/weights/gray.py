"""How well the weights for photographs recognise gray images: bees, one of their classes, in colour and in gray.

    python -m scripts.weights.gray DATA  # DATA/{train,val}/bees, from github.com/jaddoescad/ants_and_bees

Writes results/gray.csv.
"""
from pathlib import Path

import timm
import torch
from timm.data import create_transform, resolve_model_data_config

from scripts.report import RESULTS, command_line, facts, write_rows
from timm_finet.images import read_images


@torch.inference_mode()
def measure(data):
    colour = read_images(sorted(data.glob('*/bees/*.jpg')))
    looks = dict(colour=colour, gray=[image.convert('L').convert('RGB') for image in colour])
    for name in timm.list_pretrained('finet_*.tiny_in200'):
        model = timm.create_model(name, pretrained=True).eval()
        transform = create_transform(**resolve_model_data_config(model, use_test_size=True))
        bee = model.pretrained_cfg['label_names'].index('bee')
        for look, images in looks.items():
            best = torch.cat([model(transform(image)[None]).topk(5).indices for image in images]) == bee
            yield dict(
                weights=name, images=len(images), look=look, top1=round(100 * best[:, 0].float().mean().item(), 1),
                top5=round(100 * best.any(1).float().mean().item(), 1), **facts(DATA=data))


def main():
    parser = command_line(__doc__)
    parser.add_argument('data', type=Path)
    write_rows(RESULTS / 'gray.csv', list(measure(parser.parse_args().data)))


if __name__ == '__main__':
    main()
