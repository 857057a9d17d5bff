"""`timm-finet run`: timm's own scripts, which its wheel lacks, run with our models and data sets registered."""
import os
import runpy
import sys
import urllib.request
from pathlib import Path
from typing import List

import timm.utils
import torch

__all__ = ['resolve', 'run']

SCRIPTS = ('train', 'validate', 'benchmark', 'inference', 'onnx_export')
URL = 'https://raw.githubusercontent.com/huggingface/pytorch-image-models'
RECIPES = Path(__file__).parent / 'recipes'


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


def resolve(script: str, args: List[str]) -> List[str]:
    """The command line of a script of timm, in whose `args` `recipe:NAME` stands for a recipe's file."""
    return [str(find_script(script)), *map(find_recipe, args)]


def run(argv: List[str]) -> None:
    """Run a script as `__main__`. It finds our models and data sets registered, as this package has been imported."""
    fuse = timm.utils.reparameterize_model

    def fuse_in_eval_mode(model, inplace=False):
        return fuse(model.eval(), inplace)

    # For --reparam: the scripts fuse before they call .eval(), which we refuse elsewhere. All of them fuse to infer.
    timm.utils.reparameterize_model = timm.utils.model.reparameterize_model = fuse_in_eval_mode
    sys.argv = argv
    runpy.run_path(argv[0], run_name='__main__')
