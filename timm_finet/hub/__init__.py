"""The Hugging Face Hub: which weights are loaded, checkpoints as networks, cards, and what is saved and pushed."""
from typing import Any

__all__ = ['push', 'push_checkpoint', 'save', 'save_for_hf']


def __getattr__(name: str) -> Any:
    """Import the pushing part, which needs the networks, when it is asked for: the networks need `hub.pretrained`."""
    if name in __all__:
        from . import repository
        return getattr(repository, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
