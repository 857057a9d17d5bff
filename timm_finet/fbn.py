"""Fine-grained Batch Normalization (FBN), arXiv 2005.06828, equation (4).

A convolution's input is split into G groups of channels. Each group's partial sum is batch-normalised, and the results
are added:

    y = sum_g [ gamma_g (z_g - mu_g) / sqrt(var_g + eps) + beta_g ],    z_g = W_g x_g

`mu_g` and `var_g` are the mean and biased variance of `z_g` over the batch. `FBNConv2d` computes `y` in one of four
forms:

- folded: with known statistics the layer is one plain convolution (`fold`);
- moment form: in training a 1x1 layer computes the statistics from the input's moments (ops/moment_form.py);
- group by group: in training, layers with larger kernels compute one `z_g` at a time (ops/recomputed.py);
- reference form, the paper's own: the layer computes all `z_g` at once and calls its norm on them. It does so where no
  other form is known to be right, or none would save memory. `ReferenceFBNConv2d` always uses this form.
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

from .ops.moment_form import MomentForm, Running, track
from .ops.recomputed import RecomputedNorm
from .ops.torch_passes import has_autocast, memory_format
from .ops.tracing import operators_alone

__all__ = ['FBNConv2d', 'ReferenceFBNConv2d']

# The norms whose results a layer may compute without calling them. timm's `freeze` inserts FrozenBatchNorm2d.
KNOWN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
# Their original forwards, because some programs replace the forward of a whole class.
KNOWN_FORWARDS = [norm.forward for norm in KNOWN_NORMS]


@torch.compiler.assume_constant_result
def _warn(text: str) -> None:
    warnings.warn(text)  # without stacklevel Python shows each text once, not once for each caller


@torch.fx.wrap  # torch.fx cannot trace the branch
def check_input(x: torch.Tensor, in_channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ValueError(f'The input must be (N, {in_channels}, H, W), not {list(x.shape)}.')


def has_hooks(module: nn.Module) -> bool:
    # torch has no public function for this; checked with torch 2.11 and 2.15.
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

        W'_g = gamma_g W_g / sqrt(var_g + eps),    b' = sum_g [ beta_g - gamma_g mu_g / sqrt(var_g + eps) ]

    Args:
        weight: `(out, in, kh, kw)`.
        mean, var: `(G * out,)`, the statistics of the groups' partial sums, group-major.
        gamma, beta: `(G * out,)` or None.
        groups: G.

    Returns:
        The folded weight, shaped as `weight`, and the bias `(out,)`, both in the dtype of `mean`.
    """
    out = weight.shape[0]
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma.to(scale.dtype)
    bias = -mean * scale
    if beta is not None:
        bias = bias + beta.to(scale.dtype)
    weight = weight.to(scale.dtype).unflatten(1, [groups, -1])  # (out, G, C / G, kh, kw)
    weight = weight * scale.view(groups, out).t()[:, :, None, None, None]
    return weight.flatten(1, 2), bias.view(groups, out).sum(0)


@register_notrace_module
class FBNConv2d(nn.Module):
    """Convolution with Fine-grained Batch Normalization: a drop-in for `nn.Conv2d(bias=False)` + `nn.BatchNorm2d`.

    `weight` has the shape of a plain convolution's, `(out, in, k, k)`. `bn` holds the statistics and affine parameters
    of the `fbn_groups * out` intermediate channels, group-major. In eval mode the running statistics are folded into
    the weight on the fly. Statistics are computed in at least float32.

    The class is not a subclass of `nn.Conv2d`, because some programs change a convolution's weight in ways that are
    wrong with the norm inside: they fold a following BatchNorm into it, or merge an update that they have learned
    separately.

    In all forms except the paper's (the fast forms), the layer uses the parameters and statistics of `bn` and does not
    call it. This requires that `bn` is exactly torch's BatchNorm2d or SyncBatchNorm, or torchvision's
    FrozenBatchNorm2d, without hooks. With a SyncBatchNorm the statistics cover all its processes. If another module
    replaces or wraps `bn` (FSDP, checkpointing, peft), the layer calls that module in the paper's form, which takes G
    times the memory, and warns if G > 1. Training under torch.export, torch.jit and torch.func uses the paper's form
    too.

    Neither the fast 1x1 form nor any form with synchronised statistics has second derivatives. No fast form has
    forward-mode derivatives.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation: As for `nn.Conv2d`.
        fbn_groups: G, the number of groups that the *input channels* are split into for normalisation. It is unrelated
            to grouped convolution. 1 is plain BatchNorm, and runs as such.
        affine, eps, momentum: As for `nn.BatchNorm2d`; each intermediate channel has its own gamma and beta.
        save_memory: Keep only the input for the backward pass at `fbn_groups=1` too. This takes more time; plain
            BatchNorm keeps its own input as well. With more groups the fast forms keep only the input anyway.

    Raises:
        ValueError: `fbn_groups` is not a positive integer that divides `in_channels`; the input is not
            `(N, in, H, W)`; or a training batch has one value per channel.
        RuntimeError: Outside autocast, the input's dtype differs from the weight's.

    Shape:
        `(N, in, H, W)` to `(N, out, H', W')`, dtype and memory format as for `nn.Conv2d`. `layer(x, relu=True)` returns
        the ReLU of this output; the fast 1x1 form then never stores the ReLU's input.
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
            raise ValueError(
                f'fbn_groups={fbn_groups!r} must be a positive integer that divides in_channels={in_channels}.')
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
        """Initialise the weight as `nn.Conv2d` does; `bn` has its own `reset_parameters`."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={self.padding}, dilation={self.dilation}, fbn_groups={self.fbn_groups}'
            + (', save_memory=True' if self.save_memory else ''))

    def __prepare_scriptable__(self) -> nn.Module:
        """Decide for torch.jit.script whether to call `bn`, because the scripted graph cannot decide."""
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
            _warn(f"{type(self).__name__} computes in the paper's form, which takes fbn_groups={self.fbn_groups} times "
                  f'the memory of its output, because {reason}.')
        if not reason and not self._uses_batch_statistics():
            y = self.folded(x)
        elif reason or operators_alone():
            y = self.reference(x)
        else:
            return self._fast_forms(x, relu)
        return F.relu(y) if relu else y

    @torch.jit.unused
    def _why_called(self) -> str:
        """Return why `bn` must be called, or '' if the layer may compute or fold its result without calling it."""
        bn = self.bn
        if type(bn) not in KNOWN_NORMS:
            # Parametrising changes a module's class. A parametrised weight or bias is fine.
            if type_before_parametrizations(bn) not in KNOWN_NORMS:
                return f'bn is a {type(bn).__module__}.{type(bn).__name__}'
            if is_parametrized(bn, 'running_mean') or is_parametrized(bn, 'running_var'):
                return 'the statistics of bn are parametrised'
        if 'forward' in vars(bn) or type(bn).forward not in KNOWN_FORWARDS:
            return f"bn's forward is not {type(bn).__name__}'s own"
        if has_hooks(bn):
            return 'bn has hooks'
        if (bn.weight is None) != (bn.bias is None):
            return 'bn has only one of weight and bias'
        if bn.running_mean is None and bn.track_running_stats:  # BatchNorm still counts batches then
            return 'bn has lost its running statistics'
        width = self.fbn_groups * self.out_channels
        if getattr(bn, 'num_features', width) != width:
            return f'bn has {bn.num_features} features, not fbn_groups * out_channels = {width}'
        return ''

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the paper's own form (Figure 3a): a grouped convolution to `G * out` channels, the norm, the sum."""
        weight = self.weight.unflatten(1, [self.fbn_groups, -1]).transpose(0, 1).flatten(0, 1)
        z = F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.fbn_groups)
        z = self.bn(z)
        if self.fbn_groups == 1:
            return z
        z_groups = z.chunk(self.fbn_groups, 1)  # a sum over a dimension for the groups would lose channels_last
        y = z_groups[0] + z_groups[1]
        for z_g in z_groups[2:]:
            y = y + z_g
        return y

    @torch.jit.unused
    def _fast_forms(self, x: torch.Tensor, relu: bool) -> torch.Tensor:
        process_group = self._process_group()
        # Processes that share statistics must all use the same form, although their numbers of positions may differ.
        if process_group is None and self._prefers_reference(x):
            y = self.reference(x)
            return F.relu(y) if relu else y
        form = self._moment_form if self._prefers_moments(x, process_group) else self._group_by_group
        weight = self.weight  # read once: a parametrisation may compute another one at each access
        device = x.device.type
        if has_autocast(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
            if torch.compiler.is_compiling():
                with torch.autocast(device, enabled=False):
                    return form(x, weight, process_group, relu)
            torch.set_autocast_enabled(device, False)  # as `torch.autocast` does, but faster on the host
            try:
                return form(x, weight, process_group, relu)
            finally:
                torch.set_autocast_enabled(device, True)
        if x.dtype != weight.dtype:
            raise RuntimeError(f'Input type ({x.dtype}) and weight type ({weight.dtype}) should be the same.')
        return form(x, weight, process_group, relu)

    @torch.jit.unused
    def _count_positions(self, x: torch.Tensor) -> int:
        """Return about how many positions the output has."""
        return x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])

    @torch.jit.unused
    def _prefers_reference(self, x: torch.Tensor) -> bool:
        """Whether to use the reference form, where each process has its own statistics.

        With one group this is so unless `save_memory` is set. With more groups the form's intermediate must have fewer
        than four times as many elements as the weight.
        """
        if not x.numel():
            return True
        if self.fbn_groups == 1:
            return not self.save_memory
        weights = self.in_channels * self.kernel_size[0] * self.kernel_size[1]  # of one output channel
        return self.fbn_groups * self._count_positions(x) < 4 * weights

    @torch.jit.unused
    def _prefers_moments(self, x: torch.Tensor, process_group) -> bool:
        """Whether to use the moment form rather than group by group.

        It needs an unpadded 1x1 convolution. With one group it must also be less work: its moments take `2 in^2`
        multiply-adds a position, and `2 out in^2` for the whole batch, while group by group repeats the convolution,
        which takes `in out` a position.
        """
        if self.kernel_size != (1, 1) or self.padding != (0, 0):
            return False
        if self.fbn_groups > 1:
            return True
        c_in, c_out = self.in_channels, self.out_channels
        # Both sides are divided by `in`. Processes that share statistics must all use the same form.
        return process_group is None and self._count_positions(x) * (c_out - 2 * c_in) > 2 * c_out * c_in

    @torch.jit.ignore
    def _uses_batch_statistics(self) -> bool:
        # The known norms decide in the same way. For fine-tuning, people often put only `bn` in eval mode.
        bn = self.bn
        return not isinstance(bn, FrozenBatchNorm2d) and (bn.training or bn.running_mean is None)

    @torch.jit.unused
    def _process_group(self):
        """Return the processes that share statistics, or None unless `bn` has become a SyncBatchNorm."""
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
        mean, var = bn.running_mean.to(weight.device, dtype), bn.running_var.to(weight.device, dtype)
        return fold(weight, mean, var, bn.weight, bn.bias, bn.eps, self.fbn_groups)

    def _moment_form(self, x: torch.Tensor, weight: torch.Tensor, process_group, relu: bool) -> torch.Tensor:
        original = x
        if self.stride != (1, 1):
            # Keep every stride-th position. Slicing does the same, but the gradient of a slice loses channels_last.
            x = F.avg_pool2d(x, 1, self.stride)
        bn = self.bn
        arguments = (x, weight, bn.weight, bn.bias, self.fbn_groups, bn.eps, process_group, relu)
        on_cpu = x.device.type == 'cpu'
        if not on_cpu and not torch.compiler.is_compiling():
            # MomentForm also updates the running statistics, because its Triton kernels need no further launch for it.
            return MomentForm.apply(*arguments, self._running())[0]
        y, mean, var, count = MomentForm.apply(*arguments)
        has_values = type(var) is torch.Tensor and not torch.compiler.is_compiling()  # fake tensors have none
        if on_cpu and process_group is None and has_values:
            # The input's squares may overflow although the variances of its partial sums do not.
            if not math.isfinite(var.sum()):
                y = self.reference(original)
                return F.relu(y) if relu else y
        self._track(mean, var * (count / (count - 1)))
        return y

    def _group_by_group(self, x: torch.Tensor, weight: torch.Tensor, process_group, relu: bool) -> torch.Tensor:
        """Compute one group at a time. Its partial sum is not kept; the backward pass computes it again."""
        bn, groups, padding = self.bn, self.fbn_groups, self.padding
        dtype = torch.promote_types(x.dtype, torch.float32)
        if padding == 'valid':  # RecomputedNorm takes only numbers
            padding = 0, 0
        elif padding == 'same':
            height, width = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]  # both sides together
            x, padding = F.pad(x, (0, width % 2, 0, height % 2)), (height // 2, width // 2)
        conv = self.stride, padding, self.dilation
        xs, weights = x.chunk(groups, 1), weight.to(x.dtype).chunk(groups, 1)
        if bn.weight is None:
            gammas = betas = [None] * groups
        else:
            gammas, betas = bn.weight.to(dtype).chunk(groups), bn.bias.to(dtype).chunk(groups)

        y, means, variances = None, [], []
        for g in range(groups):
            z, mean, var = RecomputedNorm.apply(
                xs[g], weights[g], gammas[g], betas[g], bn.eps, conv, memory_format(x), process_group)
            y = z if y is None else y.add_(z)
            means.append(mean)
            variances.append(var)
        self._track(torch.cat(means), torch.cat(variances))
        return y.relu_() if relu else y

    def _running(self) -> Optional[Running]:
        """Return the running statistics that a batch updates through `track`, or None if it updates none."""
        bn = self.bn
        if not (bn.training and bn.track_running_stats):
            return None
        momentum, batches = bn.momentum, bn.num_batches_tracked
        if momentum is None:  # the mean of all batches
            if batches is None:
                return None
            batches.add_(1)
            momentum, batches = 1 / float(batches), None
        return bn.running_mean, bn.running_var, momentum, batches

    @torch.no_grad()
    def _track(self, mean: torch.Tensor, unbiased_var: torch.Tensor) -> None:
        running = self._running()
        if running is not None:
            track(running, mean, unbiased_var)

    def why_unfusable(self) -> str:
        """Return why the layer cannot be fused, or '' if it can."""
        return self._why_called() or ('bn has no running statistics' if self.bn.running_mean is None else '')

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Return the plain convolution with bias that computes what this layer does in eval mode.

        The convolution has the layer's device, dtype, memory format, `requires_grad` and train or eval mode.

        Like timm's own `fuse` methods, this method folds the running statistics in train mode too, because timm's
        scripts fuse before they call `.eval()`.

        Raises:
            RuntimeError: `bn` has no running statistics, or the layer has to call `bn`.
        """
        reason = self.why_unfusable()
        if reason:
            raise RuntimeError(f'An FBNConv2d cannot be fused if {reason}.')
        weight = self.weight
        folded, bias = self._folded(weight)
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
            device='meta')
        conv.weight = nn.Parameter(torch.empty_like(weight).copy_(folded), weight.requires_grad)
        conv.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)
        return conv.train(self.training)


class ReferenceFBNConv2d(FBNConv2d):
    """FBN in the paper's own form (Figure 3a), with G times the activations.

    Every other form is compared with this one. The arguments are those of `FBNConv2d`.
    """

    def forward(self, x: torch.Tensor, relu: bool = False) -> torch.Tensor:
        y = self.reference(x)
        return F.relu(y) if relu else y


def as_reference(layer: FBNConv2d) -> ReferenceFBNConv2d:
    """Return the layer in the paper's form, with the same parameters and the same norm."""
    reference = ReferenceFBNConv2d.__new__(ReferenceFBNConv2d)
    reference.__dict__.update(layer.__dict__)
    return reference
