"""`timm-finet finetune`: fine-tune a network on class folders, and draw its confusion matrix and mistakes."""
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

BATCH = 64  # as in the recipes
MISTAKES = 60  # how many are drawn, the most confident first
SET_HERE = ('--class-map', '--data-dir', '--dataset', '--experiment', '--model')


def start_from(weights: str) -> List[str]:
    """Options with which train.py builds the network of `weights`, a name or a checkpoint, and starts from them."""
    if not Path(weights).is_file():
        if not weights.startswith(('hf-hub:', 'local-dir:')) and not is_model_pretrained(weights):
            known = list_models(pretrained=True)
            raise ValueError(
                f"--weights={weights!r} is unknown: use {', '.join(list_models(module=MODULES, pretrained=True))}, "
                f'another of the {len(known)} names of timm, hf-hub:ORG/NAME, local-dir:FOLDER or a checkpoint of '
                'train.py.')
        return ['--model', weights]
    name = training_args(Path(weights)).get('model')
    if not name:
        raise ValueError(
            f'--weights={weights!r} has no training arguments: give a checkpoint of train.py, or put its args.yaml '
            'beside the file.')
    model, args = load_checkpoint(weights, name)
    cfg, model_kwargs = model.pretrained_cfg, args.get('model_kwargs') or {}
    options = ['--model', name, '--pretrained-path', weights]
    if model_kwargs:
        options += ['--model-kwargs', *(f'{key}={value!r}'.replace(' ', '') for key, value in model_kwargs.items())]
    for key in ('input_size', 'mean', 'std'):
        options += [f"--{key.replace('_', '-')}", *map(str, cfg[key])]
    return options


def check_options(options: Sequence[str]) -> None:
    """Raise ValueError for an option of train.py that finetune sets itself or does not support."""
    names = [option.split('=')[0] for option in options]
    for name in SET_HERE:
        if name in names:
            raise ValueError(
                f'{name} cannot be used with finetune: use FOLDER, --weights NAME.TAG and --output FOLDER instead.')
    if '--in-chans' in names:
        raise ValueError(
            '--in-chans cannot be used with finetune: all images are read in three channels, grey ones too.')


def prepare(
        folder: str, weights: Optional[str], output: Optional[str], options: Sequence[str],
) -> Tuple[List[str], str, Path]:
    """Check the arguments and images, split the images if necessary, and make train.py's command line.

    The split images are links in the output folder.

    Returns:
        The command line, the network's name for train.py, and the output folder.

    Raises:
        ValueError, OSError: An argument or an image is wrong; no file is left behind.
    """
    start = start_from(weights or PHOTOGRAPHS)
    check_options(options)
    data = Path(folder).absolute()
    output = Path(output or Path('output', 'finetune', data.name))
    check_output(str(output))
    last, links = output / 'last.pth.tar', output.absolute() / 'images'
    resumes = last.is_file() and any(option.split('=')[0] == '--resume' for option in options)
    if output.is_dir() and any(output.iterdir()) and not resumes:
        raise ValueError(f'--output={str(output)!r} is not empty: name another folder, or continue '
                         f'with --resume {shlex.quote(str(last))}.')
    if resumes and links.is_dir():
        data = links  # keep the split, even if images have been added since
    training, validation = find_images(data)
    is_split_here = validation is None
    if is_split_here:
        data = links
        training, validation = hold_out(training)
    count, held = sum(map(len, training.values())), sum(map(len, validation.values()))
    batch = ['--batch-size', str(count)] if count < BATCH else []  # train.py drops an incomplete batch
    command = run.resolve('train', [
        '--config', 'recipe:finetune', *batch, *start, *options, '--dataset', 'torch/photographs',
        '--data-dir', str(data), '--output', str(output.parent), '--experiment', output.name])
    if is_split_here:
        try:
            link({'train': training, 'validation': validation}, links)
        except OSError as error:
            clear(output)
            raise OSError(f'--output={str(output)!r} cannot hold links to the images ({error.strerror}): name a folder '
                          'on a disk that can; on Windows, turn on Developer Mode.') from error
    print(f'{len(training)} classes, {count} images to train on and {held} to validate on', flush=True)
    return command, start[1], output


def clear(output: Path) -> None:
    """Remove the output folder if it has no checkpoint; `prepare` has checked that it was empty or missing."""
    if not (output / 'last.pth.tar').is_file():
        shutil.rmtree(output, ignore_errors=True)


def train(command: List[str], weights: str, output: Path) -> None:
    """Run train.py, then report; a run that ends before its first checkpoint leaves no file behind."""
    try:
        run.run(command, 'finetune')
    finally:
        clear(output)
    report(output, weights)


def report(output: Path, weights: str) -> None:
    """Test the best checkpoint on the validation images, draw confusions and mistakes, and print the next steps."""
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
        print('and see its card; without --dry-run, push it to the Hub:', shlex.join(['timm-finet', *push]), sep='\n')


@torch.inference_mode()
def classify(model: nn.Module, dataset: Dataset, device: str, workers: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """A network's probabilities `(images, classes)` for the images of a data set, and their labels."""
    dataset.transform = create_transform(**resolve_data_config(model=model, use_test_size=True))
    model.to(device)
    probabilities, labels = [], []
    for x, y in tqdm(DataLoader(dataset, BATCH, num_workers=workers), 'validate', unit='batch'):
        probabilities.append(model(x.to(device)).softmax(1).cpu())
        labels.append(y)
    return torch.cat(probabilities), torch.cat(labels)
