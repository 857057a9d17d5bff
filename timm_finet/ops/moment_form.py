"""FBN behind an unpadded 1x1 convolution without its intermediate, as one autograd function.

The partial sums are linear in the input, `z_g = W_g x_g`, so with the input's mean `m` and a group's covariance `S_g`

    mu_g = W_g m_g,    var_g = diag(W_g S_g W_g^T),    W'_g = gamma_g W_g / sqrt(var_g + eps)
    y = W' (x - m) + sum_g beta_g

is equation (4) of arXiv 2005.06828: one convolution, nothing G times wide. What reads or writes activations is a pass
(torch_passes.py, triton_passes.py). Here is what stands between the passes: algebra with tensors of the weight's size.
All products are taken with `c = x - shift`, `shift` near the mean, so that nothing cancels, neither in `S_g` nor in the
gradients. `rest = m - shift`.
"""
import os
from typing import Optional, Tuple

import torch
from torch.utils._triton import has_triton_package

from .sync import all_reduce, pool_moments
from .torch_passes import TorchPasses, memory_format, moments_dtype, without_autocast

__all__ = ['MomentForm']


def track(running, mean: torch.Tensor, var: torch.Tensor, count) -> None:
    """Move `running = (running_mean, running_var, momentum)` towards a batch's statistics; `var` is biased."""
    running_mean, running_var, momentum = running
    running_mean.lerp_(mean.flatten().to(running_mean.dtype), momentum)
    running_var.lerp_((var.flatten() * (count / (count - 1))).to(running_var.dtype), momentum)


class TorchAlgebra:
    """The algebra in torch's operators, for passes that take the centred `c` as their input."""

    @staticmethod
    def fold(
            weight: torch.Tensor,
            gamma: Optional[torch.Tensor],
            beta: Optional[torch.Tensor],
            shift: torch.Tensor,
            rest: torch.Tensor,
            cov: torch.Tensor,
            eps: float,
            dtype: torch.dtype,
            running: Optional[Tuple[torch.Tensor, torch.Tensor, float]],
            count,
    ) -> Tuple[torch.Tensor, ...]:
        """Moments to the folded convolution.

        Args:
            weight: `(out, C, 1, 1)`; gamma, beta: `(G * out,)` or None.
            shift, rest: `(C,)`; cov: `(G, C/G, C/G)`.
            dtype: Of the folded weight.
            running: Statistics that this batch moves, as for `track`, or None; count: its positions.

        Returns:
            The folded weight `(out, C, 1, 1)` and the bias `(out,)` that goes with `c`; mean and var `(G, out)`; and
            for `unfold` `1 / sqrt(var + eps)` `(G, out)` and `W S` `(G, out, C/G)`.
        """
        rest, mean = rest.view(len(cov), -1, 1), (shift + rest).view(len(cov), -1, 1)
        w = weight.to(cov.dtype).view(len(weight), len(cov), -1).transpose(0, 1)  # (G, out, C / G)
        w_cov, w_mean = torch.bmm(w, torch.cat((cov, mean), 2)).split((cov.shape[2], 1), 2)
        var = (w_cov * w).sum(2).clamp_min(0)
        inv = torch.rsqrt(var + eps)
        scale = inv if gamma is None else inv * gamma.view_as(inv)
        folded = (w * scale[..., None]).transpose(0, 1).reshape(weight.shape).to(dtype)
        # With the folded weight as it has been rounded, so that the mean of y is the sum of the betas.
        bias = -(folded.flatten(1).to(cov.dtype) @ rest.flatten())
        if beta is not None:
            bias = bias + beta.view_as(inv).sum(0)
        mean = w_mean.squeeze(2)
        if running is not None:
            track(running, mean, var, count)
        return folded, bias, mean, var, inv, w_cov

    @staticmethod
    def unfold(
            weight: torch.Tensor,
            gamma: Optional[torch.Tensor],
            shift: torch.Tensor,
            rest: torch.Tensor,
            inv: torch.Tensor,
            w_cov: torch.Tensor,
            grad_folded: torch.Tensor,
            grad_bias: torch.Tensor,
    ) -> Tuple[Optional[torch.Tensor], ...]:
        """Gradients of the folded convolution over `c`, `(out, C)` and `(out,)`, to those of what it was folded from.

        (`shift` is for passes whose convolution is over `x` itself.)

        Returns:
            Gradients of weight, gamma and beta, the last two None without gamma; and of var `(G, out)`.
        """
        groups, out, size = w_cov.shape
        w = weight.to(inv.dtype).view(out, groups, size).transpose(0, 1)
        rest = rest.view(groups, -1, 1)
        scale = inv if gamma is None else inv * gamma.view_as(inv)
        # y = W' (c - rest) + beta
        grad_folded = grad_folded.view(out, groups, size).transpose(0, 1)
        grad_scale = (grad_folded * w).sum(2) - grad_bias * torch.bmm(w, rest).squeeze(2)
        grad_var = -0.5 * grad_scale * scale * inv.square()  # scale = gamma / sqrt(var + eps)
        grad_weight = grad_folded * scale[..., None]
        grad_weight.addcmul_(w_cov, grad_var[..., None], value=2)  # var = diag(W S W^T)
        grad_weight.addcmul_((grad_bias * scale)[..., None], rest.mT, value=-1)
        grad_weight = grad_weight.transpose(0, 1).reshape(weight.shape).to(weight.dtype)
        if gamma is None:
            return grad_weight, None, None, grad_var
        grad_gamma = (grad_scale * inv).flatten().to(gamma.dtype)
        return grad_weight, grad_gamma, grad_bias.repeat(groups).to(gamma.dtype), grad_var

    @staticmethod
    def input_terms(
            weight: torch.Tensor,
            folded: torch.Tensor,
            shift: torch.Tensor,
            rest: torch.Tensor,
            grad_var: torch.Tensor,
            grad_bias: torch.Tensor,
            count,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """`A` `(G, C/G, C/G)` and `b` `(C,)` of the gradient `W'^T dy + A c + b`; `count` an int or a scalar."""
        groups, out = grad_var.shape
        w = weight.to(grad_var.dtype).view(out, groups, -1).transpose(0, 1)
        # d var / dx = 2 W^T W (x - m) / count; through the mean, every position loses the mean of W'^T dy
        a = torch.bmm((w * (2 / count * grad_var)[..., None]).mT, w)
        b = -torch.bmm(a, rest.view(groups, -1, 1)).flatten() - folded.flatten(1).to(a.dtype).T @ grad_bias / count
        return a, b


# Not the default before tests/test_gpu.py has passed on a GPU. With TRITON_INTERPRET=1 it runs on the CPU, for tests.
TRITON = os.environ.get('TIMM_FINET_TRITON') == '1' and has_triton_package()
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'


def implementation(x: torch.Tensor, dtype: torch.dtype):
    """The passes over `x` and the algebra between them, for moments in `dtype`."""
    half = x.dtype in (torch.float16, torch.bfloat16) and x.is_cuda or INTERPRETED and x.device.type == 'cpu'
    if TRITON and half and dtype == torch.float32 and x.numel() and memory_format(x) == torch.channels_last:
        from .triton_passes import TritonAlgebra, TritonPasses
        return TritonPasses, TritonAlgebra
    return TorchPasses, TorchAlgebra


class MomentForm(torch.autograd.Function):
    """`(y, mean, var, count)` of `x` `(N, C, H, W)`, `weight` `(out, C, 1, 1)`, `gamma`, `beta` `(G * out,)` or None.

    With `relu`, `y` is its ReLU, and what goes into it is never stored. `mean` and biased `var` `(G * out,)` are those
    of all partial sums over `count` positions, without a gradient. `running`, `(running_mean, running_var, momentum)`,
    is moved by them; not while torch.compile traces. Saved for backward are `x`, with `relu` also `y`, and tensors of
    the weight's size.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, groups, eps, process_group, relu=False, running=None):
        x = x.contiguous(memory_format=memory_format(x))
        dtype = moments_dtype(x, groups)
        count = x.numel() // x.shape[1]
        ctx.passes, ctx.algebra = implementation(x, dtype)
        passes = ctx.passes(x)
        shift, rest, cov = passes.moments(groups, dtype)
        if process_group is not None:
            count, mean, cov = pool_moments(count, shift + rest, cov, process_group)
            rest = mean - shift
        folded, bias, mean, var, inv, w_cov = ctx.algebra.fold(
            weight, gamma, beta, shift, rest, cov, eps, x.dtype, running, count)
        y = passes.convolve(folded, bias, relu)

        ctx.save_for_backward(x, weight, gamma, shift, rest, w_cov, inv, folded, y if relu else None)
        ctx.count, ctx.process_group = count, process_group
        mean, var = mean.flatten(), var.flatten()
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # theirs would be filled with zeros, a launch each
        return y, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, *_):
        saved = ctx.saved_tensors  # once: gradient checkpointing computes them as they are asked for
        with without_autocast(saved[0]):
            return MomentForm.gradients(ctx, grad_y, *saved)

    @staticmethod
    def gradients(ctx, grad_y, x, weight, gamma, shift, rest, w_cov, inv, folded, y):
        if grad_y is None:  # zeros: other processes may be waiting for this one's sums
            grad_y = x.new_zeros(len(x), len(weight), *x.shape[2:])
        passes = ctx.passes(x, shift, grad_y, y)
        grad_folded, grad_bias = passes.weight_gradient(len(weight), inv.dtype)
        grad_weight, grad_gamma, grad_beta, grad_var = ctx.algebra.unfold(
            weight, gamma, shift, rest, inv, w_cov, grad_folded, grad_bias)
        grad_x = None
        if ctx.needs_input_grad[0]:
            if ctx.process_group is not None:
                sums = all_reduce(torch.cat((grad_var, grad_bias[None])), ctx.process_group)
                grad_var, grad_bias = sums[:-1], sums[-1]
            a, b = ctx.algebra.input_terms(weight, folded, shift, rest, grad_var, grad_bias, ctx.count)
            grad_x = passes.input_gradient(folded, a, b)
        return grad_x, grad_weight, grad_gamma, grad_beta, *[None] * (len(ctx.needs_input_grad) - 4)
