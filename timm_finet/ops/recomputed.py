"""A convolution and BatchNorm in training, of which only the input is kept: their result in less memory.

Torch keeps the input of each of the two for the backward pass. Here the convolution is computed again instead; the
mean and the deviation, two numbers a channel, are kept, so that BatchNorm is not.
"""
import torch
import torch.nn.functional as F

from .sync import sync_batch_norm
from .torch_passes import without_autocast

__all__ = ['RecomputedNorm']


def synced_gradients(grad_y, z, gamma, beta, eps, process_group):
    """Gradients of `z`, `gamma` and `beta`, with the statistics of all processes taken again."""
    if torch.is_grad_enabled():
        raise RuntimeError('FBN with synchronised statistics has no second derivatives.')
    statistics = z.new_empty(2, z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))
    with torch.enable_grad():
        leaves = [None if v is None else v.detach().requires_grad_() for v in (z, gamma, beta)]
        y = sync_batch_norm(leaves[0], *statistics, *leaves[1:], eps, process_group)
    given = [leaf for leaf in leaves if leaf is not None]
    grads = torch.autograd.grad(y, given, grad_y)
    return *grads, *[None] * (3 - len(given))


class RecomputedNorm(torch.autograd.Function):
    """`(y, mean, var)`: `y = F.batch_norm(F.conv2d(x, weight, None, *conv), gamma, beta)` with the batch's statistics.

    `conv` is `(stride, padding, dilation)`. `x`, which may be a slice of channels, is made contiguous in `layout` for
    the convolution, but kept as it is. It has the dtype of `weight`; `gamma` and `beta` `(out,)`, or None, may be
    wider. `mean` and unbiased `var` `(out,)`, in float32 at least, have no gradient. Saved for backward are `x`,
    `weight` and tensors of `gamma`'s size. With a process group the statistics are those of all its processes; then
    there are no second derivatives.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps, conv, layout, process_group):
        mean, var = weight.new_zeros(2, len(weight), dtype=torch.promote_types(x.dtype, torch.float32))
        z = F.conv2d(x.contiguous(memory_format=layout), weight, None, *conv)
        if process_group is None and z.numel() == z.shape[1]:
            raise ValueError(f'Expected more than 1 value per channel when training, got input size {list(z.shape)}')
        ctx.conv, ctx.eps, ctx.layout, ctx.process_group = conv, eps, layout, process_group
        if process_group is None:
            y, *statistics = torch.native_batch_norm(z, gamma, beta, mean, var, True, 1., eps)
        else:
            y, statistics = sync_batch_norm(z, mean, var, gamma, beta, eps, process_group), (None, None)
        ctx.save_for_backward(x, weight, gamma, beta, *statistics)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx, grad_y, *_):
        saved = ctx.saved_tensors  # once: gradient checkpointing computes them as they are asked for
        with without_autocast(saved[0]):
            return RecomputedNorm.gradients(ctx, grad_y, *saved)

    @staticmethod
    def gradients(ctx, grad_y, x, weight, gamma, beta, mean, inv):
        x = x.contiguous(memory_format=ctx.layout)  # once for all of it
        z = F.conv2d(x, weight, None, *ctx.conv)
        if grad_y is None:  # zeros: other processes may be waiting for this one's sums
            grad_y = torch.zeros_like(z)
        if ctx.process_group is None:
            grad_z, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
                grad_y, z, gamma, None, None, mean, inv, True, ctx.eps, [True, gamma is not None, beta is not None])
        else:
            grad_z, grad_gamma, grad_beta = synced_gradients(grad_y, z, gamma, beta, ctx.eps, ctx.process_group)
        stride, padding, dilation = ctx.conv
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_z, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [*ctx.needs_input_grad[:2], False])
        return grad_x, grad_weight, grad_gamma, grad_beta, None, None, None, None
