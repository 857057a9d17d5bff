"""Whether a tracer runs the code that knows only torch's own operators, and no autograd function of ours."""
import torch

__all__ = ['is_exporting', 'operators_alone']


@torch.compiler.assume_constant_result  # torch 2.11 traces the call itself as true
def is_exporting() -> bool:
    return torch.compiler.is_exporting()


def operators_alone() -> bool:
    """Whether torch.export, torch.jit.trace or torch.func is at work, which know torch's own operators alone.

    Their users differentiate the traced graph with other tools, or switch its BatchNorms to eval mode.
    """
    if is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    # torch.func has no public question for this; checked with torch 2.11 and 2.15.
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
