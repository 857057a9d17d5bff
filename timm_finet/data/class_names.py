"""Names of a data set's classes."""
from pathlib import Path
from typing import Any, Dict, List, Optional

from timm.data import create_dataset

from .datasets import DATASETS, FOLDERS, UNKNOWN

__all__ = ['class_names']


def class_names(args: Dict[str, Any]) -> Optional[List[str]]:
    """Class names, in order, of the data set that train.py's arguments `args` select; None if they are not known.

    Raises:
        RuntimeError, AssertionError, ValueError, OSError: The folder holds no images, or `class_map` cannot be read.
    """
    dataset, root = args.get('dataset') or '', args.get('data_dir') or args.get('data')
    if dataset not in FOLDERS:
        return DATASETS.get(dataset, UNKNOWN).classes
    if not root or not Path(root).exists():
        return None
    data = create_dataset(dataset, root, args.get('train_split') or 'train', class_map=args.get('class_map') or None)
    reader = getattr(data, 'reader', data)
    indices = getattr(reader, 'class_to_idx', None) or reader.class_name_to_idx  # timm's tar reader has the latter
    return sorted(map(str, indices), key=lambda name: indices[name])
