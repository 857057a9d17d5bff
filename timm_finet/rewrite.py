"""The two rewrites of whole networks: `fuse_fbn` folds norms for inference, `convert_fbn` inserts FBN layers.

Both run the network on an example to plan the rewrite (fusion/plan.py), prove the plan on copies (fusion/proof.py), and
only then change the network. It keeps its class, its other methods and the prefixes of its state dict.
"""
import logging
from collections import Counter, defaultdict
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from timm.models._input import update_model_args
from timm.utils import ModelEma

from .fbn import FBNConv2d
from .fusion.conversion import convert_named, fits_fbn
from .fusion.folding import fuse_named
from .fusion.layers import why_untouchable
from .fusion.plan import Plan, make_plan
from .fusion.proof import prove
from .fusion.trial import copy_model
from .fusion.watch import NO_LAYER
from .fusion.wrappers import rewrite_wrapped, wrapped_name

__all__ = ['fuse_fbn', 'convert_fbn']

_logger = logging.getLogger(__name__)


def fuse_fbn(model: nn.Module, example_inputs: Any = None, inplace: bool = False) -> nn.Module:
    """Fold every FBN layer, and every BatchNorm behind a convolution or linear layer, into a plain layer with bias.

    For `nn.Sequential(conv, bn)` in eval mode this is equivalent to
    `nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(conv, bn), nn.Identity())`; for an `FBNConv2d`, to its `fuse()`.

    Copies of the network run on the example in eval mode. An unchanged copy shows which layer's output goes to one norm
    only, and a rewritten copy proves that the outputs stay the same. A warning names the layers that stay unfolded and
    the reasons, for example hooks, a patched forward, more than one call, or something else that reads their output or
    their tensors. Norms that are not directly behind a layer are only logged. The example cannot show other paths
    through the network, which it may take with other inputs or in train mode. On the meta device there are no values,
    so only shapes are proven.

    Args:
        model: Any network with its norms in eval mode. In DistributedDataParallel, DataParallel, torch.compile or
            timm's ModelEma, the network inside is rewritten.
        example_inputs: A tensor, or a tuple or dict of arguments, as for torch.export. timm's networks do not need one:
            they run on random images of the size in their `pretrained_cfg`. Without an example, other networks do not
            run: only FBN layers and neighbours in an `nn.Sequential` are folded, and nothing is proven.
        inplace: Change `model` itself instead of a deep copy.

    Returns:
        The rewritten network, or an `nn.Conv2d` if `model` is an `FBNConv2d`. Its outputs, and those of timm's
        `forward_intermediates`, are the same up to rounding. Class, methods, training flags, buffers, device, dtype,
        memory format and `requires_grad` stay. Fusing the result again changes nothing.

    Raises:
        RuntimeError: A BatchNorm is in train mode; the outputs would differ; the rewritten copy does not run; or a copy
            uses tensors or modules of `model`. In each case `model` is left unchanged.
        TypeError: `model` is not a module, is scripted or cannot be copied; or `example_inputs` is of another type.
        ValueError: `model` has lazy parameters.
    """
    _check_model(model, 'fuse')
    if wrapped_name(model):
        return rewrite_wrapped(model, lambda network: fuse_fbn(network, example_inputs, inplace), inplace)
    for name, module in model.named_modules():
        if module.training and isinstance(module, _BatchNorm):
            raise RuntimeError(
                f'Cannot fuse {name or type(model).__name__} in train mode: call .eval() on the model first.')
    if isinstance(model, FBNConv2d) and not why_untouchable(model):
        return model.fuse()

    plan = make_plan(model, example_inputs, fuse=True)

    def fuse(network: nn.Module) -> None:
        fuse_named(network, plan.pairs, plan.fbn)

    prove(model, plan, fuse)
    _say_what_stays(model, plan)
    model = model if inplace else copy_model(model)
    fuse(model)
    if 'fused' in getattr(model, '_model_args', {}):
        update_model_args(model, fused=True)  # timm's save_for_hf writes these arguments for loading
    return model


def convert_fbn(
        model: nn.Module, fbn_groups: int = 4, affine: bool = True, example_inputs: Any = None,
        inplace: bool = False, save_memory: bool = False) -> nn.Module:
    """Replace every convolution + BatchNorm pair with an `FBNConv2d`.

    For `nn.Sequential(conv, bn)` this is equivalent to `nn.Sequential(layer, nn.Identity())`, where `layer` is an
    `FBNConv2d` with the convolution's weight. Each group starts with the norm's variance and gamma, and with an equal
    share of its mean and beta; training then estimates each group's own. The convolution's bias becomes part of the
    mean and is no longer learned, because batch statistics would cancel it.

    Pairs are found and the outputs proven as by `fuse_fbn`. These keep their BatchNorm: depthwise and grouped
    convolutions, those whose input channels G does not divide (mostly a stem), those with a string as `padding` or
    another `padding_mode` than zeros, subclasses of `nn.Conv2d`, those whose norm shares parameters with another
    module, and those that `fuse_fbn` would leave. A log message gives the number of converted convolutions and of all
    convolutions.

    Args:
        model: Any network, in train or eval mode, or in one of the wrappers that `fuse_fbn` knows.
        fbn_groups: G, the FBN groups of each layer.
        affine: If False, the learned gammas and betas (Table 5) are dropped, and with them their effect on the outputs.
        example_inputs: As for `fuse_fbn`.
        inplace: Change `model` itself instead of a deep copy.
        save_memory: As for `FBNConv2d`. With `fbn_groups=1` this is plain BatchNorm that trains in less memory.

    Returns:
        The rewritten network. In eval mode its outputs are the same up to rounding, at any G, unless `affine` is False.

    Raises:
        ValueError: `fbn_groups` is not an integer of at least 1; no pair fits; or `model` has lazy parameters, or is a
            DistributedDataParallel to be changed in place.
        RuntimeError, TypeError: As from `fuse_fbn`, but train mode is allowed.
    """
    if type(fbn_groups) is not int or fbn_groups < 1:
        given = repr(fbn_groups) if isinstance(fbn_groups, (int, float, str)) else f'a {type(fbn_groups).__name__}'
        hint = ' Pass an example as example_inputs=.' if isinstance(fbn_groups, (torch.Tensor, tuple, dict)) else ''
        raise ValueError(f'fbn_groups={given} must be an integer of at least 1.{hint}')
    _check_model(model, 'convert')
    if wrapped_name(model):
        if inplace and isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                'model=DistributedDataParallel with inplace=True would not see the new parameters: convert the network '
                'before you wrap it.')
        return rewrite_wrapped(model, lambda network: convert_fbn(
            network, fbn_groups, affine, example_inputs, inplace, save_memory), inplace)

    plan = make_plan(model, example_inputs, fuse=False)
    uses = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    for conv_name, norm_name in list(plan.pairs):
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        # Parameters that norms share would become separate parameters.
        if not fits_fbn(conv, norm, fbn_groups) or any(uses[p] > 1 for p in norm.parameters()):
            plan.pairs.remove((conv_name, norm_name))

    def convert(network: nn.Module) -> None:
        convert_named(network, plan.pairs, fbn_groups, affine, save_memory)

    prove(model, plan, convert, keeps_outputs=affine)
    if not plan.pairs:
        unwatched = example_inputs is None and plan.example is None
        raise ValueError(
            f'model={type(model).__name__} has no convolution + BatchNorm pair that fbn_groups={fbn_groups} fits'
            + (', as far as is known without example_inputs.' if unwatched else '.'))
    _say_what_stays(model, plan)
    model = model if inplace else copy_model(model)
    convert(model)
    count = sum(isinstance(module, (nn.Conv2d, FBNConv2d)) for module in model.modules())
    _logger.info(f'{len(plan.pairs)} of the {count} convolutions of {type(model).__name__} converted to FBN.')
    return model


def _check_model(model: Any, verb: str) -> None:
    if isinstance(model, ModelEma):  # a wrapper that is not a module
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f'model={type(model).__name__} must be a torch.nn.Module.')
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f'model={type(model).__name__} is scripted or traced: {verb} the network before that.')
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(f'{name} of model={type(model).__name__} has no shape yet: run the network once first.')


def _say_what_stays(model: nn.Module, plan: Plan) -> None:
    stay = f'BatchNorm layers of {type(model).__name__} stay'
    by_reason = defaultdict(list)
    for name, reason in plan.stays.items():
        by_reason[reason].append(name or type(model).__name__)
    if NO_LAYER in by_reason:  # common, so not worth a warning
        names = by_reason.pop(NO_LAYER)
        _logger.info(f"{stay}, {NO_LAYER}: {', '.join(names)}")
    if by_reason:
        reasons = '; '.join(f"{reason}: {', '.join(names)}" for reason, names in by_reason.items())
        _logger.warning(f'{stay}, {reasons}')
    if plan.example is not None and plan.stays and not plan.pairs and not plan.fbn:
        _logger.warning(f'Nothing of {type(model).__name__} can be folded: {len(plan.stays)} BatchNorm layers stay.')
