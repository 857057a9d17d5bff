"""Proves on copies of a network that a plan does not change its outputs, before the network itself changes."""
import itertools
import logging
from typing import Callable, Iterator, Set, Tuple

import torch
import torch.nn as nn

from .compare import judge
from .plan import Plan
from .trial import copy_to_run, run, undisturbed

__all__ = ['prove']

_logger = logging.getLogger(__name__)


def prove(model: nn.Module, plan: Plan, change: Callable[[nn.Module], None], keeps_outputs: bool = True) -> None:
    """Run a rewritten copy of `model`, and drop from the plan all modules that still run after they were replaced.

    Args:
        change: Rewrites a network as `plan` says.
        keeps_outputs: Whether the outputs must stay the same.

    Raises:
        RuntimeError: The copy does not run, or its outputs on the example differ although they must stay the same.
    """
    while plan.example is not None and (plan.pairs or plan.fbn):
        outputs, called = _run_changed(model, plan, change)
        if not called:
            if keeps_outputs:
                _compare(model, plan, outputs)
            return
        plan.stays.update(dict.fromkeys(called, 'called from where they cannot be replaced'))
        plan.fbn = [name for name in plan.fbn if name not in called]
        plan.pairs = [names for names in plan.pairs if called.isdisjoint(names)]


def _run_changed(model: nn.Module, plan: Plan, change: Callable) -> Tuple[dict, Set[str]]:
    """Return a changed copy's outputs, and the names of replaced modules that still run, for example from a list."""
    copy = copy_to_run(model)
    old = dict(_rewritten(copy, plan))
    change(copy)
    present = set(copy.modules())
    called: Set[str] = set()
    for name, module in old.items():
        if module not in present:
            module.register_forward_pre_hook(lambda *_, name=name: called.add(name))
    try:
        return run(copy, plan.example), called
    except Exception as error:
        if called:
            return {}, called
        raise RuntimeError(
            f'{type(model).__name__} does not run once rewritten, so it is left unchanged: {error!r}') from error


def _compare(model: nn.Module, plan: Plan, outputs: dict) -> None:
    """Compare with the outputs of the unchanged network, which may amplify rounding errors."""
    noisy = []
    for seed in range(5):  # one seed may show too little, for example where outputs are whole numbers
        noisy.append(run(_with_noise(model, plan, seed), plan.example))
        verdict = judge(plan.outputs, outputs, noisy, plan.rounding)
        if not verdict.complaint:
            break
    model_name = type(model).__name__
    if verdict.complaint:
        raise RuntimeError(f'The rewritten {model_name} gives {verdict.complaint}, so the network is left unchanged.')
    if verdict.unproven or not verdict.total:
        hint = ' Fuse in float32, then cast.' if plan.rounding > 1e-3 else ''
        _logger.warning(
            f'{verdict.unproven} of the {verdict.total} outputs of {model_name} prove nothing: rounding or chance '
            f'alone changes them, they hold no finite number, or they are of a kind that cannot be compared.{hint}')


def _with_noise(model: nn.Module, plan: Plan, seed: int) -> nn.Module:
    """Return a copy in which all numbers that folding uses are changed by as much as rounding may change them."""
    copy = copy_to_run(model)
    with undisturbed():
        torch.manual_seed(seed)
        for _, module in _rewritten(copy, plan):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.mul_(1 + plan.rounding * torch.randn_like(tensor))
    return copy


def _rewritten(model: nn.Module, plan: Plan) -> Iterator[Tuple[str, nn.Module]]:
    """Yield the names and modules that the plan changes."""
    for name in itertools.chain(plan.fbn, *plan.pairs):
        yield name, model.get_submodule(name)
