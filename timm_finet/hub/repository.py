"""Model repositories for the Hugging Face Hub: save a network with its card, push both as one commit."""
import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Literal, Optional, Union

import timm
import torch
import torch.nn as nn
import yaml
from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # HTTPError is the HTTP package's
from timm.data import resolve_input_data_config
from timm.models import get_model_args, is_model_in_modules, list_models

from ..rewrite import fuse_fbn
from .card import make_card, read_results
from .checkpoint import load_checkpoint, one_line, read_run
from .pretrained import MODULES

__all__ = ['push', 'push_checkpoint', 'save', 'save_for_hf']

LOCAL_ARGS = (
    'class_map', 'config', 'data', 'data_dir', 'experiment', 'initial_checkpoint', 'output', 'pretrained_path',
    'resume')


def read_names(file: str, num_classes: int) -> List[str]:
    """Read class names from a text file, one per line in the order of the outputs."""
    names = [line.strip() for line in Path(file).read_text(encoding='utf-8').splitlines() if line.strip()]
    if len(names) != num_classes:
        raise ValueError(
            f'--class-names {file!r} has {len(names)} names, but the network has {num_classes} classes: '
            'give one name per line.')
    return names


def save_for_hf(
        model: nn.Module, folder: str, safe_serialization: Union[bool, Literal['both']] = True, **kwargs: Any) -> None:
    """Save any network of timm as timm's `save_for_hf` does, in a folder that transformers can load too.

    The arguments are timm's, but by default only safetensors are written. The config's `input_size` is the size that
    the weights are tested at, because transformers ignores `test_input_size`.

    Raises:
        ValueError: `create_model` does not rebuild the network, so the folder could not be loaded. Nothing is written.
    """
    kwargs = {'data_config': resolve_input_data_config(model, use_test_size=True), **kwargs}
    with TemporaryDirectory() as saved:
        timm.models.save_for_hf(model, saved, safe_serialization=safe_serialization, **kwargs)
        file = Path(saved) / 'config.json'
        config = json.loads(file.read_text())
        config.get('model_args', {}).pop('num_classes', None)  # transformers passes the one at the top level
        names = config['pretrained_cfg'].get('label_names')
        if names:  # in transformers' keys, as it saves `label_names` unchanged after fine-tuning on other classes
            config['id2label'] = dict(enumerate(names))
            config['label2id'] = {name: i for i, name in enumerate(names)}
        file.write_text(json.dumps(config, indent=2))
        check_loading(saved, config['architecture'])
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in Path(saved).iterdir():  # copytree would also make the folder as private as the temporary one
            shutil.copy(file, folder)


def check_loading(folder: str, architecture: str) -> None:
    try:
        with torch.random.fork_rng(devices=[]):
            timm.create_model(f'local-dir:{folder}', pretrained=True)
    except RuntimeError as error:  # from load_state_dict
        raise ValueError(
            f'The folder could not be loaded, because create_model({architecture!r}) builds another network than this '
            f'one. If create_model was followed by convert_fbn, for example, save model.state_dict() instead, and load '
            f'it into a network that was converted in the same way. ({one_line(error)})') from error


def save(
        model: nn.Module, folder: str, card: ModelCard, args: Optional[Dict[str, Any]] = None,
        log: Optional[str] = None) -> None:
    """Write a model repository: timm's config.json and model.safetensors, the card, training arguments and log."""
    save_for_hf(model, folder)
    folder = Path(folder)
    card.save(folder / 'README.md')
    if args:
        (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    if log:
        shutil.copyfile(log, folder / 'summary.csv')


def push(folder: str, repo_id: str, private: bool = False, revision: Optional[str] = None) -> str:
    """Push a folder written by `save` as one commit, or as none if nothing has changed.

    timm's `push_to_hf_hub` does the same, but keeps an old card, or writes its own in a repository without one.

    Returns:
        The address of the commit.

    Raises:
        RuntimeError: There is no token, no permission to write, or no network. The repository is then unchanged, or
            new and empty.
    """
    if not get_token():
        raise RuntimeError('There is no token for the Hub: run `hf auth login`, or set HF_TOKEN.')
    api = HfApi(library_name='timm', library_version=timm.__version__)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message='Add model').commit_url
    except (HTTPError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f'--repo-id {repo_id}: {why_refused(error)}. A push is one commit or none: push again.') from error


def why_refused(error: Exception) -> str:
    answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
    if not isinstance(answer, HfHubHTTPError):
        return f'{constants.ENDPOINT} cannot be reached or closed the connection ({one_line(error)})'
    status = answer.response.status_code
    if status == 401:
        return 'the token is not valid: run `hf auth login`, or set HF_TOKEN'
    return 'the token has no permission to write to it' if status in (403, 404) else one_line(error)


def push_checkpoint(
        checkpoint: str, name: str, repo_id: str, private: bool = False, revision: Optional[str] = None,
        fused: bool = False, results: Optional[str] = None, class_names: Optional[str] = None,
        dry_run: bool = False) -> None:
    """`timm-finet push`: push a checkpoint with its card, arguments and log; a dry run prints what it would push."""
    if repo_id.count('/') != 1:
        raise ValueError(f'--repo-id {repo_id!r} must be ORG/NAME.')
    if not is_model_in_modules(name, MODULES):
        raise ValueError(f"--model {name!r} is unknown: use one of {', '.join(list_models(module=MODULES))}.")
    model, args = load_checkpoint(checkpoint, name)
    run = read_run(checkpoint, args)
    run.args = {key: value for key, value in args.items() if key not in LOCAL_ARGS}
    if class_names:
        model.pretrained_cfg['label_names'] = read_names(class_names, model.num_classes)
    if fused:
        model = fuse_fbn(model, inplace=True)
    elif get_model_args(model)['fused']:
        raise ValueError(f'checkpoint={checkpoint!r} is in fused form: add --fused to push it.')
    if not model.pretrained_cfg['label_names']:
        print(
            'The class names are not known, so images get numbers: add the names with --class-names FILE.',
            file=sys.stderr)
    rows = read_results(results, name) if results else []
    source = f'hf-hub:{repo_id}' + (f'@{revision}' if revision else '')
    with TemporaryDirectory() as folder:
        save(model, folder, make_card(model, name, source, run, rows), run.args, run.log)
        if not dry_run:
            print(push(folder, repo_id, private, revision))
            return
        print((Path(folder) / 'README.md').read_text(encoding='utf-8'))
        print(f'Would push to {repo_id}' + (f', branch {revision}' if revision else '') + ':')
        for file in sorted(Path(folder).iterdir()):
            print(f'{file.stat().st_size:>12,}  {file.name}')
