"""The layers and norms that fusing knows: where they are in a network, and which of them must stay."""
from collections import Counter
from typing import Any, Dict, List, Tuple

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torchvision.ops import FrozenBatchNorm2d

from timm.layers import BatchNormAct2d, Conv2dSame, FrozenBatchNormAct2d, SyncBatchNormAct

from ..fbn import FBNConv2d, ReferenceFBNConv2d, has_hooks
from ..ops.depthwise import DepthwiseConv2d

__all__ = ['ANY_NORM', 'LAYERS', 'NORMS', 'TRANSPOSED', 'layers_and_norms', 'neighbours', 'why_untouchable']

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ANY_NORM = (_BatchNorm, FrozenBatchNorm2d, FrozenBatchNormAct2d)  # and their subclasses

# These types are matched exactly, because their subclasses may compute something else. The layers are linear in weight
# and bias. The norms do what BatchNorm does, and timm's also apply an activation.
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear, Conv2dSame, DepthwiseConv2d)
NORMS = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, BatchNormAct2d, SyncBatchNormAct,
    FrozenBatchNorm2d, FrozenBatchNormAct2d)


def _methods(cls: type) -> Tuple[Any, Any]:
    return cls.forward, getattr(cls, '_conv_forward', None)


_ORIGINAL_METHODS = {cls: _methods(cls) for cls in (*LAYERS, *NORMS)}
_NORM_BEHIND = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}  # by the dimensions of a convolution's weight


def layers_and_norms(model: nn.Module) -> Tuple[Dict[str, nn.Module], Dict[str, nn.Module]]:
    """Return all layers and all norms by name, except the norm inside an FBN layer, which belongs to the layer."""
    layers, norms, inside_fbn = {}, {}, set()
    for name, module in model.named_modules():
        if module in inside_fbn:
            continue
        if isinstance(module, FBNConv2d):
            inside_fbn.update(module.modules())
        if isinstance(module, (FBNConv2d, *LAYERS)):
            layers[name] = module
        elif isinstance(module, ANY_NORM):
            norms[name] = module
    return layers, norms


def why_untouchable(module: nn.Module) -> str:
    """Return why a layer or norm must stay regardless of how the network uses it, or '' if it may be folded."""
    if any(map(has_hooks, module.modules())):
        return 'hooked'
    if _is_patched(module):
        return 'patched'
    if isinstance(module, FBNConv2d):  # its own `fuse` checks the rest
        has_our_forward = type(module).forward in (FBNConv2d.forward, ReferenceFBNConv2d.forward)
        return '' if has_our_forward else f'of class {type(module).__name__}'
    if is_parametrized(module):
        return 'parametrised'
    if isinstance(module, ANY_NORM):
        if type(module) not in NORMS:
            return f'of class {type(module).__name__}'
        return 'without running statistics' if module.running_mean is None else ''
    return '' if 'weight' in dict(module.named_parameters(recurse=False)) else 'without a weight of its own'


def _is_patched(module: nn.Module) -> bool:
    """Whether a method of this instance or of its whole class has been replaced."""
    for submodule in module.modules():
        for name, value in vars(submodule).items():
            if callable(value) and callable(getattr(type(submodule), name, None)):
                return True
    return _ORIGINAL_METHODS.get(type(module), _methods(type(module))) != _methods(type(module))


def neighbours(model: nn.Module) -> List[Tuple[str, str]]:
    """Return the names of each convolution and the norm directly behind it in an `nn.Sequential`.

    Pairs with a module that occurs more than once in the network are left out.
    """
    places = Counter(child for parent in model.modules() for _, child in _children(parent))
    pairs = []
    for prefix, parent in model.named_modules():
        if type(parent) is not nn.Sequential or 'forward' in vars(parent):
            continue
        children = _children(parent)
        for (layer_name, layer), (norm_name, norm) in zip(children, children[1:]):
            if places[layer] == places[norm] == 1 and _belong_together(layer, norm):
                pairs.append((f'{prefix}.{layer_name}'.lstrip('.'), f'{prefix}.{norm_name}'.lstrip('.')))
    return pairs


def _children(parent: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Return all children, also those that occur twice, which `parent.named_children()` would list once."""
    return [(name, child) for name, child in parent.named_modules(remove_duplicate=False) if name and '.' not in name]


def _belong_together(layer: nn.Module, norm: nn.Module) -> bool:
    if type(layer) not in LAYERS or why_untouchable(layer) or why_untouchable(norm):
        return False
    norm_type = nn.BatchNorm2d if type(norm) is BatchNormAct2d else type(norm)
    return norm_type is _NORM_BEHIND.get(layer.weight.dim()) and layer.out_channels == norm.num_features
