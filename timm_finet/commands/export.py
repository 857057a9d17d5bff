"""`timm-finet export`: write a fused network as an ONNX or ExecuTorch file, float32 or int8, after checking it."""
import math
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import timm
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_input_data_config
from timm.utils import reparameterize_model

from ..data.datasets import CIFAR10
from ..data.files import check_output, replace_file
from ..flops import least_size
from ..hub.checkpoint import load_checkpoint
from ..images import TRAINING_IMAGES, find_images, read_images, shipped_images
from ..rewrite import fuse_fbn
from .names import find_names
from .runtimes import load_executorch, load_onnx, to_executorch, to_onnx

__all__ = ['export']

SUFFIXES = {'onnx': '.onnx', 'executorch': '.pte'}
WRITE = {'onnx': to_onnx, 'executorch': to_executorch}
LOAD = {'onnx': load_onnx, 'executorch': load_executorch}

CALIBRATION = 400  # the most images that are used: more hardly change int8's ranges

# A file is written only if it agrees with the fused network in PyTorch on the images that it is checked on.
LEAST_AGREEMENT = {'float32': 1.0, 'int8': 0.95}  # share of images with equal top-1; int8 changes a few
LARGEST_DIFFERENCE = 1e-3  # of the logits, as a share of the largest logit; for float32 only


def build(name: str, checkpoint: Optional[str] = None) -> nn.Module:
    """Build a fused network with a checkpoint's weights, in either form, else its pretrained ones, else random ones."""
    from_hub = name.startswith(('hf-hub:', 'local-dir:'))
    if not from_hub:
        find_names([name])
    if checkpoint is None:
        model = timm.create_model(name, pretrained=from_hub or timm.get_pretrained_cfg(name).has_weights)
    else:
        model, _ = load_checkpoint(checkpoint, name)
    return fuse_fbn(reparameterize_model(model.eval(), inplace=True), inplace=True)


def make_config(name: str, model: nn.Module, img_size: Optional[int] = None) -> Dict[str, Any]:
    """timm's data config for testing the weights, with square images of `img_size` pixels if it is given."""
    if img_size is None:
        return resolve_input_data_config(model, use_test_size=True)
    least = least_size(model)
    if img_size < least:
        raise ValueError(
            f'--img-size={img_size} is too small for {name}, which reduces its input by a factor of {least}: '
            f'give at least {least}.')
    try:
        return resolve_input_data_config(model, {'img_size': img_size}, use_test_size=True)
    except ValueError as error:  # the network accepts only one size
        raise ValueError(f'--img-size={img_size} does not fit {name}: {error}') from error


def make_metadata(name: str, model: nn.Module, config: Dict[str, Any], dynamic_batch: bool = False) -> Dict[str, str]:
    """Metadata of a file: its classes, and the preprocessing of its input, from timm's data `config`.

    Values are plain words or Python literals; numbers and lists are valid JSON too. ultralytics reads the first seven
    keys.
    """
    channels, *size = config['input_size']
    names = model.pretrained_cfg.get('label_names') or map(str, range(model.num_classes))
    facts = dict(
        names=dict(enumerate(names)), imgsz=size, task='classify', stride=1, batch=1, channels=channels,
        args=dict(dynamic=dynamic_batch),
        name=name, mean=list(config['mean']), std=list(config['std']),
        crop_pct=config['crop_pct'], crop_mode=config['crop_mode'], interpolation=config['interpolation'])
    return {key: str(value) for key, value in facts.items()}


def check_options(output: Path, to: str, int8: bool, calibration: Sequence[str], dynamic_batch: bool) -> None:
    if output.suffix in SUFFIXES.values() and output.suffix != SUFFIXES[to]:
        raise ValueError(f'output={str(output)!r} does not fit --to {to}: its name must end in {SUFFIXES[to]}.')
    if calibration and not int8:
        raise ValueError(f'calibration={calibration} needs --int8.')
    if dynamic_batch and to != 'onnx':
        raise ValueError(f'--dynamic-batch does not work with --to {to}: leave it out, or use --to onnx.')
    check_output(output)


def calibration_images(name: str, paths: Sequence[str], knows_cifar10: bool) -> List[Image.Image]:
    if paths:
        files = find_images(paths)
        step = math.ceil(len(files) / CALIBRATION)  # the files are in order, so every class gets its share
        return read_images(files[::step])
    if not knows_cifar10:
        raise ValueError(
            f'calibration is missing: give training images of {name}, or folders of them, as the shipped images are '
            'from CIFAR-10.')
    return shipped_images(TRAINING_IMAGES)[0]


def print_input(name: str, precision: str, config: Dict[str, Any], dynamic_batch: bool) -> None:
    shape = 'x'.join(map(str, ('N' if dynamic_batch else 1, *config['input_size'])))
    print(f"{name}, fused, {precision}; input {shape}, mean {config['mean']}, std {config['std']}, "
          f"crop_pct {config['crop_pct']} ({config['crop_mode']}), interpolation {config['interpolation']}")


@torch.no_grad()
def compare(
        model: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, batch: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits of the fused network and of the file for images `x` `(n, 3, H, W)`; the file gets `batch` at a time."""
    return torch.cat([model(part) for part in x.split(50)]), torch.cat([run(part).clone() for part in x.split(batch)])


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def export(
        name: str, to: str, output: Optional[str] = None, int8: bool = False, checkpoint: Optional[str] = None,
        calibration: Sequence[str] = (), img_size: Optional[int] = None, dynamic_batch: bool = False) -> None:
    """Write a network to a file, unless the file disagrees with PyTorch; print its preprocessing and the agreement.

    An ONNX file contains the metadata of `make_metadata`.

    Args:
        name: Any network of timm, including ours.
        to: 'onnx' or 'executorch'.
        output: The file to write, by default named after the network, in the current folder.
        int8: Post-training quantisation, weights per channel, calibrated on images.
        checkpoint: Weights, in train or fused form, instead of the pretrained ones. The arguments in a checkpoint of
            train.py determine the size and preprocessing of the input.
        calibration: Images, or folders of them, also with one folder per class; at most `CALIBRATION` of them are used.
            By default 100 training images of CIFAR-10, for networks with its classes.
        img_size: Height and width of the input, by default the size that the weights are tested at.
        dynamic_batch: Accept any number of images at a time, instead of one; ONNX only.

    Raises:
        ValueError, FileNotFoundError: An argument is wrong.
        RuntimeError: A package or the weights are missing, or the file disagrees with PyTorch.
    """
    precision = 'int8' if int8 else 'float32'
    output = Path(output or name.replace(':', '_').replace('/', '_') + ('.int8' if int8 else '') + SUFFIXES[to])
    check_options(output, to, int8, calibration, dynamic_batch)
    model = build(name, checkpoint)
    config = make_config(name, model, img_size)
    transform = create_transform(**config)
    knows_cifar10 = tuple(model.pretrained_cfg.get('label_names') or ()) == CIFAR10.classes
    images, labels = shipped_images()
    of, calibrating = 'test images of CIFAR-10', None
    if int8:
        chosen = calibration_images(name, calibration, knows_cifar10)
        calibrating = torch.stack([transform(image) for image in chosen])
        if not knows_cifar10:  # on images of other classes the agreement of int8 would be chance
            images, of = chosen, 'calibration images'
    x = torch.stack([transform(image) for image in images])

    options = {}
    if to == 'onnx':
        options = dict(metadata=make_metadata(name, model, config, dynamic_batch), dynamic_batch=dynamic_batch)
    with replace_file(output) as part:
        WRITE[to](model, x[:1], part, calibrating, **options)
        expected, got = compare(model, LOAD[to](part), x, batch=50 if dynamic_batch else 1)
        agreement, size = accuracy(got, expected.argmax(1)), Path(part).stat().st_size
        difference, largest = (expected - got).abs().max().item(), expected.abs().max().item()
        print_input(name, precision, config, dynamic_batch)
        if checkpoint is None and not (model.pretrained_cfg.get('hf_hub_id') or model.pretrained_cfg.get('file')):
            print('the weights are random: the network has no pretrained ones, and no --checkpoint was given')
        print(f'top-1 as in PyTorch: {agreement:.2%} of {len(x)} {of}; '
              f'largest difference of the logits: {difference:.2g}, largest logit: {largest:.2g}')
        if knows_cifar10:
            labels = torch.tensor(labels)
            print(f'right: {accuracy(expected, labels):.2%} in PyTorch, {accuracy(got, labels):.2%} in the file')
        if not (agreement >= LEAST_AGREEMENT[precision] and (int8 or difference <= LARGEST_DIFFERENCE * largest)):
            limit = '' if int8 else f' and a difference of {LARGEST_DIFFERENCE:g} of the largest logit at most'
            raise RuntimeError(
                f'{output} is not written because it disagrees with PyTorch: '
                f'{LEAST_AGREEMENT[precision]:.0%} equal top-1{limit} are required.')
    print(f'wrote {output}, {size / 2 ** 20:.2f} MiB')
