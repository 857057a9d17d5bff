"""Fine-grained Batch Normalization (FBN), arXiv 2005.06828, equation (4).

A convolution's input is split into G groups of channels; each group's partial sum is batch-normalised, then all are
added:

    y = sum_g [ gamma_g (z_g - mu_g) / sqrt(var_g + eps) + beta_g ],    z_g = W_g x_g

`mu_g` and `var_g` are the mean and biased variance of `z_g` over the batch. `FBNConv2d` computes that without the
`z_g`: with known statistics as one plain convolution (`fold`), in training from the input's moments
(ops/moment_form.py) or, for kernels larger than 1x1, one group at a time. Where that is not known to be right it
computes the `z_g` and calls its norm on them, as `ReferenceFBNConv2d` always does.
"""
import math
import warnings
from typing import Optional, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations
from torchvision.ops import FrozenBatchNorm2d

from timm.layers import register_notrace_module, to_2tuple

from .ops.moment_form import MomentForm
from .ops.recomputed import RecomputedNorm
from .ops.torch_passes import has_autocast, memory_format
from .ops.tracing import operators_alone

__all__ = ['FBNConv2d', 'ReferenceFBNConv2d']

# The norms whose results a layer may compute without calling them. timm's `freeze` puts the frozen one in.
KNOWN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
# Their forwards as torch defines them: some programs replace those of a whole class.
KNOWN_FORWARDS = [norm.forward for norm in KNOWN_NORMS]


@torch.compiler.assume_constant_result
def _warn(text: str) -> None:
    warnings.warn(text)  # without a caller's place Python shows a text once


@torch.fx.wrap  # symbolic tracing cannot take the branch
def check_input(x: torch.Tensor, in_channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f'The input must be (N, {in_channels}, H, W), not {list(x.shape)}.')


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def fold(
        weight: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        gamma: Optional[torch.Tensor],
        beta: Optional[torch.Tensor],
        eps: float,
        groups: int,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Fold statistics into a convolution (equations 8 and 9).

    Args:
        weight: `(out, in, kh, kw)`.
        mean, var: `(G * out,)`, the statistics of each group's partial sum, group-major.
        gamma, beta: `(G * out,)` or None.
        groups: G.

    Returns:
        The weight, shaped as before, and the bias `(out,)`, both in the dtype of `mean`.
    """
    out = weight.shape[0]
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma.to(scale.dtype)
    bias = -mean * scale
    if beta is not None:
        bias = bias + beta.to(scale.dtype)
    weight = weight.to(scale.dtype).unflatten(1, [groups, -1]) * scale.view(groups, out).t()[:, :, None, None, None]
    return weight.flatten(1, 2), bias.view(groups, out).sum(0)


@register_notrace_module
class FBNConv2d(nn.Module):
    """Convolution with Fine-grained Batch Normalization: a drop-in for `nn.Conv2d(bias=False)` + `nn.BatchNorm2d`.

    `weight` is a plain convolution's, `(out, in, k, k)`; `bn` holds the `fbn_groups * out` statistics and affine pairs,
    group-major. In eval mode the running statistics are folded on the fly. Statistics are computed in at least float32.

    It is no `nn.Conv2d`: whatever changes a convolution's weight by the BatchNorm behind it, or adds to its weight what
    it has learnt beside it, would be wrong here, where the norm is inside.

    `bn` is computed with, not called, as long as it is exactly torch's BatchNorm2d or SyncBatchNorm, or torchvision's
    FrozenBatchNorm2d, without hooks. A SyncBatchNorm synchronises the statistics. Any other module in its place, or
    round it (FSDP, checkpointing, peft), is called as in the paper's form, at G times the memory; a warning says so.
    So it is under torch.export, torch.jit.script and torch.func. The fast 1x1 form has no second derivatives, nor has
    a form with synchronised statistics; all others have. No fast form has forward-mode derivatives.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: As for `nn.Conv2d`.
        fbn_groups: G, into how many groups the *input channels* are split for normalisation. It has nothing to do with
            a grouped convolution; 1 is plain BatchNorm, and runs as such.
        affine, eps, momentum: As for `nn.BatchNorm2d`; gamma and beta are per intermediate channel.
        save_memory: At `fbn_groups=1` too, keep nothing but the input for the backward pass, which takes more time.
            Plain BatchNorm keeps its own input as well. With more groups it is always so.

    Raises:
        ValueError: `fbn_groups` does not divide `in_channels`; the input is not `(N, in, H, W)`; or, when training, it
            has one value per channel.
        RuntimeError: The input's dtype is not the weight's, outside autocast.

    Shape:
        `(N, in, H, W)` to `(N, out, H', W')`, dtype and memory format as for `nn.Conv2d`. `layer(x, relu=True)` gives
        the ReLU of that, and the fast 1x1 form then never stores what goes into the ReLU.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, Tuple[int, int]] = 1,
            stride: Union[int, Tuple[int, int]] = 1,
            padding: Union[int, Tuple[int, int], str] = 0,
            dilation: Union[int, Tuple[int, int]] = 1,
            fbn_groups: int = 4,
            affine: bool = True,
            eps: float = 1e-5,
            momentum: Optional[float] = 0.1,
            save_memory: bool = False,
            device=None,
            dtype=None,
    ):
        if type(fbn_groups) is not int or fbn_groups < 1 or in_channels % fbn_groups:
            raise ValueError(f'fbn_groups={fbn_groups!r} must be an integer that divides in_channels={in_channels}.')
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = to_2tuple(kernel_size)
        self.stride = to_2tuple(stride)
        self.padding = padding if isinstance(padding, str) else to_2tuple(padding)
        self.dilation = to_2tuple(dilation)
        self.fbn_groups = fbn_groups
        self.save_memory = save_memory
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size, **dd))
        self.bn = nn.BatchNorm2d(fbn_groups * out_channels, eps, momentum, affine, **dd)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the weight as `nn.Conv2d` does; `bn` has a method of its own."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, dilation={self.dilation}, fbn_groups={self.fbn_groups}'
            + (', save_memory=True' if self.save_memory else ''))

    def __prepare_scriptable__(self) -> nn.Module:
        """For torch.jit.script, whose graph cannot ask what `bn` is."""
        if type(self) is FBNConv2d and self._why_called():
            return as_reference(self)
        return self

    def forward(self, x: torch.Tensor, relu: bool = False) -> torch.Tensor:
        check_input(x, self.in_channels)
        if torch.jit.is_scripting():
            y = self.reference(x) if self.bn.training or self.bn.running_mean is None else self.folded(x)
            return F.relu(y) if relu else y
        reason = self._why_called()
        if reason and self.fbn_groups > 1:
            _warn(f"{type(self).__name__} computes in the paper's form, at fbn_groups={self.fbn_groups} times the "
                  f'memory of its output, because {reason}.')
        if not reason and not self._uses_batch_statistics():
            y = self.folded(x)
        elif reason or operators_alone():
            y = self.reference(x)
        else:
            return self._fast_forms(x, relu)
        return F.relu(y) if relu else y

    @torch.jit.unused
    def _why_called(self) -> str:
        """Why `bn` has to be called, or '' where its result may be computed without: in training, eval and folding."""
        bn = self.bn
        if type(bn) not in KNOWN_NORMS:  # parametrising gives a module another class
            if type_before_parametrizations(bn) not in KNOWN_NORMS:
                return f'bn is a {type(bn).__module__}.{type(bn).__name__}'
            if is_parametrized(bn, 'running_mean') or is_parametrized(bn, 'running_var'):
                return 'the statistics of bn are parametrised'
        if 'forward' in vars(bn) or type(bn).forward not in KNOWN_FORWARDS:
            return f"bn's forward is not {type(bn).__name__}'s own"
        if has_hooks(bn):
            return 'bn has hooks'
        if (bn.weight is None) != (bn.bias is None):
            return 'bn has one of weight and bias alone'
        width = self.fbn_groups * self.out_channels
        if getattr(bn, 'num_features', width) != width:
            return f'bn has {bn.num_features} features, not fbn_groups * out_channels = {width}'
        return ''

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """The paper's own form (Figure 3a): a grouped convolution to `G * out` channels, the norm, the sum."""
        weight = self.weight.unflatten(1, [self.fbn_groups, -1]).transpose(0, 1).flatten(0, 1)
        z = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.fbn_groups)
        z = self.bn(z)
        if self.fbn_groups == 1:
            return z
        parts = z.chunk(self.fbn_groups, 1)  # a sum over a dimension of its own would come out contiguous
        y = parts[0] + parts[1]
        for part in parts[2:]:
            y = y + part
        return y

    @torch.jit.unused
    def _fast_forms(self, x: torch.Tensor, relu: bool) -> torch.Tensor:
        group = self._process_group()
        # Not so with a process group: all processes have to go one way, whatever their share of the batch.
        if group is None and self._is_cheap(x):
            y = self.reference(x)
            return F.relu(y) if relu else y
        form = self._moment_form if self._takes_moments(x, group) else self._group_by_group
        weight = self.weight  # once, as a parametrisation may compute another one each time
        device = x.device.type
        if has_autocast(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return form(x.to(dtype), weight, group, relu)
        if x.dtype != weight.dtype:
            raise RuntimeError(f'Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same.')
        return form(x, weight, group, relu)

    @torch.jit.unused
    def _positions(self, x: torch.Tensor) -> int:
        return x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])

    @torch.jit.unused
    def _is_cheap(self, x: torch.Tensor) -> bool:
        """Whether the reference form writes nothing G times wide, or nothing that is large beside the weight."""
        if not x.numel():
            return True
        if self.fbn_groups == 1:
            return not self.save_memory
        weights = self.in_channels * self.kernel_size[0] * self.kernel_size[1]  # of one output channel
        return self.fbn_groups * self._positions(x) < 4 * weights

    @torch.jit.unused
    def _takes_moments(self, x: torch.Tensor, process_group) -> bool:
        """Whether the moment form is possible, and at one group also less work than the convolution once more.

        In multiply-adds: for the moments `2 in^2` a position and `2 out in^2` in all; `in out` a position for the
        convolution.
        """
        if self.kernel_size != (1, 1) or self.padding != (0, 0):
            return False
        if self.fbn_groups > 1:
            return True
        c_in, c_out = self.in_channels, self.out_channels
        return process_group is None and self._positions(x) * (c_out - 2 * c_in) > 2 * c_out * c_in

    @torch.jit.ignore
    def _uses_batch_statistics(self) -> bool:
        # Of the norms that may be passed by; one in eval mode is a common way to fine-tune.
        bn = self.bn
        return not isinstance(bn, FrozenBatchNorm2d) and (bn.training or bn.running_mean is None)

    @torch.jit.unused
    def _process_group(self):
        """The processes that share statistics: those of a child that has become a SyncBatchNorm."""
        if isinstance(self.bn, nn.SyncBatchNorm) and self.bn.training and dist.is_available() and dist.is_initialized():
            group = self.bn.process_group or dist.group.WORLD
            return group if dist.get_world_size(group) > 1 else None
        return None

    def folded(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        folded, bias = self._folded(weight)
        return F.conv2d(x, folded.to(weight.dtype), bias.to(weight.dtype), self.stride, self.padding, self.dilation)

    def _folded(self, weight: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        bn = self.bn
        dtype = torch.promote_types(weight.dtype, torch.float32)
        mean, var = bn.running_mean.to(dtype), bn.running_var.to(dtype)
        return fold(weight, mean, var, bn.weight, bn.bias, bn.eps, self.fbn_groups)

    def _moment_form(self, x: torch.Tensor, weight: torch.Tensor, process_group, relu: bool) -> torch.Tensor:
        original = x
        if self.stride != (1, 1):
            # Every stride-th position; a slice's gradient would come out contiguous.
            x = F.avg_pool2d(x, 1, self.stride)
        bn = self.bn
        arguments = (x, weight, bn.weight, bn.bias, self.fbn_groups, bn.eps, process_group, relu)
        on_cpu = x.device.type == 'cpu'
        if not on_cpu and not torch.compiler.is_compiling():  # the passes move the statistics: no launch more
            momentum = self._count_batch()
            running = None if momentum is None else (bn.running_mean, bn.running_var, momentum)
            return MomentForm.apply(*arguments, running)[0]
        y, mean, var, count = MomentForm.apply(*arguments)
        if on_cpu and process_group is None and not torch.compiler.is_compiling():
            if not math.isfinite(var.sum()):  # the input's squares overflow sooner than its partial sums' variances
                y = self.reference(original)
                return F.relu(y) if relu else y
        self._track(mean, var * (count / (count - 1)))
        return y

    def _group_by_group(self, x: torch.Tensor, weight: torch.Tensor, process_group, relu: bool) -> torch.Tensor:
        """One group at a time, whose partial sum is computed again in the backward pass instead of kept."""
        bn, groups, padding = self.bn, self.fbn_groups, self.padding
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(padding, str):  # a convolution's gradients take numbers alone
            height, width = [d * (k - 1) if padding == 'same' else 0 for d, k in zip(self.dilation, self.kernel_size)]
            x, padding = F.pad(x, (0, width % 2, 0, height % 2)), (height // 2, width // 2)
        conv = self.stride, padding, self.dilation
        xs, weights = x.chunk(groups, 1), weight.to(x.dtype).chunk(groups, 1)
        gammas, betas = ([None] * groups if v is None else v.to(dtype).chunk(groups) for v in (bn.weight, bn.bias))

        y, means, variances = None, [], []
        for g in range(groups):
            z, mean, var = RecomputedNorm.apply(
                xs[g], weights[g], gammas[g], betas[g], bn.eps, conv, memory_format(x), process_group)
            y = z if y is None else y.add_(z)
            means.append(mean)
            variances.append(var)
        self._track(torch.cat(means), torch.cat(variances))
        return y.relu_() if relu else y

    def _count_batch(self) -> Optional[float]:
        """Count a batch. By how much it moves the running statistics, or None where they stay; as BatchNorm has it."""
        bn = self.bn
        if not (bn.training and bn.track_running_stats):
            return None
        if bn.num_batches_tracked is None:
            return bn.momentum
        bn.num_batches_tracked.add_(1)
        return 1 / float(bn.num_batches_tracked) if bn.momentum is None else bn.momentum

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, unbiased_var: torch.Tensor) -> None:
        bn, momentum = self.bn, self._count_batch()
        if momentum is not None:
            bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), momentum)
            bn.running_var.lerp_(unbiased_var.to(bn.running_var.dtype), momentum)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """The plain convolution with bias that this layer is in eval mode; device, dtype, layout, `requires_grad` stay.

        Raises:
            RuntimeError: In train mode, where the statistics are the batch's; or where `bn` has to be called.
        """
        reason = self._why_called()
        if reason:
            raise RuntimeError(f'An FBNConv2d cannot be fused where {reason}.')
        if self._uses_batch_statistics():
            raise RuntimeError('An FBNConv2d in train mode has no fixed statistics to fuse: call .eval() first.')
        weight = self.weight
        folded, bias = self._folded(weight)
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            device='meta')
        conv.weight = nn.Parameter(torch.empty_like(weight).copy_(folded), weight.requires_grad)
        conv.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)
        return conv.train(self.training)


class ReferenceFBNConv2d(FBNConv2d):
    """The paper's own form (Figure 3a), the measure of every other: G times the activations.

    Arguments as for `FBNConv2d`.
    """

    def forward(self, x: torch.Tensor, relu: bool = False) -> torch.Tensor:
        y = self.reference(x)
        return F.relu(y) if relu else y


def as_reference(layer: FBNConv2d) -> ReferenceFBNConv2d:
    """The same layer, its parameters and its norm, in the paper's form."""
    reference = ReferenceFBNConv2d.__new__(ReferenceFBNConv2d)
    reference.__dict__.update(layer.__dict__)
    return reference
