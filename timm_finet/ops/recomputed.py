"""A convolution and BatchNorm in training that keep only the convolution's input for the backward pass.

Torch keeps the inputs of both. Here the backward pass computes the convolution again to get BatchNorm's input.
BatchNorm's statistics, two numbers per channel, are kept.
"""
import torch
import torch.nn.functional as F

from .sync import sync_batch_norm
from .torch_passes import without_autocast

__all__ = ['RecomputedNorm']


def synced_gradients(grad_y, z, gamma, beta, eps, process_group):
    """Return the gradients of `z`, `gamma` and `beta`, by computing `sync_batch_norm` again with a graph.

    Raises:
        RuntimeError: The caller asks for second derivatives (`create_graph=True`), which do not exist here.
    """
    if torch.is_grad_enabled():
        raise RuntimeError('FBN with synchronised statistics has no second derivatives.')
    statistics = z.new_empty(2, z.shape[1], dtype=torch.promote_types(z.dtype, torch.float32))
    z, gamma, beta = (None if v is None else v.detach().requires_grad_() for v in (z, gamma, beta))
    with torch.enable_grad():
        y = sync_batch_norm(z, *statistics, gamma, beta, eps, process_group)
    if gamma is None:
        return *torch.autograd.grad(y, z, grad_y), None, None
    return torch.autograd.grad(y, (z, gamma, beta), grad_y)


class RecomputedNorm(torch.autograd.Function):
    """`(y, mean, var)`: `y = F.batch_norm(F.conv2d(x, weight, None, *conv), gamma, beta)` with the batch's statistics.

    Args:
        x: `(N, C, H, W)`, in the dtype of `weight`. It may be a slice of channels: the convolution takes a contiguous
            copy in the memory format `layout`, but `x` itself is saved.
        weight: `(out, C, kh, kw)`.
        gamma, beta: `(out,)` or both None, in the dtype of `weight` or a more precise one.
        conv: `(stride, padding, dilation)`.
        process_group: The processes that share statistics, or None. With a group there are no second derivatives.

    `y` `(N, out, H', W')` has the dtype of `x`. `mean` and unbiased `var` `(out,)` are in at least float32 and have no
    gradient. `x`, `weight` and tensors of `gamma`'s size are saved for the backward pass.

    Raises:
        ValueError: There is one value per channel, and no process group.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, eps, conv, layout, process_group):
        mean, var = weight.new_zeros(2, len(weight), dtype=torch.promote_types(x.dtype, torch.float32))
        z = F.conv2d(x.contiguous(memory_format=layout), weight, None, *conv)
        if process_group is None and z.numel() == z.shape[1]:
            raise ValueError(f'Expected more than 1 value per channel when training, got input size {list(z.shape)}')
        ctx.conv, ctx.eps, ctx.layout, ctx.process_group = conv, eps, layout, process_group
        if process_group is None:
            # With momentum 1 the "running" statistics become the batch's. F.batch_norm does not return the mean and
            # 1 / sqrt(var + eps), which its backward pass takes.
            y, *statistics = torch.native_batch_norm(z, gamma, beta, mean, var, True, 1., eps)
        else:
            y, statistics = sync_batch_norm(z, mean, var, gamma, beta, eps, process_group), (None, None)
        ctx.save_for_backward(x, weight, gamma, beta, *statistics)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx, grad_y, *_):
        saved = ctx.saved_tensors  # read once: gradient checkpointing recomputes them at each access
        with without_autocast(saved[0]):
            return RecomputedNorm.gradients(ctx, grad_y, *saved)

    @staticmethod
    def gradients(ctx, grad_y, x, weight, gamma, beta, mean, inv_std):
        x = x.contiguous(memory_format=ctx.layout)  # for both convolutions
        z = F.conv2d(x, weight, None, *ctx.conv)
        if grad_y is None:  # use zeros: other processes may be waiting for this process's sums
            grad_y = torch.zeros_like(z)
        if ctx.process_group is None:
            grad_z, grad_gamma, grad_beta = torch.ops.aten.native_batch_norm_backward(
                grad_y, z, gamma, None, None, mean, inv_std, True, ctx.eps, [True, gamma is not None, beta is not None])
        else:
            grad_z, grad_gamma, grad_beta = synced_gradients(grad_y, z, gamma, beta, ctx.eps, ctx.process_group)
        stride, padding, dilation = ctx.conv
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_z, x, weight, None, stride, padding, dilation, False, [0, 0], 1, [*ctx.needs_input_grad[:2], False])
        return grad_x, grad_weight, grad_gamma, grad_beta, None, None, None, None
