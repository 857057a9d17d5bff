"""Choose, find and verify the weights that `pretrained=True` loads."""
import hashlib
import warnings
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, Dict, Optional

import torch.nn as nn
from huggingface_hub import hf_hub_download
from timm.models import (
    PretrainedCfg, build_model_with_cfg, get_arch_pretrained_cfgs, list_models, resolve_pretrained_cfg)
from timm.models._input import update_model_args

from ..data.datasets import WEIGHTS

__all__ = ['build_model']

MODULES = ['finet', 'resnet_fbn']  # our modules, by timm's names
FUNCTIONAL = ('small_input', 'act_place')  # arguments that change the function but not the shape of any weight
SOURCES = ('file', 'url', 'hf_hub_id', 'state_dict')  # keys of a cfg that say where its weights come from
UNTRAINED = 'untrained'  # tag of the paper's networks: 224 px, 1000 classes


def build_model(
        model_cls, variant: str, pretrained: bool = False, trained_with: Optional[Dict[str, Dict[str, Any]]] = None,
        **kwargs: Any) -> nn.Module:
    """Call timm's `build_model_with_cfg`, with strict rules for `pretrained=True`.

    - A tag's weights come from the embedded file, or else from the Hub; the file must have the recorded sha256.
    - Without a tag, `in1k` is loaded or, with a warning, the first tag registered with weights.
    - A source that the caller gives is used as it is: `hf-hub:`, `local-dir:`, or one in the cfg or its overlay.
    - Networks for images up to 32 px get the small-input stem. Names in `trained_with` ('architecture.tag') get the
      arguments given there. Weights load only with the arguments that they were trained with.
    - Every network records these arguments and its form, and timm's `save_for_hf` writes them.

    Raises:
        RuntimeError: There are no such weights, or the file is not the recorded one.
        ValueError: An argument would make the network compute another function than the weights were trained for.
        FileNotFoundError: The embedded file is missing, and the tag has no repository on the Hub.
    """
    cfg = kwargs.pop('pretrained_cfg', None)
    overlay = kwargs.pop('pretrained_cfg_overlay', None) or {}
    if isinstance(cfg, dict):
        cfg = PretrainedCfg(**cfg)
    if cfg in get_arch_pretrained_cfgs(variant).values():  # timm's scripts pass the cfg of a name
        cfg = None if cfg.tag == UNTRAINED else cfg.tag
    has_source = isinstance(cfg, PretrainedCfg) or any(overlay.get(key) for key in SOURCES)
    if pretrained and not has_source:
        cfg = choose(variant, cfg)
        cfg = replace(cfg, file=str(find_file(cfg, kwargs.get('cache_dir'))))
        size = cfg.input_size  # an overlay changes what is built, not what these weights were trained with
    else:
        size = resolve_pretrained_cfg(variant, cfg, overlay).input_size
    cfg = resolve_pretrained_cfg(variant, cfg, overlay)
    needed = {'small_input': max(size[1:]) <= 32, **(trained_with or {}).get(f'{variant}.{cfg.tag}', {})}
    if pretrained:
        # For a saved network timm passes on the arguments that its config records.
        check_function(variant, kwargs.get('pretrained_model_args') or {} if has_source else needed, kwargs)
    kwargs = {**needed, **kwargs}
    model = build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg=cfg, **kwargs)
    parameters = signature(model_cls).parameters
    recorded = [name for name in (*FUNCTIONAL, 'fused') if name in parameters]
    update_model_args(model, **{name: kwargs.get(name, parameters[name].default) for name in recorded})
    return model


def check_function(variant: str, trained_with: Dict[str, Any], kwargs: Dict[str, Any]) -> None:
    for name in FUNCTIONAL:
        if name in trained_with and kwargs.get(name, trained_with[name]) != trained_with[name]:
            raise ValueError(
                f'{name}={kwargs[name]!r} does not fit the weights of {variant}, which were trained with '
                f'{name}={trained_with[name]!r}: use that, or pretrained=False.')


def choose(variant: str, tag: Optional[str]) -> PretrainedCfg:
    """Choose the cfg of a tag or, without a tag, of `in1k`, else of the first tag with weights, with a warning."""
    tags = {cfg.tag: cfg for cfg in get_arch_pretrained_cfgs(variant).values() if cfg.has_weights}
    if not tags:
        names = ', '.join(list_models(module=MODULES, pretrained=True))
        raise RuntimeError(f'{variant} has no pretrained weights. These exist: {names}. Use one, or pretrained=False.')
    if tag and tag not in tags:
        raise RuntimeError(
            f"{variant} has no pretrained weights of tag {tag!r}: use {', '.join(tags)}, or pretrained=False.")
    if tag or 'in1k' in tags:
        return tags[tag or 'in1k']
    tag, cfg = next(iter(tags.items()))
    size = cfg.test_input_size or cfg.input_size
    warnings.warn(
        f"{variant} has no ImageNet weights: pretrained=True gives {variant}.{tag}, {cfg.description}, "
        f"{cfg.num_classes} classes, input {'x'.join(map(str, size))}. Name the tag to silence this.",
        stacklevel=6)  # the caller of timm.create_model
    return cfg


def find_file(cfg: PretrainedCfg, cache_dir=None) -> Path:
    path = WEIGHTS / f'{cfg.architecture}.{cfg.tag}.safetensors'
    name, way_out = path.name, 'Reinstall timm-finet, or use pretrained=False.'
    record = WEIGHTS / 'SHA256SUMS'  # it must also list weights that are only on the Hub
    if not record.is_file():
        raise FileNotFoundError(f'{record}, which records the checksums of the weights, is missing. {way_out}')
    sums = dict(line.split()[::-1] for line in record.read_text().splitlines())
    if not path.is_file():
        if not cfg.hf_hub_id:
            raise FileNotFoundError(f'The weight file {path} is missing. {way_out}')
        repo_id, _, revision = cfg.hf_hub_id.partition('@')
        path = Path(hf_hub_download(repo_id, 'model.safetensors', revision=revision or None, cache_dir=cache_dir))
        way_out = f'Delete it to download {cfg.hf_hub_id} again; if that does not help, upgrade timm-finet.'
    if hashlib.sha256(path.read_bytes()).hexdigest() != sums.get(name):
        raise RuntimeError(
            f'The weight file {path} is damaged or altered: its sha256 is not the one recorded for {name}. {way_out}')
    return path
