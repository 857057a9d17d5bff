"""Names of networks: ours, timm's and torchvision's."""
import difflib
import fnmatch
from typing import List, Sequence

import timm
import torchvision

__all__ = ['find_names', 'hint']

TORCHVISION = 'torchvision:'  # prefix of torchvision's names


def find_names(patterns: Sequence[str]) -> List[str]:
    """Resolve wildcards in names of networks: timm's, including ours, and torchvision's after `torchvision:`.

    Raises:
        ValueError: A name is unknown, or a pattern matches none.
    """
    known = timm.list_models() + [TORCHVISION + name for name in torchvision.models.list_models(torchvision.models)]
    names = []
    for pattern in patterns:
        found = fnmatch.filter(known, pattern)
        if not found and timm.models.is_model(pattern):  # it ignores a tag
            found = [pattern]
        if not found:
            raise ValueError(f'NAME={pattern!r} is unknown: {hint(pattern, known)}')
        names += found
    return list(dict.fromkeys(names))


def hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 3)
    return f"did you mean {', '.join(near)}?" if near else 'use a name of timm.list_models()'
