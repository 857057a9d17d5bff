"""What `pretrained=True` loads: which tag, from where, and that it is the recorded file."""
import hashlib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Optional

import torch.nn as nn
from huggingface_hub import hf_hub_download
from timm.models import (
    PretrainedCfg, build_model_with_cfg, get_arch_pretrained_cfgs, list_models, resolve_pretrained_cfg)
from timm.models._input import update_model_args

__all__ = ['build_model']

WEIGHTS = Path(__file__).parent / 'weights'  # SHA256SUMS in it records the weights on the Hub as well
UNTRAINED = 'untrained'  # the tag of the networks as in the paper: 224 px, 1000 classes


def build_model(model_cls, variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's `build_model_with_cfg`, strict about `pretrained=True`.

    A tag's weights are the embedded file, else the Hub's, and must have the recorded sha256. Without a tag they are
    `in1k`, else, with a warning, the first tag registered with weights. A source of the caller's own stays: `hf-hub:`,
    `local-dir:`, or one in the cfg or its overlay. Networks for pictures up to 32 px get the small-input stem, and every
    network records stem and form, so that timm's `save_for_hf` writes them.

    Raises:
        RuntimeError: There are no such weights, or the file is not the recorded one.
        FileNotFoundError: The embedded file is missing, and nothing on the Hub stands in for it.
    """
    cfg, overlay = kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None) or {}
    registered = get_arch_pretrained_cfgs(variant)
    if isinstance(cfg, dict):
        cfg = PretrainedCfg(**cfg)
    if cfg in registered.values():  # timm's scripts look the name up by themselves
        cfg = None if cfg.tag == UNTRAINED else cfg.tag
    has_source = isinstance(cfg, PretrainedCfg) or any(
        overlay.get(key) for key in ('file', 'url', 'hf_hub_id', 'state_dict'))
    if pretrained and not has_source:
        cfg = choose(variant, cfg, {c.tag: c for c in registered.values() if c.has_weights})
        cfg = replace(cfg, file=str(find_file(cfg, kwargs.get('cache_dir'))))
    cfg = resolve_pretrained_cfg(variant, cfg, overlay)
    kwargs.setdefault('small_input', max(cfg.input_size[1:]) <= 32)
    model = build_model_with_cfg(model_cls, variant, pretrained, pretrained_cfg=cfg, **kwargs)
    update_model_args(model, small_input=kwargs['small_input'], fused=kwargs.get('fused', False))
    return model


def choose(variant: str, tag: Optional[str], tags: Dict[str, PretrainedCfg]) -> PretrainedCfg:
    if not tags:
        names = ', '.join(list_models(module=['finet', 'resnet_fbn'], pretrained=True))
        raise RuntimeError(f'{variant} has no pretrained weights. These exist: {names}. Use one, or pretrained=False.')
    if tag and tag not in tags:
        raise RuntimeError(f"{variant} has no pretrained weights of tag {tag!r}: use {', '.join(tags)}, or pretrained=False.")
    if tag or 'in1k' in tags:
        return tags[tag or 'in1k']
    tag, cfg = next(iter(tags.items()))
    warnings.warn(
        f"{variant} has no ImageNet weights: pretrained=True gives {variant}.{tag}, {cfg.description}, {cfg.num_classes} "
        f"classes, input {'x'.join(map(str, cfg.input_size))}. Name the tag to silence this.", stacklevel=6)
    return cfg


def find_file(cfg: PretrainedCfg, cache_dir=None) -> Path:
    path = WEIGHTS / f'{cfg.architecture}.{cfg.tag}.safetensors'
    sums = dict(line.split()[::-1] for line in (WEIGHTS / 'SHA256SUMS').read_text().splitlines())
    name, way_out = path.name, 'Reinstall timm-finet, or use pretrained=False.'
    if not path.is_file():
        if not cfg.hf_hub_id:
            raise FileNotFoundError(f'The weight file {path} is missing. {way_out}')
        repo_id, _, revision = cfg.hf_hub_id.partition('@')
        path = Path(hf_hub_download(repo_id, 'model.safetensors', revision=revision or None, cache_dir=cache_dir))
        way_out = f'Delete it to download {cfg.hf_hub_id} again; should that not help, upgrade timm-finet.'
    if hashlib.sha256(path.read_bytes()).hexdigest() != sums.get(name):
        raise RuntimeError(f'The weight file {path} is damaged or altered: its sha256 is not the one of {name}. {way_out}')
    return path
