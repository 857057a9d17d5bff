"""Who runs the code: torch.export and others that know no autograd functions are given torch's operators."""
import torch

__all__ = ['is_exporting', 'operators_alone']


@torch.compiler.assume_constant_result  # traced, it is true in torch 2.11
def is_exporting() -> bool:
    return torch.compiler.is_exporting()


def operators_alone() -> bool:
    """Whether torch.export, torch.jit.trace or torch.func is at work: they know torch's operators alone.

    Whoever runs an exported graph differentiates it by himself, or switches its BatchNorms to eval mode.
    """
    if is_exporting():
        return True
    if torch.compiler.is_compiling():
        return False
    return torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
