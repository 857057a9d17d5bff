"""FBN with an unpadded 1x1 convolution as one autograd function, without FBN's wide intermediate.

The partial sums are linear in the input, `z_g = W_g x_g`, so their statistics follow from the input's mean `m_g` and
covariance `S_g = E[(x_g - m_g) (x_g - m_g)^T]` over all positions, and equation (4) of arXiv 2005.06828 becomes one
convolution with nothing G times wide (equations 8 and 9):

    mu_g = W_g m_g,    var_g = diag(W_g S_g W_g^T)
    W'_g = gamma_g W_g / sqrt(var_g + eps)
    y = W' (x - m) + sum_g beta_g

A computation that reads or writes activations is called a pass (torch_passes.py, triton_passes.py). Between the passes
is algebra with tensors of the weight's size, which this file contains.

Covariances from sums of `x_i x_j` would suffer from cancellation where a channel's mean is large compared with its
deviation. The passes therefore sum shifted data `c = x - shift`, where `shift` is near the mean, so that
`shifted_mean = E[c] = m - shift` is small.
"""
import os
import warnings
from functools import lru_cache
from typing import Optional, Tuple, Union

import torch

try:
    import triton
except ImportError:
    triton = None

from .sync import all_reduce, pool_moments
from .torch_passes import TorchPasses, memory_format, moments_dtype, without_autocast

__all__ = ['MomentForm', 'Running', 'track']


# running_mean, running_var, momentum, and num_batches_tracked or None
Running = Tuple[torch.Tensor, torch.Tensor, float, Optional[torch.Tensor]]


def track(running: Running, mean: torch.Tensor, unbiased_var: torch.Tensor) -> None:
    """Count a batch and update `running` with its statistics, as BatchNorm does."""
    running_mean, running_var, momentum, batches = running
    if batches is not None:
        batches.add_(1)
    running_mean.lerp_(mean.flatten().to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased_var.flatten().to(running_var.dtype), momentum)


def by_group(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Return a view of a 1x1 convolution's weight `(out, C, ...)` as `(G, out, C/G)`."""
    return weight.view(len(weight), groups, -1).transpose(0, 1)


class TorchAlgebra:
    """The algebra in torch's operators, for passes that take the shifted copy `c` as their input."""

    @staticmethod
    def fold(
            weight: torch.Tensor,
            gamma: Optional[torch.Tensor],
            beta: Optional[torch.Tensor],
            shift: torch.Tensor,
            shifted_mean: torch.Tensor,
            cov: torch.Tensor,
            eps: float,
            dtype: torch.dtype,
            running: Optional[Running],
            count: Union[int, torch.Tensor],
    ) -> Tuple[torch.Tensor, ...]:
        """Fold the statistics, computed from the input's moments, into the convolution.

        Args:
            weight: `(out, C, 1, 1)`; gamma, beta: `(G * out,)` or None.
            shift, shifted_mean: `(C,)`; cov: `S_g` of all groups, `(G, C/G, C/G)`.
            dtype: The dtype of the folded weight.
            running: The running statistics that this batch updates, as for `track`, or None.
            count: The number of the batch's positions.

        Returns:
            The folded weight `W'` `(out, C, 1, 1)`; the bias `(out,)` of a convolution of `c`; mean and biased var
            `(G, out)`, valid only if `running` is None; and `1 / sqrt(var + eps)` `(G, out)` and `W_g S_g`
            `(G, out, C/G)`, which `unfold` takes.
        """
        groups, size, _ = cov.shape
        w = by_group(weight.to(cov.dtype), groups)
        m = (shift + shifted_mean).view(groups, size, 1)
        # W_g S_g and mu_g = W_g m_g in one product
        w_cov, mean = torch.bmm(w, torch.cat((cov, m), 2)).split((size, 1), 2)
        mean = mean.squeeze(2)
        var = (w_cov * w).sum(2).clamp_min(0)  # var_g = diag(W_g S_g W_g^T), which rounding may make negative
        inv_std = torch.rsqrt(var + eps)
        scale = inv_std if gamma is None else inv_std * gamma.view_as(inv_std)
        folded = (w * scale[..., None]).transpose(0, 1).reshape(weight.shape).to(dtype)  # W'_g
        # y = W' (x - m) + sum_g beta_g = W' c + bias, where x - m = c - shifted_mean. The bias uses W' as rounded to
        # `dtype`, so that the mean of y is the sum of the betas.
        bias = -(folded.flatten(1).to(cov.dtype) @ shifted_mean)
        if beta is not None:
            bias = bias + beta.view_as(inv_std).sum(0)
        if running is not None:
            track(running, mean, var * (count / (count - 1)))
        return folded, bias, mean, var, inv_std, w_cov

    @staticmethod
    def unfold(
            weight: torch.Tensor,
            gamma: Optional[torch.Tensor],
            shift: torch.Tensor,
            shifted_mean: torch.Tensor,
            inv_std: torch.Tensor,
            w_cov: torch.Tensor,
            sums: Tuple[torch.Tensor, torch.Tensor],
    ) -> Tuple[Optional[torch.Tensor], ...]:
        """Compute the backward pass of `fold`.

        Args:
            weight, gamma, shift, shifted_mean, inv_std, w_cov: As `fold` took or returned them. (`shift` is not used
                here. Passes whose convolution takes `x` itself need it.)
            sums: The return value of `weight_gradient`. Here these are the gradients of the folded weight `(out, C)`
                and the bias `(out,)` of the convolution of `c`.

        Returns:
            The gradients of weight, gamma, beta, var `(G, out)` and the bias `(out,)`. Those of gamma and beta are None
            if gamma is None.
        """
        groups, out, size = w_cov.shape
        grad_folded, grad_bias = sums
        w = by_group(weight.to(inv_std.dtype), groups)
        grad_folded = by_group(grad_folded, groups)
        shifted_mean = shifted_mean.view(groups, size, 1)
        scale = inv_std if gamma is None else inv_std * gamma.view_as(inv_std)
        # y = scale_g W_g (c - shifted_mean) + ...
        grad_scale = (grad_folded * w).sum(2) - grad_bias * torch.bmm(w, shifted_mean).squeeze(2)
        # scale = gamma (var + eps)^(-1/2), so d scale / d var = -1/2 scale / (var + eps)
        grad_var = -0.5 * grad_scale * scale * inv_std.square()
        grad_weight = grad_folded * scale[..., None]
        grad_weight.addcmul_(w_cov, grad_var[..., None], value=2)  # var = diag(W S W^T): its derivative is 2 W S
        grad_weight.addcmul_((grad_bias * scale)[..., None], shifted_mean.mT, value=-1)
        grad_weight = grad_weight.transpose(0, 1).reshape(weight.shape).to(weight.dtype)
        if gamma is None:
            return grad_weight, None, None, grad_var, grad_bias
        grad_gamma = (grad_scale * inv_std).flatten().to(gamma.dtype)
        grad_beta = grad_bias.repeat(groups).to(gamma.dtype)
        return grad_weight, grad_gamma, grad_beta, grad_var, grad_bias

    @staticmethod
    def input_terms(
            weight: torch.Tensor,
            folded: torch.Tensor,
            shift: torch.Tensor,
            shifted_mean: torch.Tensor,
            grad_var: torch.Tensor,
            grad_bias: torch.Tensor,
            count: Union[int, torch.Tensor],
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return `A` `(G, C/G, C/G)` and `b` `(C,)` of the input's gradient `W'^T dy + A c + b`.

        `A c + b` is the gradient through mean and var. The arguments are those of `fold` and `unfold`; `grad_var` and
        `grad_bias` are sums over all `count` positions.
        """
        groups, _ = grad_var.shape
        w = by_group(weight.to(grad_var.dtype), groups)
        # The gradient through var_g = diag(W_g S_g W_g^T) is A (x - m), where A_g = 2 / count W_g^T diag(dvar_g) W_g
        # and x - m = c - shifted_mean.
        a = torch.bmm((w * (2 / count * grad_var)[..., None]).mT, w)
        b = -torch.bmm(a, shifted_mean.view(groups, -1, 1)).flatten()
        # y = W' (x - m), so the gradient through m subtracts the mean of W'^T dy at each position.
        b = b - folded.flatten(1).to(a.dtype).T @ grad_bias / count
        return a, b


def compiles_correctly(triton_version: str) -> bool:
    """Whether this version of Triton compiles the kernels correctly.

    In Triton 3.5 `weight_gradient_kernel` refills a buffer that a product may still be reading.
    """
    return tuple(map(int, triton_version.split('.')[:2])) >= (3, 6)


HAS_TRITON = triton is not None and compiles_correctly(triton.__version__)
# Whether the passes run in Triton. None means that they do so where they are known to be right.
TRITON = {'0': False, '1': HAS_TRITON}.get(os.environ.get('TIMM_FINET_TRITON'))
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'  # for tests: Triton's interpreter runs kernels on the CPU


@lru_cache
def try_triton(device: torch.device) -> bool:
    """Whether the GPU is of the generation on which tests/test_gpu.py has passed, and Triton can compile for it."""
    if not HAS_TRITON or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    from .triton_passes import adds_up
    try:
        return adds_up(device)
    except Exception as error:  # for example without a C compiler
        warnings.warn(f"FBN trains with torch's operators, because its faster Triton kernels fail: {error!r}")
        return False


@torch.compiler.assume_constant_result  # Dynamo does not see this decorator on a cached function
def triton_works(device: torch.device) -> bool:
    return try_triton(device)


def implementation(x: torch.Tensor, dtype: torch.dtype):
    """Return the classes of the passes over `x` and of the algebra between them, for moments in `dtype`."""
    on_gpu = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
    interpreted = INTERPRETED and x.device.type == 'cpu'
    # A kernel needs real memory, which fake tensors and other subclasses may lack.
    possible = type(x) in (torch.Tensor, torch.nn.Parameter) and dtype == torch.float32 and x.numel() > 0
    possible = possible and memory_format(x) == torch.channels_last
    if possible and (on_gpu or interpreted) and (triton_works(x.device) if TRITON is None else TRITON):
        from .triton_passes import TritonAlgebra, TritonPasses
        return TritonPasses, TritonAlgebra
    return TorchPasses, TorchAlgebra


class MomentForm(torch.autograd.Function):
    """`(y, mean, var, count)` of `x` `(N, C, H, W)`, `weight` `(out, C, 1, 1)`, `gamma`, `beta` `(G * out,)` or None.

    `y` `(N, out, H, W)` has the dtype and memory format of `x`. With `relu` it is the ReLU of the output, and the
    ReLU's input is never stored. `mean` and biased `var` `(G * out,)` are the statistics of all partial sums over
    `count` positions, in at least float32 and without a gradient. If `running` is given, as for `track`, the statistics
    update it, and `mean` and `var` are None; it must not be given while torch.compile traces. With a process group, the
    statistics and `count`, which is then a tensor, cover all its processes. `x`, with `relu` also `y`, and tensors of
    the weight's size are saved for the backward pass. There are no second derivatives.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, groups, eps, process_group, relu=False, running=None):
        x = x.contiguous(memory_format=memory_format(x))
        dtype = moments_dtype(x, groups)
        count = x.numel() // x.shape[1]
        ctx.passes, ctx.algebra = implementation(x, dtype)
        passes = ctx.passes(x)
        shift, shifted_mean, cov = passes.moments(groups, dtype)
        if process_group is not None:
            count, mean, cov = pool_moments(count, shift + shifted_mean, cov, process_group)
            shifted_mean = mean - shift
        folded, bias, mean, var, inv_std, w_cov = ctx.algebra.fold(
            weight, gamma, beta, shift, shifted_mean, cov, eps, x.dtype, running, count)
        y = passes.convolve(folded, bias, relu)

        ctx.save_for_backward(x, weight, gamma, shift, shifted_mean, w_cov, inv_std, folded, y if relu else None)
        ctx.count, ctx.process_group = count, process_group
        ctx.set_materialize_grads(False)  # otherwise the statistics' gradients would be zeros, with one launch each
        if running is not None:
            return y, None, None, count
        mean, var = mean.flatten(), var.flatten()
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, count

    @staticmethod
    def backward(ctx, grad_y, *_):
        saved = ctx.saved_tensors  # read once: gradient checkpointing recomputes them at each access
        # `once_differentiable`, which makes second derivatives an error, takes host time, so it is used only where
        # autograd records a graph for them.
        gradients = MomentForm.gradients_once if torch.is_grad_enabled() else MomentForm.gradients
        with without_autocast(saved[0]):
            return gradients(ctx, grad_y, *saved)

    @staticmethod
    def gradients(ctx, grad_y, x, weight, gamma, shift, shifted_mean, w_cov, inv_std, folded, y):
        if grad_y is None:  # use zeros: other processes may be waiting for this process's sums
            grad_y = x.new_zeros(len(x), len(weight), *x.shape[2:])
        passes = ctx.passes(x, shift, grad_y, y)
        sums = passes.weight_gradient(weight.shape[0], inv_std.dtype)
        grad_weight, grad_gamma, grad_beta, grad_var, grad_bias = ctx.algebra.unfold(
            weight, gamma, shift, shifted_mean, inv_std, w_cov, sums)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.process_group is not None:
                sums = all_reduce(torch.cat((grad_var, grad_bias[None])), ctx.process_group)
                grad_var, grad_bias = sums[:-1], sums[-1]
            a, b = ctx.algebra.input_terms(weight, folded, shift, shifted_mean, grad_var, grad_bias, ctx.count)
            grad_x = passes.input_gradient(folded, a, b)
        not_differentiable = [None] * (len(ctx.needs_input_grad) - 4)
        return grad_x, grad_weight, grad_gamma, grad_beta, *not_differentiable

    # Second derivatives raise an error if any argument needs a gradient. `weight` may need one even if `grad_y` does
    # not, as with `y.sum()`.
    gradients_once = staticmethod(torch.autograd.function.once_differentiable(gradients))
