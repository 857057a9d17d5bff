"""`timm-finet run`: timm's own scripts, which its wheel lacks, run with our models and data sets registered."""
import argparse
import math
import os
import runpy
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import List

import timm.utils
import torch
import yaml

from .gloo import allow_cpu

__all__ = ['resolve', 'run']

SCRIPTS = ('train', 'validate', 'benchmark', 'inference', 'onnx_export')
URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models'
RECIPES = Path(__file__).parent / 'recipes'
ROOM = 64 << 20  # bytes, about a checkpoint of finet_large_se with momentum


def find_script(name: str) -> Path:
    """The file of a script: a path, or a bare name in `$TIMM_SCRIPTS`, then in a cache filled from timm's repository.

    Raises:
        FileNotFoundError: It is in none of them and cannot be fetched.
    """
    if name.endswith('.py') or os.sep in name:
        if not Path(name).is_file():
            raise FileNotFoundError(f'SCRIPT={name!r} does not exist: give the path of a script of timm, or its bare name.')
        return Path(name)
    if 'TIMM_SCRIPTS' in os.environ:
        path = Path(os.environ['TIMM_SCRIPTS'], f'{name}.py')
        if path.is_file():
            return path
    if name not in SCRIPTS:
        raise FileNotFoundError(f"SCRIPT={name!r} is unknown: use one of {', '.join(SCRIPTS)}, or a path.")
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


def check_output(args: List[str]) -> None:
    """Write and delete ROOM bytes where train.py, which finds out at its first checkpoint, will save its runs.

    Raises:
        OSError: That cannot be done.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('-c', '--config')
    parser.add_argument('--output')
    known, _ = parser.parse_known_args(args)
    if known.output is None and known.config:
        known.output = yaml.safe_load(Path(known.config).read_text()).get('output')
    output = Path(known.output or './output/train')
    folder = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
    except OSError as error:
        raise OSError(
            f'--output={str(output)!r} cannot be written to ({error}): name a folder, on a disk with {ROOM >> 20} MB to '
            'spare for each checkpoint.') from error


def resolve(script: str, args: List[str]) -> List[str]:
    """The command line of a script of timm, in whose `args` `recipe:NAME` stands for a recipe's file."""
    command = [str(find_script(script)), *map(find_recipe, args)]
    if Path(command[0]).stem == 'train' and os.environ.get('RANK', '0') == '0':
        check_output(command[1:])
    return command


def run(argv: List[str]) -> None:
    """Run a script as `__main__`. It finds our models and data sets registered, as this package has been imported."""
    fuse, update = timm.utils.reparameterize_model, timm.utils.AverageMeter.update

    def fuse_in_eval_mode(model, inplace=False):
        return fuse(model.eval(), inplace)

    def update_or_stop(self, val, n=1):
        if math.isnan(val):
            raise SystemExit('The loss is nan: resume from the last checkpoint with a lower --lr, or without float16.')
        update(self, val, n)

    # For --reparam: the scripts fuse before they call .eval(), which we refuse elsewhere. All of them fuse to infer.
    timm.utils.reparameterize_model = timm.utils.model.reparameterize_model = fuse_in_eval_mode
    if Path(argv[0]).stem == 'train':  # which goes on with a loss that is nan, and wants a GPU for several processes
        timm.utils.AverageMeter.update = update_or_stop
        allow_cpu()
    sys.argv = argv
    runpy.run_path(argv[0], run_name='__main__')
