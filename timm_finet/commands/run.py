"""`timm-finet run`: timm's own scripts, which its wheel lacks, run with our models and data sets registered."""
import argparse
import difflib
import importlib
import os
import re
import runpy
import signal
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import timm.utils
import torch
from timm.models import is_model

from ..data.datasets import DATASETS, FOLDERS
from ..hub.checkpoint import class_names, one_line
from . import timm_patches
from .names import hint

__all__ = ['resolve', 'run']

SCRIPTS = ('train', 'validate', 'benchmark', 'inference', 'onnx_export')
URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models'
RECIPES = Path(__file__).parents[1] / 'recipes'
ROOM = 64 << 20  # bytes, about a checkpoint of finet_large_se with momentum


def find_script(name: str) -> Path:
    """The file of a script: a path, or a bare name in `$TIMM_SCRIPTS`.

    Without that, a bare name is looked up in a cache filled from timm's repository.

    Raises:
        FileNotFoundError: It is in none of them and cannot be fetched.
    """
    if name.endswith('.py') or os.sep in name:
        if not Path(name).is_file():
            raise FileNotFoundError(
                f'SCRIPT={name!r} does not exist: give the path of a script of timm, or its bare name.')
        return Path(name)
    folder = os.environ.get('TIMM_SCRIPTS')
    if folder:
        path = Path(folder, f'{name}.py')
        if path.is_file():
            return path
    if name not in SCRIPTS:
        raise FileNotFoundError(f"SCRIPT={name!r} is unknown: use one of {', '.join(SCRIPTS)}, or a path.")
    if folder:
        raise FileNotFoundError(
            f'TIMM_SCRIPTS={folder!r} holds no {name}.py: '
            f'set it to a checkout of timm at tag v{timm.__version__}, or unset it.')
    path = Path(torch.hub.get_dir(), 'timm_scripts', f'v{timm.__version__}', f'{name}.py')
    if not path.is_file():
        fetch(f'{URL}/v{timm.__version__}/{name}.py', path)
    return path


def fetch(url: str, path: Path) -> None:
    part = path.with_name(f'{path.name}.{os.getpid()}')
    try:
        with urllib.request.urlopen(url, timeout=30) as reply:
            source = reply.read()
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(source)
        part.replace(path)
    except OSError as error:
        raise FileNotFoundError(
            f'{url} cannot be fetched ({error}). Three ways out: give the path of the script; set TIMM_SCRIPTS to a '
            f'checkout of timm at tag v{timm.__version__}; or put the file at {path}.') from error
    finally:
        part.unlink(missing_ok=True)


def find_recipe(name: str) -> str:
    """The file of `recipe:NAME`; any other string stays.

    Raises:
        FileNotFoundError: There is no recipe of that name.
    """
    if not name.startswith('recipe:'):
        return name
    path = RECIPES / f"{name.removeprefix('recipe:')}.yaml"
    if not path.is_file():
        names = ', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml')))
        raise FileNotFoundError(f'{name!r} is unknown: use one of {names}, or the path of a YAML file.')
    return str(path)


def resolve(script: str, args: List[str]) -> List[str]:
    """The command line of a script of timm, in whose `args` `recipe:NAME` stands for a recipe's file."""
    return [str(find_script(script)), *map(find_recipe, args)]


def check_output(output: Optional[str]) -> None:
    """Write and delete ROOM bytes where train.py, which finds out at its first checkpoint, will save its runs.

    Raises:
        OSError: That cannot be done.
    """
    output = Path(output or './output/train')
    folder = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        raise OSError(
            f'--output={str(output)!r} cannot be written to ({error}): name a folder, on a disk with {ROOM >> 20} MB '
            'to spare for each checkpoint.') from error


def check_names(args: Dict[str, Any]) -> None:
    """Raise ValueError or FileNotFoundError for a network, a file or a folder that a script of timm would not find."""
    model = args.get('model') or ''
    is_local = ':' not in model and not Path(model).is_file()  # validate.py takes a file of names, and patterns
    if is_local and model not in ('', 'all') and not set('*?') & set(model) and not is_model(model.split('/')[-1]):
        raise ValueError(f'--model={model!r} is unknown: {hint(model, timm.list_models())}')
    try:
        timm.get_pretrained_cfg(model)
    except RuntimeError as error:
        raise ValueError(f'--model={model!r} is unknown: {error}') from error
    for key in ('checkpoint', 'resume', 'initial_checkpoint', 'pretrained_path'):
        if args.get(key) and ':' not in args[key] and not Path(args[key]).exists():
            raise FileNotFoundError(f"--{key.replace('_', '-')}={args[key]!r} does not exist.")
    dataset = args.get('dataset')
    if dataset in FOLDERS or dataset in DATASETS and dataset != 'torch/cifar10_sample':
        root = args.get('data_dir') or args.get('data')
        if not root:
            raise ValueError('--data-dir is missing: give the folder of the data set.')
        if not Path(root).exists() and not args.get('dataset_download'):
            raise FileNotFoundError(f'--data-dir={root!r} does not exist: give the folder of the data set.')


def check_device(device: Optional[str]) -> None:
    """Raise ValueError for a device on the command line that torch does not know, or a GPU that it does not find."""
    try:
        is_cuda = device is not None and torch.device(device).type == 'cuda'
    except RuntimeError as error:
        raise ValueError(f'--device={device!r} is no device of torch: use cpu or cuda, for example.') from error
    if is_cuda and not torch.cuda.is_available():
        raise ValueError(f'--device={device!r} cannot be used, torch finds no such GPU here: use --device cpu.')


def count_classes(args: Dict[str, Any]) -> Optional[int]:
    """How many classes the data set of train.py's or validate.py's arguments has, where that can be told."""
    try:
        names = class_names({'train_split': args.get('split'), **args})
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--data-dir={args.get('data_dir') or args.get('data')!r}: {one_line(error)}") from error
    return names and len(names)


def complete(script: str, args: argparse.Namespace, device: Optional[str]) -> None:
    """Check the arguments of a script of timm before its work begins; give train.py's a device and a number of classes.

    Args:
        device: The one on the command line.

    Raises:
        ValueError, OSError: An argument is wrong.
    """
    for module in getattr(args, 'device_modules', None) or ():  # the scripts do so later: one may register --model
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f'--device-modules={module!r} cannot be imported: {error}') from error
    check_names(vars(args))
    check_device(device)
    is_train = script == 'train'
    if not is_train and (script != 'validate' or args.num_classes is None):
        return
    classes, chosen = count_classes(vars(args)), {}
    if args.num_classes is not None and classes and args.num_classes != classes:
        raise ValueError(f'--num-classes={args.num_classes} does not fit: the data set has {classes} classes.')
    if not is_train:
        return
    if args.num_classes is None:
        if args.pretrained and not classes:
            raise ValueError(
                '--num-classes is missing, and the data set does not tell it: give the number of its classes.')
        if classes:
            args.num_classes = chosen['--num-classes'] = classes
    if device is None and args.device == 'cuda' and not torch.cuda.is_available():  # which is train.py's default
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device('cpu')
        args.device = chosen['--device'] = found.type
    cfg = timm.get_pretrained_cfg(args.model)
    if args.pretrained and cfg and cfg.has_weights and not (args.input_size or args.img_size):
        chosen['--img-size'] = f'{cfg.input_size[-1]} of the weights'
    if os.environ.get('RANK', '0') == '0':
        check_output(args.output)
        if chosen:
            options = ', '.join(f'{option} {value}' for option, value in chosen.items())
            print(f'timm-finet run train: takes {options}, as nothing else was given.', file=sys.stderr)


def explain(message: str, options: Iterable[str]) -> str:
    """argparse's message, with what may have been meant by an option that is none of `options`."""
    unknown = re.match('unrecognized arguments: (--[^ =]+)', message)
    near = difflib.get_close_matches(unknown[1], options, 1) if unknown else []
    return message + ''.join(f': did you mean {option}?' for option in near)


def run(argv: List[str], command: Optional[str] = None) -> None:
    """Run a script as `__main__`. It finds our models and data sets registered, as this package has been imported.

    Args:
        argv: The script's path and its arguments. What is wrong with them ends the process with one line and status 2.
        command: That of `timm-finet` which that line names, by default `run` and the script.

    Raises:
        KeyboardInterrupt: At Ctrl-C, which train.py takes for its end.
    """
    script = Path(argv[0]).stem
    command = command or f'run {script}'
    parse = argparse.ArgumentParser.parse_args
    interrupts = []

    def parse_and_complete(self, args=None, namespace=None):
        argparse.ArgumentParser.parse_args = parse
        # argparse's own prints the usage as well, 200 lines of train.py's.
        self.error = lambda message: self.exit(
            2, f'timm-finet {command}: {explain(message, self._option_string_actions)}\n')
        # Its own default would not tell whether the device was given.
        namespace = parse(self, args, argparse.Namespace(device=None))
        device = namespace.device
        namespace.device = device or self.get_default('device')
        try:
            complete(script, namespace, device)
        except (OSError, ValueError) as error:
            self.exit(2, f'timm-finet {command}: {error}\n')
        return namespace

    def interrupt(number, frame):
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    if script in SCRIPTS:
        argparse.ArgumentParser.parse_args = parse_and_complete
    timm_patches.fuse_in_eval_mode()
    if script == 'train':
        timm_patches.stop_at_nan()
        timm_patches.delete_torn_checkpoints()
        timm_patches.train_on_several_cpus()
        if not torch.accelerator.is_available():
            timm_patches.keep_buffers()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    sys.argv = argv
    runpy.run_path(argv[0], run_name='__main__')
    if interrupts:
        raise KeyboardInterrupt
