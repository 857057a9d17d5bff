"""What the classes of a data set are called."""
from pathlib import Path
from typing import Any, Dict, List, Optional

from timm.data import create_dataset

from .datasets import DATASETS, FOLDERS, UNKNOWN

__all__ = ['class_names']


def class_names(args: Dict[str, Any]) -> Optional[List[str]]:
    """The classes, in order, of the data that arguments of train.py name; None where that cannot be told.

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
    indices = getattr(reader, 'class_to_idx', None) or reader.class_name_to_idx  # the latter is timm's tar reader's
    return sorted(map(str, indices), key=lambda name: indices[name])
