"""Detects tracers that know only torch's own operators, none of our autograd functions."""
import torch

__all__ = ['is_exporting', 'operators_alone']


@torch.compiler.assume_constant_result  # without this, torch 2.11 traces the call as True
def is_exporting() -> bool:
    return torch.compiler.is_exporting()


def operators_alone() -> bool:
    """Whether torch.export, torch.jit.trace or torch.func is running; they know only torch's own operators.

    Their users differentiate the traced graph with other tools, or switch its BatchNorms to eval mode.
    """
    if is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    # torch.func has no public function for this; checked with torch 2.11 and 2.15.
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
