"""Plans what to rewrite in a network, from what a run of a copy shows."""
import logging
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from ..fbn import FBNConv2d
from .compare import distance
from .folding import after_norm, folded, set_folded
from .layers import LAYERS, neighbours
from .trial import Example, copy_to_run, example_for, run, undisturbed
from .watch import Watch

__all__ = ['Plan', 'make_plan']

_logger = logging.getLogger(__name__)

NO_RUN = 'not known without a run, so give example_inputs'


@dataclass
class Plan:
    """What may be rewritten. Modules are named, because each copy of the network has its own modules."""
    pairs: List[Tuple[str, str]] = field(default_factory=list)  # a layer and the norm behind it
    fbn: List[str] = field(default_factory=list)  # FBN layers to fuse
    stays: Dict[str, str] = field(default_factory=dict)  # other FBN layers and norms, and why
    example: Optional[Example] = None  # None if nothing was run
    outputs: Any = None  # of the unchanged network on the example
    rounding: float = 0.  # the relative precision of the coarsest layer output


def make_plan(model: nn.Module, example_inputs: Any, fuse: bool) -> Plan:
    """Find the pairs of a network and, if it is to be fused, its FBN layers."""
    example = example_for(model, example_inputs)
    watch = Watch(model if example is None else copy_to_run(model), model)
    fbn = [name for name, layer in watch.layers.items() if fuse and isinstance(layer, FBNConv2d)]
    plan = Plan()
    if example is not None and (watch.norms or fbn):
        try:
            plan.outputs = run(watch.model, example, watch.watching)
            plan.example, plan.rounding = example, watch.rounding
        except Exception as error:
            if example_inputs is not None or watch.reached:
                raise
            _logger.warning(
                f'{type(model).__name__} does not run on images of the size in its pretrained_cfg: {error!r}')
    if watch.reached:  # the network may have caught the error
        raise RuntimeError(f'A copy of {type(model).__name__} computes with {watch.reached} of the network itself.')

    for name in fbn:
        reason = _why_fbn_stays(watch, watch.layers[name])
        if reason:
            plan.stays[name] = reason
        else:
            plan.fbn.append(name)
    if plan.example is None:
        plan.pairs = neighbours(model)
        found = {norm for _, norm in plan.pairs}
        plan.stays.update((name, NO_RUN) for name in watch.norms if name not in found)
        return plan
    names = {layer: name for name, layer in watch.layers.items()}
    for name, norm in watch.norms.items():
        layer, reason = watch.layer_of(norm)
        if layer is not None:
            reason = _why_pair_stays(watch, layer, norm, fuse)
        if reason:
            plan.stays[name] = reason
        else:
            plan.pairs.append((names[layer], name))
    return plan


def _why_fbn_stays(watch: Watch, layer: FBNConv2d) -> str:
    return watch.records[layer].why_stays or layer.why_unfusable()


def _why_pair_stays(watch: Watch, layer: nn.Module, norm: nn.Module, fuse: bool) -> str:
    record = watch.records[layer]
    if isinstance(layer, FBNConv2d):
        return 'behind an FBN layer that stays' if fuse and _why_fbn_stays(watch, layer) else ''
    if record.by_keyword and not fuse:  # an FBN layer's input has another name
        return 'behind a layer that is called by keyword'
    if type(layer) not in LAYERS and not _is_folded_right(layer, norm, record.example):
        return f'behind a {type(layer).__name__}, which gives other outputs with a folded weight'
    return ''


def _is_folded_right(layer: nn.Module, norm: nn.Module, example: Optional[torch.Tensor]) -> bool:
    """Whether a layer of an unknown class gives the right outputs with a folded weight, on inputs shaped as `example`.

    False if that cannot be tried.
    """
    if example is None or layer.weight.is_meta:
        return False
    try:
        with undisturbed():
            layer, norm = deepcopy(layer).double(), deepcopy(norm).double()
            fused = deepcopy(layer)
            set_folded(fused, *folded(layer, norm))
            x = torch.randn(example.shape, dtype=torch.float64, device=layer.weight.device)
            # A layer may treat large values or empty positions differently.
            holes, half = torch.randint_like(x[:, :1], 2), torch.arange(x.shape[-1], device=x.device) < x.shape[-1] // 2
            return all(
                distance(norm(layer(probe)), after_norm(norm)(fused(probe))) < 1e-9
                for probe in (x, 1e4 * x, holes * x, half * x, 0 * x))
    except Exception:  # an unknown class may raise anything
        return False
