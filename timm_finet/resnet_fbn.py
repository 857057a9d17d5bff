"""timm's ResNet with Fine-grained Batch Normalization in place of conv + BN pairs (arXiv 2005.06828, Table 7)."""
import re
from math import gcd
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch.nn.modules.batchnorm import _BatchNorm

from .data.datasets import CIFAR10, WEIGHTS
from .fbn import FBNConv2d
from .finet import check_flags, set_bn_args
from .fusion.conversion import convert_named, fits_fbn
from .fusion.folding import check_form, fuse_named
from .fusion.layers import neighbours
from .hub.pretrained import UNTRAINED, build_model

__all__ = ['ResNetFBN']


def _pairs(modules: Dict[str, nn.Module]) -> List[Tuple[str, str]]:
    """Names of each convolution and its norm: `conv2` and `bn2` in the blocks, neighbours in an `nn.Sequential`."""
    pairs = neighbours(modules[''])
    for name, norm in modules.items():
        if isinstance(norm, _BatchNorm) and re.search(r'bn\d?$', name):
            layer = re.sub(r'bn(\d?)$', r'conv\1', name)
            if layer not in modules:  # in timm's SelectiveKernel
                continue
            if isinstance(modules[layer], nn.Sequential):  # in a deep stem
                layer = f'{layer}.{len(modules[layer]) - 1}'
            pairs.append((layer, name))
    return pairs


class ResNetFBN(ResNet):
    """timm's ResNet with FBN in its convolutions, except the stem, which keeps plain BN.

    Args:
        block, layers, **kwargs: As for timm's ResNet.
        fbn_groups: FBN groups of every convolution after the stem; 1 is plain BN.
        affine: Whether FBN has gamma and beta.
        small_input: Stem for 32 px images: 3x3, stride 1 and no max-pool (section 5.3).
        bn_eps, bn_momentum: `eps` and `momentum` of every BatchNorm, including FBN's own; None keeps torch's 1e-5 and
            0.1.
        fused: Build the deploy form, whose state dict is that of `fuse_fbn(model)`.

    Raises:
        ValueError: `fbn_groups` is not an integer of at least 1 or does not divide the channels of every convolution,
            `norm_layer` is not a BatchNorm2d, or a flag is neither True nor False.
    """

    def __init__(
            self, block, layers, fbn_groups: int = 2, affine: bool = True, small_input: bool = False,
            bn_eps: Optional[float] = None, bn_momentum: Optional[float] = None, fused: bool = False,
            in_chans: int = 3, device=None, dtype=None, **kwargs):
        if type(fbn_groups) is not int or fbn_groups < 1:
            raise ValueError(f'fbn_groups={fbn_groups!r} must be an integer of at least 1.')
        check_flags(affine=affine, small_input=small_input, fused=fused)
        super().__init__(block, layers, in_chans=in_chans, device=device, dtype=dtype, **kwargs)
        self.fbn_groups = fbn_groups
        if small_input:
            width = self.feature_info[0]['num_chs']
            self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False, device=device, dtype=dtype)
            self.maxpool = nn.Identity()
            for info, reduction in zip(self.feature_info, (1, 1, 2, 4, 8)):
                info['reduction'] = reduction
        set_bn_args(self, bn_eps, bn_momentum)
        modules = dict(self.named_modules())
        pairs = _pairs(modules)
        in_stages = [names for names in pairs if names[0].startswith('layer')]
        converted = [names for names in in_stages if fits_fbn(*map(modules.get, names), 1)]
        if not converted:
            raise ValueError(f"norm_layer={kwargs.get('norm_layer')!r} has no FBN form: use BatchNorm2d.")
        widths = {conv: modules[conv].in_channels for conv, _ in converted}
        for conv, width in widths.items():
            if width % fbn_groups:
                raise ValueError(
                    f'fbn_groups={fbn_groups} does not divide the {width} channels of {conv}: '
                    f'give a divisor of {gcd(*widths.values())}.')
        convert_named(self, converted, fbn_groups, affine)
        self._norm_names = {norm: f'{conv}.bn' for conv, norm in converted}  # timm's name: ours
        if fused:
            fuse_named(self, [names for names in pairs if names not in converted], [name for name, _ in converted])

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialise the weights as timm's ResNet does, FBN's included."""
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, FBNConv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif zero_init_last and hasattr(module, 'zero_init_last'):
                last = getattr(module, 'conv3', module.conv2)
                if isinstance(last, FBNConv2d) and last.bn.affine:
                    nn.init.zeros_(last.bn.weight)

    def load_state_dict(self, state_dict, *args, **kwargs):
        """Load a state dict; with `fbn_groups=1` it may also be that of a ResNet of timm or torchvision."""
        names = {}
        for key in state_dict:
            module, _, leaf = key.rpartition('.')
            names[key] = f'{self._norm_names[module]}.{leaf}' if module in self._norm_names else key
        if any(key != name for key, name in names.items()):
            if self.fbn_groups != 1:
                raise RuntimeError(
                    f'The checkpoint has plain BatchNorm, but this {type(self).__name__} has '
                    f'fbn_groups={self.fbn_groups}: build it with fbn_groups=1, or load the checkpoint into its own '
                    'network and use convert_fbn.')
            state_dict = {names[key]: value for key, value in state_dict.items()}
        check_form(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)


def _cfg(**kwargs: Any):
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'paper_ids': 'arXiv:2005.06828',
        'license': 'apache-2.0',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    'resnet18_fbn.cifar10': _cfg(file=str(WEIGHTS / 'resnet18_fbn.cifar10.safetensors'), **CIFAR10.cfg()),
    **{f'{name}.{UNTRAINED}*': _cfg()
       for name in ('resnet18_fbn', 'resnet18_fbn_g4', 'resnet50_fbn', 'resnet50_fbn_g4')},
})


def _create_resnet(variant: str, pretrained: bool, kwargs: Dict[str, Any], **model_args: Any) -> ResNetFBN:
    return build_model(ResNetFBN, variant, pretrained, **{**model_args, **kwargs})


RESNET18 = dict(block=BasicBlock, layers=(2, 2, 2, 2))
RESNET50 = dict(block=Bottleneck, layers=(3, 4, 6, 3))


@register_model
def resnet18_fbn(pretrained: bool = False, **kwargs: Any) -> ResNetFBN:
    """ResNet-18, G = 2 (the paper's best)."""
    return _create_resnet('resnet18_fbn', pretrained, kwargs, **RESNET18, fbn_groups=2)


@register_model
def resnet18_fbn_g4(pretrained: bool = False, **kwargs: Any) -> ResNetFBN:
    """ResNet-18, G = 4."""
    return _create_resnet('resnet18_fbn_g4', pretrained, kwargs, **RESNET18, fbn_groups=4)


@register_model
def resnet50_fbn(pretrained: bool = False, **kwargs: Any) -> ResNetFBN:
    """ResNet-50, G = 2 (the paper's best)."""
    return _create_resnet('resnet50_fbn', pretrained, kwargs, **RESNET50, fbn_groups=2)


@register_model
def resnet50_fbn_g4(pretrained: bool = False, **kwargs: Any) -> ResNetFBN:
    """ResNet-50, G = 4, which did not fit in the memory of the paper's GPU."""
    return _create_resnet('resnet50_fbn_g4', pretrained, kwargs, **RESNET50, fbn_groups=4)
