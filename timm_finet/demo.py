"""`timm-finet demo`: classify images with embedded weights, before and after fusion, and draw what was seen."""
import time
from statistics import median
from typing import List, Sequence, Tuple

import timm
import torch
from timm.data import create_transform, resolve_data_config
from tqdm import tqdm

from .flops import count_flops
from .images import contact_sheet, find_images, read_images, shipped_images
from .output import check_output
from .rewrite import fuse_fbn

__all__ = ['demo']

SHIPPED = 'finet_small_g4.cifar10'  # for the shipped images
PHOTOGRAPHS = 'finet_large_se_g4.tiny_in200'  # for one's own
BATCH = 50


@torch.inference_mode()
def classify(networks: Sequence[torch.nn.Module], x: torch.Tensor) -> List[Tuple[torch.Tensor, float]]:
    """Each network's logits for `x` `(n, 3, H, W)` and its images a second: median over batches, taken in turns."""
    logits, seconds = [[] for _ in networks], [[] for _ in networks]
    for network in networks:
        network(x[:BATCH])  # warm-up
    for part in tqdm(x.split(BATCH), unit='batch'):
        for network, outputs, times in zip(networks, logits, seconds):
            start = time.perf_counter()
            outputs.append(network(part))
            times.append((time.perf_counter() - start) / len(part))
    return [(torch.cat(outputs), 1 / median(times)) for outputs, times in zip(logits, seconds)]


def demo(paths: Sequence[str] = (), output: str = 'finet_demo.png') -> None:
    """Classify the shipped images or those at `paths`, print what it took, and write a contact sheet."""
    check_output(output)
    name = PHOTOGRAPHS if paths else SHIPPED
    model = timm.create_model(name, pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model, use_test_size=True))
    images, labels = (read_images(find_images(paths)), None) if paths else shipped_images()
    x = torch.stack([transform(image) for image in images])

    print(f'{name} on {len(images)} images, {torch.get_num_threads()} threads')
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
    probabilities, guesses = (t.tolist() for t in logits.softmax(1).max(1))
    if labels is None:
        titles = [f'{classes[guess]} {probability:.0%}' for guess, probability in zip(guesses, probabilities)]
        print(*titles, sep='\n')
        contact_sheet(images, titles, [True] * len(images), output, size=128)
    else:
        right = [guess == label for guess, label in zip(guesses, labels)]
        titles = [
            classes[guess] + ('\n' if ok else f'\n({classes[label]})')
            for guess, label, ok in zip(guesses, labels, right)]
        contact_sheet(images, titles, right, output)
    print(f'wrote {output}')
