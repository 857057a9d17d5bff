"""`timm-finet run`: run timm's own scripts, which its wheel lacks, with our models and data sets registered."""
import os
import runpy
import signal
import sys
import urllib.request
from pathlib import Path
from typing import List, Optional

import timm
import torch

from .arguments import check_arguments

__all__ = ['resolve', 'run']

SCRIPTS = ('train', 'validate', 'benchmark', 'inference', 'onnx_export')
URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models'
RECIPES = Path(__file__).parents[1] / 'recipes'


def find_script(name: str) -> Path:
    """Find the file of a script, given by its path or its bare name.

    A bare name is looked up in `$TIMM_SCRIPTS` or, if that is not set, in a cache filled from timm's repository.
    """
    if name.endswith('.py') or os.sep in name:
        if not Path(name).is_file():
            raise FileNotFoundError(
                f'SCRIPT={name!r} does not exist: give the path of a script of timm, or its bare name.')
        return Path(name)
    folder, tag = os.environ.get('TIMM_SCRIPTS'), f'v{timm.__version__}'
    path = Path(folder or Path(torch.hub.get_dir(), 'timm_scripts', tag), f'{name}.py')
    if path.is_file():
        return path
    if name not in SCRIPTS:
        raise FileNotFoundError(f"SCRIPT={name!r} is unknown: use one of {', '.join(SCRIPTS)}, or a path.")
    if folder:
        raise FileNotFoundError(
            f'TIMM_SCRIPTS={folder!r} holds no {name}.py: set it to a checkout of timm at tag {tag}, or unset it.')
    fetch(f'{URL}/{tag}/{name}.py', path)
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
            f'{url} cannot be fetched ({error}). Give the path of the script, set TIMM_SCRIPTS to a '
            f'checkout of timm at tag v{timm.__version__}, or put the file at {path}.') from error
    finally:
        part.unlink(missing_ok=True)


def find_recipe(name: str) -> str:
    """Replace `recipe:NAME` by the recipe's file; return any other string as it is."""
    if not name.startswith('recipe:'):
        return name
    path = RECIPES / f"{name.removeprefix('recipe:')}.yaml"
    if not path.is_file():
        names = ', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml')))
        raise FileNotFoundError(f'{name!r} is unknown: use one of {names}, or the path of a YAML file.')
    return str(path)


def resolve(script: str, args: List[str]) -> List[str]:
    """Make the command line of a timm script; `recipe:NAME` in `args` stands for a recipe's file."""
    return [str(find_script(script)), *map(find_recipe, args)]


def run(argv: List[str], command: Optional[str] = None) -> None:
    """Run a script as `__main__`, with our models and data sets registered by the import of this package.

    Args:
        argv: The script's path and its arguments. Wrong arguments end the process with one line and status 2.
        command: The command of `timm-finet` that this line names, by default `run` and the script.

    Raises:
        KeyboardInterrupt: After Ctrl-C, which train.py itself treats as the end of training.
    """
    path, *args = argv
    script, interrupts = Path(path).stem, []

    def interrupt(number, frame):
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    if script in SCRIPTS:
        try:
            args = check_arguments(path, args)
        except (OSError, ValueError) as error:
            print(f'timm-finet {command or f"run {script}"}: {error}', file=sys.stderr)
            sys.exit(2)
    sys.argv = [path, *args]
    runpy.run_path(path, run_name='__main__')
    if interrupts:
        raise KeyboardInterrupt
