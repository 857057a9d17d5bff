"""Finet

Paper: `Finet: Using Fine-grained Batch Normalization to Train Light-weight Neural Networks`
    - https://arxiv.org/abs/2005.06828

@article{luo2020finet,
  title={Finet: Using Fine-grained Batch Normalization to Train Light-weight Neural Networks},
  author={Luo, Chunjie and Zhan, Jianfeng and Wang, Lei and Gao, Wanling},
  journal={arXiv preprint arXiv:2005.06828},
  year={2020}
}

The paper gives Table 1 but no code. The blocks below reproduce all twelve parameter counts of its Table 2.
"""
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Linear, SelectAdaptivePool2d, calculate_drop_path_rates, get_device_dtype
from timm.models import checkpoint_seq, generate_default_cfgs, register_model, reparameterize_model
from timm.models._features import feature_take_indices

from .data.datasets import CIFAR10, CIFAR100, TINY_IN200, WEIGHTS
from .fbn import FBNConv2d, has_hooks
from .fusion.folding import after_norm, check_form, folded, set_folded
from .fusion.layers import NORMS, why_untouchable
from .hub.pretrained import build_model
from .ops.depthwise import DepthwiseConv2d

__all__ = ['Finet']


def check_flags(**flags: bool) -> None:
    """Raise ValueError for a flag that is not True or False, e.g. the string from `--model-kwargs affine=false`."""
    for name, value in flags.items():
        if value not in (True, False):
            raise ValueError(f'{name}={value!r} must be True or False.')


def set_bn_args(model: nn.Module, eps: Optional[float], momentum: Optional[float]) -> None:
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eps = module.eps if eps is None else eps
            module.momentum = module.momentum if momentum is None else momentum


class ConvNorm(nn.Sequential):
    """Convolution and BatchNorm."""

    def __init__(self, in_chs: int, out_chs: int, kernel_size: int = 1, stride: int = 1, groups: int = 1, **dd):
        super().__init__()
        if groups == 1:
            self.conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, kernel_size // 2, bias=False, **dd)
        else:
            self.conv = DepthwiseConv2d(out_chs, kernel_size, stride, **dd)
        self.bn = nn.BatchNorm2d(out_chs, **dd)

    def fuse(self) -> nn.Module:
        """Fold `bn` into `conv`, unless this is done already, or the pair has hooks or a norm of unknown type.

        Like timm's own `fuse` methods, this folds the running statistics in train mode too: timm's scripts fuse before
        they call `.eval()`.
        """
        if type(self.bn) in NORMS and not why_untouchable(self.conv) and not why_untouchable(self.bn):
            set_folded(self.conv, *folded(self.conv, self.bn))
            self.bn = after_norm(self.bn)
        return self


class SqueezeExcite(nn.Module):
    """Gate a block's output by the block's input, through two 1x1 convolutions.

    The convolutions have BatchNorm and no bias, as Table 2's parameter counts require.
    """

    def __init__(self, in_chs: int, out_chs: int, rd_channels: int = 200, **dd):
        super().__init__()
        self.fc1 = ConvNorm(in_chs, rd_channels, **dd)
        self.act = nn.ReLU(inplace=True)
        self.fc2 = ConvNorm(rd_channels, out_chs, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean((2, 3), keepdim=True)
        return self.fc2(self.act(self.fc1(x))).sigmoid()


class Block(nn.Module):
    """1x1 FBN, ReLU, 3x3 depthwise BN, 1x1 FBN, optional SE; the identity is added if the stride is 1."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int,
            fbn_groups: Tuple[int, int],
            affine: bool,
            act_place: str,
            use_se: bool,
            drop_path: float,
            **dd,
    ):
        super().__init__()
        # The parameter counts do not tell where the second ReLU goes. Only this code decides it.
        acts = {place: nn.Identity() for place in ACT_PLACES}
        if act_place not in acts:
            raise ValueError(f"act_place={act_place!r} is unknown: use one of {', '.join(acts)}.")
        acts[act_place] = nn.ReLU(inplace=True)

        self.conv1 = FBNConv2d(in_chs, out_chs, fbn_groups=fbn_groups[0], affine=affine, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv_dw = ConvNorm(out_chs, out_chs, 3, stride, groups=out_chs, **dd)
        self.act_dw = acts['depthwise']
        self.conv2 = FBNConv2d(out_chs, out_chs, fbn_groups=fbn_groups[1], affine=affine, **dd)
        self.act2 = acts['pointwise']
        self.se = SqueezeExcite(in_chs, out_chs, **dd) if use_se else None
        self.has_identity = stride == 1
        self.drop_path = DropPath(drop_path) if drop_path and self.has_identity else nn.Identity()
        self.act_out = acts['output']

    @torch.jit.unused
    def _relu_inside(self, x: torch.Tensor) -> bool:
        """Whether the convolution applies the first ReLU, which saves a GPU four passes over the output."""
        return (
            self.training and isinstance(x, torch.Tensor) and x.device.type in RELU_INSIDE  # torch.fx passes a Proxy
            and type(self.conv1) is FBNConv2d and type(self.act1) is nn.ReLU and 'forward' not in vars(self.conv1)
            and not has_hooks(self.conv1) and not has_hooks(self.act1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        if not torch.jit.is_scripting() and self._relu_inside(x):
            x = self.conv1(x, relu=True)
        else:
            x = self.act1(self.conv1(x))
        x = self.act_dw(self.conv_dw(x))
        x = self.act2(self.conv2(x))
        if self.se is not None:
            x = x * self.se(identity)
        if self.has_identity:
            x = self.drop_path(x) + identity
        return self.act_out(x)


ACT_PLACES = ('depthwise', 'pointwise', 'output')
RELU_INSIDE = ('cuda',)  # devices; on a CPU an in-place ReLU takes the same time


class Finet(nn.Module):
    """Finet (Table 1).

    Args:
        channels: Widths of stages 2, 3 and 4. Each width, including the stem's, is rounded up until its number of
            groups divides it.
        depths: Numbers of blocks of these stages.
        stem_chs: Width of the stem.
        num_features: Width of the last convolution and of FC1, the layer before the classifier.
        use_se: Squeeze-and-Excitation in every block.
        fbn_groups: FBN groups of the blocks' 1x1 convolutions, except those of Squeeze-and-Excitation, which keep
            plain BatchNorm; 1 is plain BatchNorm.
        fbn_group_size: Channels per group, fixed instead of the number of groups (Table 6): a layer has
            `max(1, in_chs // fbn_group_size)` groups.
        affine: Whether FBN has gamma and beta (Table 5).
        act_place: Position of a block's second ReLU: after the 'depthwise' convolution, after the second 'pointwise'
            convolution, or on the block's 'output'. The drawing of the paper's Figure 2 was not available, and the
            parameter counts fit all three; the default trained best on CIFAR-100.
        small_input: Stem for 32 px images: stride 1 and no max-pool (section 5.3).
        drop_rate: Dropout on the inputs of both fully connected layers.
        drop_path_rate: Stochastic depth of the blocks with an identity; the rate rises to this value at the last block.
        bn_eps, bn_momentum: `eps` and `momentum` of every BatchNorm, including FBN's own; None keeps torch's 1e-5 and
            0.1.
        fused: Build the deploy form, whose state dict is that of `fuse_fbn(model)`.

    `torch.fx` can trace the network with FBN layers as leaves, as timm's `create_feature_extractor` does. Plain
    `symbolic_trace` traces into the layers, which works in eval mode only.

    Raises:
        ValueError: `fbn_groups` or `fbn_group_size` is not an integer of at least 1, both are given, `channels` and
            `depths` differ in length, `act_place` is unknown, or a flag is neither True nor False.
    """

    def __init__(
            self,
            channels: Tuple[int, ...] = (100, 200, 400),
            depths: Tuple[int, ...] = (4, 8, 4),
            stem_chs: int = 24,
            num_features: int = 1024,
            use_se: bool = False,
            fbn_groups: int = 1,
            fbn_group_size: Optional[int] = None,
            affine: bool = True,
            act_place: str = 'depthwise',
            small_input: bool = False,
            drop_rate: float = 0.2,
            drop_path_rate: float = 0.,
            bn_eps: Optional[float] = None,
            bn_momentum: Optional[float] = None,
            num_classes: int = 1000,
            in_chans: int = 3,
            global_pool: str = 'avg',
            output_stride: int = 32,
            fused: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        assert output_stride == 32
        for name, value in (('fbn_groups', fbn_groups), ('fbn_group_size', fbn_group_size)):
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f'{name}={value!r} must be an integer of at least 1.')
        if fbn_group_size is not None and fbn_groups != 1:
            raise ValueError(
                f'fbn_groups={fbn_groups} and fbn_group_size={fbn_group_size} exclude each other: give one of them, '
                'and fbn_group_size only with a name without _g2 to _g8.')
        if len(channels) != len(depths):
            raise ValueError(f'channels={channels!r} and depths={depths!r} must each have one number per stage.')
        check_flags(affine=affine, small_input=small_input, fused=fused)
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        def groups(chs: int) -> int:
            return fbn_groups if fbn_group_size is None else max(1, chs // fbn_group_size)

        def widen(chs: int) -> int:
            while chs % groups(chs):
                chs += 1
            return chs

        prev_chs = widen(stem_chs)
        stride = 1 if small_input else 2
        self.stem = ConvNorm(in_chans, prev_chs, 3, stride, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info = [dict(num_chs=prev_chs, reduction=stride, module='act1')]
        self.pool = nn.Identity() if small_input else nn.MaxPool2d(3, 2, padding=1)
        stride = stride * stride
        self.feature_info += [dict(num_chs=prev_chs, reduction=stride, module='pool')]

        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, (chs, depth) in enumerate(zip(map(widen, channels), depths)):
            blocks = []
            for j in range(depth):
                blocks += [Block(
                    prev_chs, chs, 1 if j else 2, (groups(prev_chs), groups(chs)), affine, act_place, use_se,
                    drop_paths[i][j], **dd)]
                prev_chs = chs
            stages += [nn.Sequential(*blocks)]
            stride *= 2
            self.feature_info += [dict(num_chs=chs, reduction=stride, module=f'stages.{i}')]
        self.stages = nn.Sequential(*stages)

        self.num_features = self.head_hidden_size = num_features
        self.conv_head = ConvNorm(prev_chs, num_features, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool)
        # FC1 is a 1x1 convolution: it computes the same sums on a pooled map, and gives a dense head without pooling
        pooled_chs = num_features * self.global_pool.feat_mult()
        self.fc1 = ConvNorm(pooled_chs, num_features, **dd)
        self.act3 = nn.ReLU(inplace=True)
        self.flatten = nn.Flatten(1) if global_pool else nn.Identity()
        self.classifier = Linear(num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        set_bn_args(self, bn_eps, bn_momentum)
        if fused:
            reparameterize_model(self, inplace=True)

    def load_state_dict(self, state_dict, *args, **kwargs):
        check_form(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(
            stem=r'^stem',
            blocks=[
                (r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)', None),
                (r'^conv_head|^fc1', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True):
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None):
        dd = get_device_dtype(self)
        self.num_classes = num_classes
        if global_pool is not None:
            pool = SelectAdaptivePool2d(pool_type=global_pool)
            assert pool.feat_mult() == self.global_pool.feat_mult(), 'FC1 is sized for the pooled width.'
            self.global_pool = pool.train(self.training)
            self.flatten = (nn.Flatten(1) if global_pool else nn.Identity()).train(self.training)
        self.classifier = Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.classifier.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Run the stem and the stages, and return intermediate feature maps.

        Args:
            x: Images `(N, C, H, W)`.
            indices: Levels to return: the last n for an int, all for None, those listed for a sequence.
            norm: Has no effect; levels are returned as they are.
            stop_early: Stop after the last level asked for.
            output_fmt: Layout of the feature maps; only 'NCHW'.
            intermediates_only: Return only the levels.

        Returns:
            The final features (of the last stage that ran, if stopped early) and a list of the levels, or only the
            list if `intermediates_only`.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)

        x = self.act1(self.stem(x))
        if 0 in take_indices:
            intermediates.append(x)
        x = self.pool(x)
        if 1 in take_indices:
            intermediates.append(x)
        if torch.jit.is_scripting() or not stop_early:  # can't slice blocks in torchscript
            stages = self.stages
        else:
            stages = self.stages[:max(0, max_index - 1)]
        for feat_idx, stage in enumerate(stages, start=2):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if feat_idx in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates
        if len(stages) == len(self.stages):
            x = self.act2(self.conv_head(x))
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ):
        """Remove the layers that are not needed for the levels `indices`."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        prune_end = max_index < len(self.feature_info) - 1
        self.stages = self.stages[:max(0, max_index - 1)]
        if max_index == 0:
            self.pool = nn.Identity()
        if prune_norm or prune_end:
            self.conv_head, self.act2 = nn.Identity(), nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_norm or prune_end:
            self.fc1, self.act3 = nn.Identity(), nn.Identity()
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.act1(self.stem(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        return self.act2(self.conv_head(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        x = F.dropout(x, p=self.drop_rate, training=self.training)
        x = self.flatten(self.act3(self.fc1(x)))
        x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


def _cfg(**kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv', 'classifier': 'classifier',
        'paper_ids': 'arXiv:2005.06828',
        'paper_name': 'Finet: Using Fine-grained Batch Normalization to Train Light-weight Neural Networks',
        'license': 'apache-2.0',
        **kwargs
    }


default_cfgs = generate_default_cfgs({
    # Best first: without a tag, pretrained=True loads in1k or, if there is none, the first tag.
    'finet_large_se_g4.tiny_in200': _cfg(
        file=str(WEIGHTS / 'finet_large_se_g4.tiny_in200.safetensors'), **TINY_IN200.cfg()),
    'finet_large_se_g4.cifar10': _cfg(file=str(WEIGHTS / 'finet_large_se_g4.cifar10.safetensors'), **CIFAR10.cfg()),
    'finet_large_se_g4.cifar100': _cfg(file=str(WEIGHTS / 'finet_large_se_g4.cifar100.safetensors'), **CIFAR100.cfg()),
    'finet_small_se_g4.tiny_in200': _cfg(
        file=str(WEIGHTS / 'finet_small_se_g4.tiny_in200.safetensors'), **TINY_IN200.cfg()),
    'finet_small_g4.cifar10': _cfg(file=str(WEIGHTS / 'finet_small_g4.cifar10.safetensors'), **CIFAR10.cfg()),
    # `*` keeps the paper's network the default. It must come last, else timm makes a tag with weights the default.
    'finet_small.untrained*': _cfg(),
    'finet_small_g2.untrained*': _cfg(),
    'finet_small_g4.untrained*': _cfg(),
    'finet_small_g6.untrained*': _cfg(),
    'finet_small_g8.untrained*': _cfg(),
    'finet_small_se.untrained*': _cfg(),
    'finet_small_se_g2.untrained*': _cfg(),
    'finet_small_se_g4.untrained*': _cfg(),
    'finet_small_se_g6.untrained*': _cfg(),
    'finet_small_se_g8.untrained*': _cfg(),
    'finet_large.untrained*': _cfg(),
    'finet_large_g2.untrained*': _cfg(),
    'finet_large_g4.untrained*': _cfg(),
    'finet_large_g6.untrained*': _cfg(),
    'finet_large_g8.untrained*': _cfg(),
    'finet_large_se.untrained*': _cfg(),
    'finet_large_se_g2.untrained*': _cfg(),
    'finet_large_se_g4.untrained*': _cfg(),
    'finet_large_se_g6.untrained*': _cfg(),
    'finet_large_se_g8.untrained*': _cfg(),
})

# Arguments that the weights need and that timm's cfgs cannot hold. They stay as they are if a default changes.
TRAINED_WITH = {
    'finet_large_se_g4.tiny_in200': dict(act_place='depthwise'),
    'finet_large_se_g4.cifar10': dict(act_place='depthwise'),
    'finet_large_se_g4.cifar100': dict(act_place='depthwise'),
    'finet_small_se_g4.tiny_in200': dict(act_place='depthwise'),
    'finet_small_g4.cifar10': dict(act_place='depthwise'),
}


def _create_finet(variant: str, pretrained: bool, kwargs: Dict[str, Any], **model_args: Any) -> Finet:
    """Build a variant with its own `model_args`, which the caller's `kwargs` may replace."""
    return build_model(
        Finet, variant, pretrained, TRAINED_WITH,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True),
        **{**model_args, **kwargs},
    )


SMALL, LARGE = (30, 60, 120), (100, 200, 400)  # channels, Table 1


@register_model
def finet_small(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small with plain BatchNorm, the paper's baseline."""
    return _create_finet('finet_small', pretrained, kwargs, channels=SMALL)


@register_model
def finet_small_g2(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small, G = 2."""
    return _create_finet('finet_small_g2', pretrained, kwargs, channels=SMALL, fbn_groups=2)


@register_model
def finet_small_g4(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small, G = 4."""
    return _create_finet('finet_small_g4', pretrained, kwargs, channels=SMALL, fbn_groups=4)


@register_model
def finet_small_g6(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small, G = 6."""
    return _create_finet('finet_small_g6', pretrained, kwargs, channels=SMALL, fbn_groups=6)


@register_model
def finet_small_g8(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small, G = 8."""
    return _create_finet('finet_small_g8', pretrained, kwargs, channels=SMALL, fbn_groups=8)


@register_model
def finet_small_se(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small with Squeeze-and-Excitation and plain BatchNorm, the paper's baseline."""
    return _create_finet('finet_small_se', pretrained, kwargs, channels=SMALL, use_se=True)


@register_model
def finet_small_se_g2(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small with Squeeze-and-Excitation, G = 2."""
    return _create_finet('finet_small_se_g2', pretrained, kwargs, channels=SMALL, use_se=True, fbn_groups=2)


@register_model
def finet_small_se_g4(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small with Squeeze-and-Excitation, G = 4."""
    return _create_finet('finet_small_se_g4', pretrained, kwargs, channels=SMALL, use_se=True, fbn_groups=4)


@register_model
def finet_small_se_g6(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small with Squeeze-and-Excitation, G = 6."""
    return _create_finet('finet_small_se_g6', pretrained, kwargs, channels=SMALL, use_se=True, fbn_groups=6)


@register_model
def finet_small_se_g8(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet small with Squeeze-and-Excitation, G = 8."""
    return _create_finet('finet_small_se_g8', pretrained, kwargs, channels=SMALL, use_se=True, fbn_groups=8)


@register_model
def finet_large(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large with plain BatchNorm, the paper's baseline."""
    return _create_finet('finet_large', pretrained, kwargs, channels=LARGE)


@register_model
def finet_large_g2(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large, G = 2."""
    return _create_finet('finet_large_g2', pretrained, kwargs, channels=LARGE, fbn_groups=2)


@register_model
def finet_large_g4(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large, G = 4."""
    return _create_finet('finet_large_g4', pretrained, kwargs, channels=LARGE, fbn_groups=4)


@register_model
def finet_large_g6(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large, G = 6."""
    return _create_finet('finet_large_g6', pretrained, kwargs, channels=LARGE, fbn_groups=6)


@register_model
def finet_large_g8(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large, G = 8."""
    return _create_finet('finet_large_g8', pretrained, kwargs, channels=LARGE, fbn_groups=8)


@register_model
def finet_large_se(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large with Squeeze-and-Excitation and plain BatchNorm, the paper's baseline."""
    return _create_finet('finet_large_se', pretrained, kwargs, channels=LARGE, use_se=True)


@register_model
def finet_large_se_g2(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large with Squeeze-and-Excitation, G = 2."""
    return _create_finet('finet_large_se_g2', pretrained, kwargs, channels=LARGE, use_se=True, fbn_groups=2)


@register_model
def finet_large_se_g4(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large with Squeeze-and-Excitation, G = 4."""
    return _create_finet('finet_large_se_g4', pretrained, kwargs, channels=LARGE, use_se=True, fbn_groups=4)


@register_model
def finet_large_se_g6(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large with Squeeze-and-Excitation, G = 6."""
    return _create_finet('finet_large_se_g6', pretrained, kwargs, channels=LARGE, use_se=True, fbn_groups=6)


@register_model
def finet_large_se_g8(pretrained: bool = False, **kwargs: Any) -> Finet:
    """Finet large with Squeeze-and-Excitation, G = 8."""
    return _create_finet('finet_large_se_g8', pretrained, kwargs, channels=LARGE, use_se=True, fbn_groups=8)
