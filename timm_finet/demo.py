"""`timm-finet demo`: classify images with an embedded network, before and after fusion, and draw what it saw."""
import time
from pathlib import Path
from statistics import median
from typing import List, Sequence, Tuple

import timm
import torch
from PIL import Image, ImageDraw, ImageOps
from timm.data import create_transform, resolve_data_config
from tqdm import tqdm

from .data import shipped_images
from .flops import count_flops
from .output import check_output, replace_file
from .rewrite import fuse_fbn

__all__ = ['demo']

MODEL = 'finet_small_g4.cifar10'
BATCH = 50


def find_images(paths: Sequence[str]) -> List[Path]:
    """Image files, and all files in folders and the folders in these, but for hidden ones.

    Raises:
        ValueError: A folder is empty.
    """
    files = []
    for path in map(Path, paths):
        found = sorted(p for p in path.rglob('*') if p.is_file() and p.name[0] != '.') if path.is_dir() else [path]
        if not found:
            raise ValueError(f'{path} is an empty folder: give images, or folders that hold some.')
        files += found
    return files


def read_images(files: Sequence[Path]) -> List[Image.Image]:
    """Read image files.

    Raises:
        ValueError: A file is no image, or has too many pixels.
        FileNotFoundError: There is no such file.
    """
    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(image.convert('RGB'))
        except FileNotFoundError as error:
            raise FileNotFoundError(f'{file} does not exist: give images, or folders that hold some.') from error
        except Image.DecompressionBombError as error:
            raise ValueError(f'{file} has more pixels than Pillow takes for safe: give a smaller image.') from error
        except (SyntaxError, OSError) as error:  # UnidentifiedImageError is an OSError
            raise ValueError(f'{file} is not an image that Pillow can read.') from error
    return images


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


def contact_sheet(
        images: Sequence[Image.Image], names: Sequence[str], right: Sequence[bool], file: str, size: int = 64,
) -> None:
    """Draw images, cut to squares, with the names below them, in red where not right."""
    label, columns = 14 * (1 + names[0].count('\n')), min(1280 // size, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new('RGB', (columns * size, rows * (size + label)), 'white')
    draw = ImageDraw.Draw(sheet)
    for i, (image, name, ok) in enumerate(zip(images, names, right)):
        x, y = i % columns * size, i // columns * (size + label)
        sheet.paste(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC), (x, y))
        fill = 'black' if ok else 'red'
        draw.text((x + size // 2, y + size), name, fill=fill, anchor='ma', align='center', font_size=10)
    with replace_file(file) as part:
        sheet.save(part, format='PNG')


def demo(paths: Sequence[str] = (), output: str = 'finet_demo.png') -> None:
    """Classify the shipped images or those at `paths`, print what it took, and write a contact sheet."""
    check_output(output)
    model = timm.create_model(MODEL, pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    images, labels = (read_images(find_images(paths)), None) if paths else shipped_images()
    x = torch.stack([transform(image) for image in images])

    print(f'{MODEL} on {len(images)} images, {torch.get_num_threads()} threads')
    networks = (model, fuse_fbn(model))
    results = classify(networks, x)
    print('form        top-1  parameters  multiply-adds  images/s')
    for form, network, (logits, speed) in zip(('train form', 'fused'), networks, results):
        top1 = '-' if labels is None else f'{(logits.argmax(1) == torch.tensor(labels)).double().mean().item():.2%}'
        counts = count_flops(network)
        macs = counts['conv'] + counts['linear']
        print(f'{form:<10} {top1:>6}  {counts["params"]:>10,}  {macs:>13,}  {speed:>10.0f}')
    print(f'largest difference of the logits: {(results[0][0] - results[1][0]).abs().max().item():.1e}')

    classes = model.pretrained_cfg['label_names']
    probabilities, guesses = (t.tolist() for t in logits.softmax(1).max(1))
    names = [classes[guess] for guess in guesses]
    if labels is None:
        for name, probability in zip(names, probabilities):
            print(f'{name} {probability:.0%}')
    contact_sheet(images, names, [labels is None or g == labels[i] for i, g in enumerate(guesses)], output)
    print(f'wrote {output}')
