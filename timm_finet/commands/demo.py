"""`timm-finet demo`: classify images with embedded weights, before and after fusion, and draw the results."""
import sys
import time
from pathlib import Path
from statistics import median
from typing import Dict, List, Sequence, Tuple

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from tqdm import tqdm

from ..data.files import check_output
from ..flops import count_flops
from ..images import contact_sheet, find_images, read_image, shipped_images
from ..rewrite import fuse_fbn

__all__ = ['demo']

SHIPPED = 'finet_small_g4.cifar10'  # for the shipped images
PHOTOGRAPHS = 'finet_large_se_g4.tiny_in200'  # for the user's own images
BATCH = 50
TOP = 3  # classes that are printed for each of the user's images


def count(number: int, noun: str) -> str:
    """'1 image', '2 images'."""
    return f'{number} {noun}' + 's' * (number != 1)


@torch.inference_mode()
def classify(networks: Sequence[torch.nn.Module], x: torch.Tensor) -> List[Tuple[torch.Tensor, float]]:
    """Logits of each network for `x` `(n, 3, H, W)`, and images per second: median over batches, timed in turns."""
    logits, seconds = [[] for _ in networks], [[] for _ in networks]
    for network in networks:
        network(x[:BATCH])  # warm-up
    for part in tqdm(x.split(BATCH), unit='batch'):
        for network, outputs, times in zip(networks, logits, seconds):
            start = time.perf_counter()
            outputs.append(network(part))
            times.append((time.perf_counter() - start) / len(part))
    return [(torch.cat(outputs), 1 / median(times)) for outputs, times in zip(logits, seconds)]


def read_what_can_be(files: Sequence[Path]) -> Tuple[Dict[Path, Image.Image], List[str]]:
    """Images of the files that can be read, and for each of the other files the reason, which names the file."""
    images, errors = {}, []
    for file in files:
        try:
            images[file] = read_image(file)
        except (OSError, ValueError) as error:
            errors.append(error)
    if len(errors) == 1 == len(files):
        raise errors[0]
    if not images:
        raise ValueError(f'none of {len(files)} files can be read; the first: {errors[0]}')
    return images, [str(error) for error in errors]


def demo(paths: Sequence[str] = (), output: str = 'finet_demo.png') -> bool:
    """Classify the shipped images or those at `paths`, print accuracy, cost and speed, and write a contact sheet.

    Returns:
        Whether every file was read. The reasons for skipped files are printed.

    Raises:
        ValueError, OSError: `output` cannot be written, a folder is empty, or no file can be read.
    """
    check_output(output)
    if paths:
        name, labels = PHOTOGRAPHS, None
        files, reasons = read_what_can_be(find_images(paths))
        images = list(files.values())
    else:
        name, reasons = SHIPPED, []
        images, labels = shipped_images()
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model, use_test_size=True))
    x = torch.stack([transform(image) for image in images])

    print(f"{name} on {count(len(images), 'image')}, {count(torch.get_num_threads(), 'thread')}")
    networks = (model, fuse_fbn(model))
    results = classify(networks, x)
    print('form        top-1  parameters  multiply-adds  images/s')
    for form, network, (logits, speed) in zip(('train form', 'fused'), networks, results):
        top1 = '-' if labels is None else f'{(logits.argmax(1) == torch.tensor(labels)).double().mean().item():.2%}'
        counts = count_flops(network, tuple(x.shape[1:]))
        macs = counts['conv'] + counts['linear']
        print(f'{form:<10} {top1:>6}  {counts["params"]:>10,}  {macs:>13,}  {speed:>10.0f}')
    print(f'largest difference of the logits: {(results[0][0] - results[1][0]).abs().max().item():.1e}')

    classes = model.pretrained_cfg['label_names']
    probabilities, guesses = results[1][0].softmax(1).topk(TOP)
    if labels is None:
        titles = []
        for file, ps, cs in zip(files, probabilities.tolist(), guesses.tolist()):
            named = [f'{classes[c]} {p:.0%}' for p, c in zip(ps, cs)]
            print(f"{file}: {', '.join(named)}")
            titles.append(named[0])
        print(
            f'The network knows only {len(classes)} classes: '
            'for an image of anything else the percentages mean little.')
        contact_sheet(images, titles, [True] * len(images), output, size=128)
    else:
        pairs = list(zip(guesses[:, 0].tolist(), labels))
        titles = [f'{classes[g]}\n' if g == label else f'{classes[g]}\n({classes[label]})' for g, label in pairs]
        contact_sheet(images, titles, [g == label for g, label in pairs], output)
    print(f'wrote {output}')
    for reason in reasons:
        print(f'timm-finet demo: skipped: {reason}', file=sys.stderr)
    return not reasons
