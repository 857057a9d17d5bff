"""The Hugging Face Hub: pretrained weights, checkpoints, model cards, and saving and pushing networks."""
from typing import Any

__all__ = ['push', 'push_checkpoint', 'save', 'save_for_hf']


def __getattr__(name: str) -> Any:
    """Import `repository` on first use: it imports the networks, which themselves import `hub.pretrained`."""
    if name in __all__:
        from . import repository
        return getattr(repository, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
