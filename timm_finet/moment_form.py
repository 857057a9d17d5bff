"""FBN behind an unpadded 1x1 convolution without its intermediate, as one autograd function.

The partial sums are linear in the input, `z_g = W_g x_g`, so with the input's mean `m` and a group's covariance `S_g`

    mu_g = W_g m_g,    var_g = diag(W_g S_g W_g^T),    W'_g = gamma_g W_g / sqrt(var_g + eps)
    y = W' (x - m) + sum_g beta_g

is equation (4) of arXiv 2005.06828: one convolution, nothing G times wide. All products are taken with `c = x - K`, `K`
the mean of every sixteenth position, so that nothing cancels, neither in `S_g` nor in the gradients.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from .sync import all_reduce, pool_moments

__all__ = ['MomentForm']


@contextmanager
def full_precision(device: torch.device):
    """No TF32 or bfloat16 inside float32 products, whatever is switched on."""
    backend = torch.backends.cuda.matmul if device.type == 'cuda' else torch.backends.mkldnn.matmul
    previous = backend.fp32_precision
    backend.fp32_precision = 'ieee'
    try:
        yield
    finally:
        backend.fp32_precision = previous


def rows(x: torch.Tensor) -> torch.Tensor:
    """`(N, C, H, W)` as `(N * H * W, C)`: a view where the layout is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def group_products(c: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """`sum c_g c_g^T` over the positions of `c` `(N, C, H, W)`, in `dtype`: `(G, C/G, C/G)`."""
    c = rows(c)
    count, size = len(c), c.shape[1] // groups
    # A product sums its long side one by one: rounding grows with it. So parts are summed, then the parts.
    least = max(256, 4 * size) if c.dtype == dtype else max(256, 4 * c.shape[1], count // 64)
    parts = next(k for k in range(max(1, count // least), 0, -1) if count % k == 0)
    c = c.view(parts, count // parts, c.shape[1])
    if c.dtype != dtype:  # tensor cores take the products of all channels sooner than the host starts G of groups
        products = torch.bmm(c.mT, c, out_dtype=dtype).sum(0)
        return products.view(groups, size, groups, size).diagonal(0, 0, 2).permute(2, 0, 1).contiguous()
    with full_precision(c.device):
        return torch.stack([torch.bmm(part.mT, part).sum(0) for part in c.chunk(groups, 2)])


# An operator of its own for torch.compile, so that the precision is set when it runs, not when it is traced.
group_products_op = torch.library.custom_op('timm_finet::group_products', group_products, mutates_args=())


@group_products_op.register_fake
def _(c, groups, dtype):
    return c.new_empty(groups, c.shape[1] // groups, c.shape[1] // groups, dtype=dtype)


def memory_format(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def centred(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`x - shift`, by a whole image of `shift`: short inner loops over channels or pixels are slow."""
    return x - shift.view(-1, 1, 1).expand(x.shape[1:])[None].contiguous(memory_format=memory_format(x))


def moments_dtype(x: torch.Tensor, groups: int) -> torch.dtype:
    """Float32 at least; float64 where so few positions leave some z_g next to no variance, a difference of large terms.

    Only synchronised layers take moments of so few (`FBNConv2d.forward`).
    """
    few = x.shape[0] * x.shape[2] * x.shape[3] < 4 * x.shape[1] // groups
    return torch.float64 if few and x.device.type != 'mps' else torch.promote_types(x.dtype, torch.float32)


class MomentForm(torch.autograd.Function):
    """`(y, mean, var, count)` of `x` `(N, C, H, W)`, `weight` `(out, C, 1, 1)`, `gamma`, `beta` `(G * out,)` or None.

    `mean` and biased `var` `(G * out,)` are those of all partial sums over `count` positions, without a gradient. Saved
    for backward are `x` and tensors of the weight's size.
    """

    @staticmethod
    def forward(ctx, x, weight, gamma, beta, groups, eps, process_group):
        x = x.contiguous(memory_format=memory_format(x))
        dtype = moments_dtype(x, groups)
        count = x.numel() // x.shape[1]
        if count:
            shift = x[:, :, ::4, ::4].mean((2, 3)).mean(0)
        else:  # of a batch of other processes
            shift = x.new_zeros(x.shape[1])
        c = centred(x, shift)
        # CUDA sums half precision's products in float32 by itself; ROCm, which calls itself CUDA, does not.
        wide = c if c.is_cuda and not torch.version.hip and dtype == torch.float32 else c.to(dtype)
        # In two steps, as rounding grows with the length of a sum; no mean at all without positions.
        rest = wide.mean((2, 3), dtype=dtype).sum(0) / max(1, len(x))
        mean = shift + rest
        rest = rest.view(groups, -1, 1)
        products = group_products_op if torch.compiler.is_compiling() else group_products
        cov = torch.baddbmm(products(wide, groups, dtype), rest, rest.mT, beta=1 / max(1, count), alpha=-1)
        if process_group is not None:
            count, mean, cov = pool_moments(count, mean, cov, process_group)
            rest = (mean - shift).view(groups, -1, 1)

        w = weight.to(dtype).view(len(weight), groups, -1).transpose(0, 1)  # (G, out, C / G)
        w_cov, w_rest, w_mean = torch.bmm(
            w, torch.cat((cov, rest, mean.view_as(rest)), 2)).split((cov.shape[2], 1, 1), 2)
        var = (w_cov * w).sum(2).clamp_min(0)
        inv = torch.rsqrt(var + eps)
        scale = inv if gamma is None else inv * gamma.view_as(inv)
        folded = (w * scale[..., None]).transpose(0, 1).reshape(weight.shape).to(x.dtype)
        # With the folded weight as it has been rounded, so that the mean of y is the sum of the betas.
        bias = -(folded.view(len(weight), -1).to(dtype) @ rest.flatten())
        if gamma is not None:
            bias = bias + beta.view_as(inv).sum(0)
        y = F.conv2d(c, folded, bias.to(x.dtype))

        ctx.save_for_backward(x, weight, gamma, shift, rest, w_cov, w_rest, inv, folded)
        ctx.count, ctx.process_group = count, process_group
        mean, var = w_mean.flatten(), var.flatten()
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, *_):
        x, weight, gamma, shift, rest, w_cov, w_rest, inv, folded = ctx.saved_tensors
        groups, out, size = w_cov.shape
        w = weight.to(inv.dtype).view(out, groups, size).transpose(0, 1)
        scale = inv if gamma is None else inv * gamma.view_as(inv)
        grad_y = grad_y.contiguous(memory_format=memory_format(x))
        c = centred(x, shift)

        def gradient(x, *mask):
            """Of the convolution with the folded weight."""
            return torch.ops.aten.convolution_backward(
                grad_y, x, folded, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [*mask, False])

        grad_folded = gradient(c, False, True)[1].to(inv.dtype).view(out, groups, size).transpose(0, 1)
        grad_bias = grad_y.sum((0, 2, 3)).to(inv.dtype)
        # of y = folded (c - rest), as the bias is -folded rest
        grad_scale = (grad_folded * w).sum(2) - grad_bias * w_rest.squeeze(2)
        grad_var = -0.5 * grad_scale * scale * inv.square()
        grad_weight = grad_folded * scale[..., None]
        grad_weight.addcmul_(w_cov, grad_var[..., None], value=2)
        grad_weight.addcmul_((grad_bias * scale)[..., None], rest.mT, value=-1)
        grad_weight = grad_weight.transpose(0, 1).reshape(weight.shape).to(weight.dtype)
        grad_x = grad_gamma = grad_beta = None
        if gamma is not None:
            grad_gamma = (grad_scale * inv).flatten().to(gamma.dtype)
            grad_beta = grad_bias.repeat(groups).to(gamma.dtype)
        if ctx.needs_input_grad[0]:
            if ctx.process_group is not None:
                sums = all_reduce(torch.cat((grad_var, grad_bias[None])), ctx.process_group)
                grad_var, grad_bias = sums[:-1], sums[-1]
            # d var / dx = 2 W^T W (x - m) / count; through the mean, every position loses the mean of W'^T dy
            a = torch.bmm((w * (2 / ctx.count * grad_var)[..., None]).mT, w)
            b = -torch.bmm(a, rest).flatten() - folded.view(out, -1).to(inv.dtype).T @ grad_bias / ctx.count
            a, b = a.to(x.dtype), b.to(x.dtype)
            if c.device.type == 'cpu':
                grad_x = F.conv2d(c, a.view(x.shape[1], -1, 1, 1), b, groups=groups)
                del c  # its memory is used again
                grad_x += gradient(x, True, False)[0]
            else:
                grad_x = torch.addmm(b, rows(grad_y), folded.view(out, -1)).addmm_(rows(c), torch.block_diag(*a))
                grad_x = grad_x.view(*x.shape[:1], *x.shape[2:], -1).permute(0, 3, 1, 2)
                grad_x = grad_x.contiguous(memory_format=memory_format(x))
        return grad_x, grad_weight, grad_gamma, grad_beta, None, None, None
