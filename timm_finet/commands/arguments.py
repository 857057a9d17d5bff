"""Check the arguments of timm's scripts before the work begins, and choose what train.py's arguments leave open."""
import difflib
import importlib
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm
import torch
import yaml
from timm.models import is_model

from ..data.class_names import class_names
from ..data.datasets import DATASETS, FOLDERS
from ..hub.checkpoint import one_line
from .names import hint

__all__ = ['check_arguments', 'check_output']

ROOM = 64 << 20  # bytes, about a checkpoint of finet_large_se with momentum


def check_arguments(path: str, args: List[str]) -> List[str]:
    """Check the arguments of a timm script with its own parser, for which the script is imported.

    A script that would run on import, or that has no parser, is not checked.

    Returns:
        The arguments, for train.py after those that `choose` adds.

    Raises:
        ValueError, OSError: An argument is wrong.
    """
    is_importable = re.search(r"^if __name__ == ['\"]__main__['\"]:", Path(path).read_text(encoding='utf-8'), re.M)
    script = runpy.run_path(path) if is_importable else {}
    if 'parser' not in script:
        return args
    options = parse(script, args)
    has_device = any(arg.split('=')[0] == '--device' for arg in args)
    for module in options.get('device_modules') or ():  # a module may register the --model that is checked next
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f'--device-modules={module!r} cannot be imported: {error}') from error
    check_names(options)
    if has_device:
        check_device(options['device'])
    if Path(path).stem == 'validate' and options.get('num_classes') is not None:
        count_classes(options)
    return [*choose(options, has_device), *args] if Path(path).stem == 'train' else args


def parse(script: Dict[str, Any], args: List[str]) -> Dict[str, Any]:
    """Parse arguments with a script's own parsers."""
    parser, config_parser = script['parser'], script.get('config_parser')

    def fail(message):  # argparse would also print the usage, 200 lines for train.py
        unknown = re.match('unrecognized arguments: (--[^ =]+)', message)
        near = unknown and difflib.get_close_matches(unknown[1], re.findall(r'--[\w-]+', parser.format_help()), 1)
        raise ValueError(f'{message}: did you mean {near[0]}?' if near else message)

    parser.error = fail
    if config_parser:
        config_parser.error = fail
        known, args = config_parser.parse_known_args(args)
        if known.config:
            parser.set_defaults(**yaml.safe_load(Path(known.config).read_text(encoding='utf-8')))
    return vars(parser.parse_args(args))


def check_names(options: Dict[str, Any]) -> None:
    """Raise ValueError or FileNotFoundError for a network, a file or a folder that a script of timm would not find."""
    model = options.get('model') or ''
    # validate.py also accepts patterns, and a file of names
    is_one_name = model not in ('', 'all') and not re.search('[:*?]', model) and not Path(model).is_file()
    if is_one_name and not is_model(model.split('/')[-1]):
        raise ValueError(f'--model={model!r} is unknown: {hint(model, timm.list_models())}')
    try:
        timm.get_pretrained_cfg(model)
    except RuntimeError as error:
        raise ValueError(f'--model={model!r} is unknown: {error}') from error
    for key in ('checkpoint', 'resume', 'initial_checkpoint', 'pretrained_path'):
        file = options.get(key)
        if file and ':' not in file and not Path(file).exists():
            raise FileNotFoundError(f"--{key.replace('_', '-')}={file!r} does not exist.")
    dataset, folder = options.get('dataset'), options.get('data_dir') or options.get('data')
    if dataset in FOLDERS or dataset in DATASETS and dataset != 'torch/cifar10_sample':
        if not folder:
            raise ValueError('--data-dir is missing: give the folder of the data set.')
        if not Path(folder).exists() and not options.get('dataset_download'):
            raise FileNotFoundError(f'--data-dir={folder!r} does not exist: give the folder of the data set.')


def check_device(device: str) -> None:
    """Raise ValueError for a device that torch does not know, or a GPU that it does not find."""
    try:
        is_cuda = torch.device(device).type == 'cuda'
    except RuntimeError as error:
        raise ValueError(f'--device={device!r} is not a device of torch: use cpu or cuda, for example.') from error
    if is_cuda and not torch.cuda.is_available():
        raise ValueError(f'--device={device!r} cannot be used because torch finds no such GPU here: use --device cpu.')


def count_classes(options: Dict[str, Any]) -> Optional[int]:
    """Number of classes of the data set, or None if unknown; ValueError if --num-classes is another number."""
    try:
        names = class_names({'train_split': options.get('split'), **options})  # validate.py calls it --split
    except (RuntimeError, AssertionError) as error:
        folder = options.get('data_dir') or options.get('data')
        raise ValueError(f'--data-dir={folder!r}: {one_line(error)}') from error
    given, found = options.get('num_classes'), names and len(names)
    if given and found and given != found:
        raise ValueError(f'--num-classes={given} does not fit: the data set has {found} classes.')
    return found


def choose(options: Dict[str, Any], has_device: bool) -> List[str]:
    """Options that train.py needs and that were not given; the first process prints them."""
    chosen, classes = [], count_classes(options)
    if options.get('num_classes', 0) is None:
        if classes:
            chosen.append(f'--num-classes={classes}')
        elif options['pretrained']:
            raise ValueError(
                '--num-classes is missing and cannot be read from the data set: give its number of classes.')
    if options.get('device') == 'cuda' and not has_device and not torch.cuda.is_available():  # cuda is the default
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device('cpu')
        chosen.append(f'--device={found.type}')
    if os.environ.get('RANK', '0') == '0':
        check_output(options.get('output'))
        said = [option.replace('=', ' ') for option in chosen]
        cfg = timm.get_pretrained_cfg(options.get('model') or '')
        has_size = options.get('input_size') or options.get('img_size')
        if options.get('pretrained') and cfg and cfg.has_weights and not has_size:
            said.append(f'--img-size {cfg.input_size[-1]} from the weights')
        if said:
            print(f"timm-finet run train: uses {', '.join(said)}, as nothing else was given.", file=sys.stderr)
    return chosen


def check_output(output: Optional[str]) -> None:
    """Write and delete ROOM bytes where train.py saves its runs, as it would fail only at its first checkpoint.

    Raises:
        OSError: They cannot be written.
    """
    output = Path(output or './output/train')
    folder = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        raise OSError(
            f'--output={str(output)!r} cannot be written to ({error}): name a folder on a disk with {ROOM >> 20} MB '
            'free for each checkpoint.') from error
