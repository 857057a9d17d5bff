"""Load checkpoints of timm's train.py as the networks that were trained, built as the training arguments say."""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import timm
import torch
import torch.nn as nn
import yaml
from timm.data import resolve_data_config
from timm.models import is_model, is_model_in_modules, is_model_pretrained, load_state_dict
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from ..data.class_names import class_names
from ..data.datasets import DATASETS, UNKNOWN
from ..rewrite import fuse_fbn
from .pretrained import MODULES, UNTRAINED

__all__ = ['Run', 'load_checkpoint', 'read_run']


def load_checkpoint(checkpoint: str, name: str) -> Tuple[nn.Module, Dict[str, Any]]:
    """Load the network of a checkpoint of train.py or of a state dict, in train or fused form as it was saved.

    EMA weights are used if the checkpoint has them.

    Args:
        checkpoint: Path of the checkpoint. Its training arguments, inside it or in `args.yaml` beside it, determine how
            the network is built and how its input is preprocessed.
        name: Any network of timm. Without training arguments, its tag, or the lack of one, determines the same.

    Returns:
        The network in eval mode, with a `pretrained_cfg` that describes these weights, and the training arguments.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint of that network, or its weights are not finite.
    """
    path = Path(checkpoint)
    if not path.is_file():
        reason = 'is a folder: give a file in it' if path.is_dir() else 'does not exist'
        raise FileNotFoundError(f'checkpoint={str(checkpoint)!r} {reason}.')
    try:
        weights, args = load_state_dict(str(path)), training_args(path)
        for key, weight in weights.items():
            if not isinstance(weight, torch.Tensor):
                raise TypeError(f'{key} is not a tensor')
    except Exception as error:  # torch and safetensors raise many kinds of errors for other files
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} cannot be read as a checkpoint of timm's train.py or torch.save: "
            f'{one_line(error)}') from error
    for key, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(
                f'checkpoint={str(checkpoint)!r} has values that are not finite in {key}: use an earlier one.')
    try:
        model = build(name, weights, args)
        describe(model, args)
    except Exception as error:  # wrong arguments can fail anywhere in timm
        raise ValueError(f'checkpoint={str(checkpoint)!r} does not fit {name}: {one_line(error)}') from error
    return model, args


def one_line(error: Exception) -> str:
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) < 200 else f'{text[:200]} ...'


def training_args(path: Path) -> Dict[str, Any]:
    if path.suffix != '.safetensors':
        args = load_checkpoint_metadata(path).get('args')
        if args is not None:
            return vars(args)
    beside = path.with_name('args.yaml')
    if not beside.is_file():
        return {}
    args = yaml.safe_load(beside.read_text())
    if not isinstance(args, dict) or not isinstance(args.get('model', ''), str):
        raise ValueError(f'{beside} does not hold the arguments of train.py, with a name as model.')
    return args


@dataclass
class Run:
    """How weights were trained.

    Args:
        args: The arguments of train.py.
        log: Path of its summary.csv.
        epochs: Number of epochs after which the weights were saved.
        top1: Top-1 of the weights in percent, as measured by train.py.
        base: The weights that training began from: a name, a file's name, or '' for random ones.
    """

    args: Dict[str, Any] = field(default_factory=dict)
    log: Optional[Path] = None
    epochs: Optional[int] = None
    top1: Optional[float] = None
    base: str = ''


def read_run(checkpoint: str, args: Dict[str, Any]) -> Run:
    """Collect what is known about the run that saved a checkpoint; epochs and top-1 are those of the checkpoint."""
    run, log = Run(args, base=first_weights(args)), Path(checkpoint).with_name('summary.csv')
    if log.is_file():
        run.log = log
    if Path(checkpoint).suffix != '.safetensors':
        saved = load_checkpoint_metadata(checkpoint)
        run.epochs = None if saved.get('epoch') is None else saved['epoch'] + 1
        if getattr(saved.get('args'), 'eval_metric', 'top1') == 'top1':
            run.top1 = saved.get('metric')
    return run


def first_weights(args: Dict[str, Any]) -> str:
    for key in ('initial_checkpoint', 'pretrained_path'):
        if args.get(key):
            return Path(args[key]).name
    if not args.get('pretrained'):
        return ''
    cfg = timm.get_pretrained_cfg(args['model'], allow_unregistered=True)
    tag = cfg.tag if cfg and cfg.tag and '.' not in args['model'] else ''
    return f"{args['model']}.{tag}" if tag else args['model']


def build(name: str, weights: Dict[str, torch.Tensor], args: Dict[str, Any]) -> nn.Module:
    """Build the network `name` as train.py did with `args`, and load the weights."""
    built_as, architecture = args.get('model', name), name.split('.')[0]
    is_ours = is_model_in_modules(architecture, MODULES)
    # pretrained=True builds the network as its tag says. A run that began from a file may have used a name without
    # pretrained weights.
    by_tag = args.get('pretrained', False) and not (args.get('pretrained_path') and not is_model_pretrained(built_as))
    model = timm.create_model(
        built_as, pretrained=is_ours and by_tag, **sizes(name, weights, args), global_pool=args.get('gp'),
        bn_eps=args.get('bn_eps'), **args.get('model_kwargs') or {}).eval()
    # A registered function may build another network and change it, as users' own modules do.
    if is_model(name) and architecture not in (built_as.split('.')[0], model.pretrained_cfg['architecture']):
        raise ValueError(f'it was trained as {built_as}.')
    if is_ours and not any(key.endswith('running_var') for key in weights):
        model = fuse_fbn(model, inplace=True)
    model.load_state_dict(weights)
    return model


def sizes(name: str, weights: Dict[str, torch.Tensor], args: Dict[str, Any]) -> Dict[str, Optional[int]]:
    """Numbers of classes and input channels, from the last and first layer or else from train.py's arguments."""
    cfg = timm.get_pretrained_cfg(args.get('model', name), allow_unregistered=True)
    cfg = cfg or timm.get_pretrained_cfg(name, allow_unregistered=True)
    found = dict(num_classes=args.get('num_classes'), in_chans=args.get('in_chans'))
    if not found['in_chans'] and args.get('input_size'):
        found['in_chans'] = args['input_size'][0]
    if cfg and f'{cfg.classifier}.weight' in weights:
        found['num_classes'] = weights[f'{cfg.classifier}.weight'].shape[0]
    # Networks other than ours may pass `in_chans` to their first layer in another way.
    if cfg and is_model_in_modules(name.split('.')[0], MODULES) and f'{cfg.first_conv}.weight' in weights:
        found['in_chans'] = weights[f'{cfg.first_conv}.weight'].shape[1]
    return found


def describe(model: nn.Module, args: Dict[str, Any]) -> None:
    """Change `model.pretrained_cfg`, which came with the name, to describe the weights trained with `args`."""
    cfg = dict(model.pretrained_cfg)
    data = resolve_data_config(args, model=model)
    data['input_size'] = (getattr(model, 'in_chans', data['input_size'][0]), *data['input_size'][1:])
    if data['input_size'] != cfg['input_size']:
        data['pool_size'] = None
    try:
        names = class_names(args) if args else cfg.get('label_names')
    except (RuntimeError, AssertionError, ValueError, OSError):  # the folder has changed since training
        names = None
    cfg.update(
        data, num_classes=model.num_classes, label_names=names if names and len(names) == model.num_classes else None)
    if args:
        dataset = DATASETS.get(args.get('dataset'), UNKNOWN)
        cfg.update(
            tag=None, notes=None, test_input_size=None, description=f'trained on {dataset.title}', license=None)
    elif cfg['tag'] == UNTRAINED:
        cfg['tag'] = None
    model.pretrained_cfg = model.default_cfg = cfg
