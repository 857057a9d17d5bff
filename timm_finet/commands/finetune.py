"""`timm-finet finetune`: class folders in; a fine-tuned network, its confusion and its mistakes out."""
import shlex
import shutil
from pathlib import Path
from typing import List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.models import is_model_in_modules, is_model_pretrained, list_models
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.class_folders import find_images, hold_out, link
from ..hub.checkpoint import load_checkpoint, training_args
from ..hub.pretrained import MODULES
from ..images import contact_sheet, draw_confusion, read_images
from . import run
from .arguments import check_output
from .demo import PHOTOGRAPHS

__all__ = ['draw_confusion', 'prepare', 'train']

BATCH = 64  # of the recipes
MISTAKES = 60  # drawn, the surest first
SET_HERE = ('--class-map', '--data-dir', '--dataset', '--experiment', '--model')


def start_from(weights: str) -> List[str]:
    """train.py's options that build the network of these weights and begin from them.

    Args:
        weights: A name of timm's, ours among them, `hf-hub:ORG/NAME`, `local-dir:FOLDER`, or a checkpoint of train.py.

    Raises:
        ValueError: They are none of these.
    """
    if not Path(weights).is_file():
        if not weights.startswith(('hf-hub:', 'local-dir:')) and not is_model_pretrained(weights):
            known = list_models(pretrained=True)
            raise ValueError(
                f"--weights={weights!r} are unknown: use {', '.join(list_models(module=MODULES, pretrained=True))}, "
                f'another of the {len(known)} of timm, hf-hub:ORG/NAME, local-dir:FOLDER or a checkpoint of train.py.')
        return ['--model', weights]
    name = training_args(Path(weights)).get('model')
    if not name:
        raise ValueError(f'--weights={weights!r} has no arguments of train.py in it, or in args.yaml beside it.')
    model, args = load_checkpoint(weights, name)
    cfg, model_kwargs = model.pretrained_cfg, args.get('model_kwargs') or {}
    options = ['--model', name, '--pretrained-path', weights]
    if model_kwargs:
        options += ['--model-kwargs', *(f'{key}={value!r}'.replace(' ', '') for key, value in model_kwargs.items())]
    for key in ('input_size', 'mean', 'std'):
        options += [f"--{key.replace('_', '-')}", *map(str, cfg[key])]
    return options


def check_options(options: Sequence[str]) -> None:
    """Raise ValueError for an option of train.py that finetune gives by itself, or cannot take."""
    names = [option.split('=')[0] for option in options]
    for name in SET_HERE:
        if name in names:
            raise ValueError(f'{name} is not for finetune: give images as FOLDER, --weights NAME.TAG, --output FOLDER.')
    if '--in-chans' in names:
        raise ValueError('--in-chans is not for finetune: all images are read in three channels, grey ones too.')


def prepare(
        folder: str, weights: Optional[str], output: Optional[str], options: Sequence[str],
) -> Tuple[List[str], str, Path]:
    """Check the arguments and the images, link these where they are to be split, and make train.py's command line.

    Returns:
        The command line, the network as train.py gets it, and the output folder.

    Raises:
        ValueError, OSError: Something is wrong with them; nothing is left behind.
    """
    start = start_from(weights or PHOTOGRAPHS)
    check_options(options)
    data = Path(folder).absolute()
    output = Path(output or Path('output', 'finetune', data.name))
    check_output(str(output))
    last, links = output / 'last.pth.tar', output.absolute() / 'images'
    resumes = last.is_file() and any(option.split('=')[0] == '--resume' for option in options)
    if output.is_dir() and any(output.iterdir()) and not resumes:
        raise ValueError(f'--output={str(output)!r} is not empty: name another folder, or go on '
                         f'with --resume {shlex.quote(str(last))}.')
    if resumes and links.is_dir():
        data = links  # the split stays, whatever came since
    training, validation = find_images(data)
    is_split_here = validation is None
    if is_split_here:
        data = links
        training, validation = hold_out(training)
    count, held = sum(map(len, training.values())), sum(map(len, validation.values()))
    batch = ['--batch-size', str(count)] if count < BATCH else []  # train.py drops what does not fill a batch
    command = run.resolve('train', [
        '--config', 'recipe:finetune', *batch, *start, *options, '--dataset', 'torch/photographs',
        '--data-dir', str(data), '--output', str(output.parent), '--experiment', output.name])
    if is_split_here:
        try:
            link({'train': training, 'validation': validation}, links)
        except OSError as error:
            clear(output)
            raise OSError(f'--output={str(output)!r} cannot hold links to the images ({error.strerror}): name a folder '
                          'on a disk that can, and on Windows turn on its Developer Mode.') from error
    print(f'{len(training)} classes, {count} images to train on and {held} to validate on', flush=True)
    return command, start[1], output


def clear(output: Path) -> None:
    """Remove an output folder without a checkpoint. It was empty or missing before, or `prepare` had refused it."""
    if not (output / 'last.pth.tar').is_file():
        shutil.rmtree(output, ignore_errors=True)


def train(command: List[str], weights: str, output: Path) -> None:
    """Run train.py, then report; what ends before the first checkpoint leaves nothing behind."""
    try:
        run.run(command, 'finetune')
    finally:
        clear(output)
    report(output, weights)


def report(output: Path, weights: str) -> None:
    """Judge the best checkpoint by the validation images, draw its confusion and mistakes, print what comes next."""
    checkpoint = output / 'model_best.pth.tar'
    model, args = load_checkpoint(str(checkpoint), weights)
    names = model.pretrained_cfg['label_names']
    dataset = create_dataset('torch/photographs', args['data_dir'], 'validation')
    probabilities, labels = classify(model, dataset, args['device'], args['workers'])
    sure, guesses = probabilities.max(1)
    right = guesses == labels
    print(f'{checkpoint}: {right.double().mean().item():.2%} of {len(labels)} validation images right')

    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    confusion.index_put_((labels, guesses), torch.tensor(1), accumulate=True)
    draw_confusion(confusion.tolist(), names, str(output / 'confusion.png'))
    print(f"wrote {output / 'confusion.png'}")

    by_sureness = sure.argsort(descending=True)
    mistakes = [i for i in by_sureness.tolist() if not right[i]][:MISTAKES]
    if mistakes:
        files = dataset.filenames(absolute=True)
        titles = [f'{names[guesses[i]]:.16} {sure[i]:.0%}\nnot {names[labels[i]]:.16}' for i in mistakes]
        images = read_images([files[i] for i in mistakes])
        contact_sheet(images, titles, [False] * len(images), str(output / 'mistakes.png'), size=112)
        print(f"wrote {output / 'mistakes.png'}")

    name = model.pretrained_cfg['architecture']
    fuse = ['export', name, '--to', 'onnx', '--checkpoint', str(checkpoint), '--output', str(output / f'{name}.onnx')]
    print('next, fuse it into a file for a phone:', shlex.join(['timm-finet', *fuse]), sep='\n')
    if is_model_in_modules(name, MODULES):
        push = ['push', str(checkpoint), '--model', name, '--repo-id', 'ORG/NAME', '--dry-run']
        print('and see its card, which goes to the Hub without --dry-run:', shlex.join(['timm-finet', *push]), sep='\n')


@torch.inference_mode()
def classify(model: nn.Module, dataset: Dataset, device: str, workers: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The probabilities `(images, classes)` that a network gives to the images of a data set, and their labels."""
    dataset.transform = create_transform(**resolve_data_config(model=model, use_test_size=True))
    model.to(device)
    probabilities, labels = [], []
    for x, y in tqdm(DataLoader(dataset, BATCH, num_workers=workers), 'validate', unit='batch'):
        probabilities.append(model(x.to(device)).softmax(1).cpu())
        labels.append(y)
    return torch.cat(probabilities), torch.cat(labels)
