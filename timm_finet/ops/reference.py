"""FBN as the paper defines it, the reference for every faster form."""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

__all__ = ['fbn_reference']


def fbn_reference(
        x: torch.Tensor,
        weight: torch.Tensor,
        gamma: Optional[torch.Tensor],
        beta: Optional[torch.Tensor],
        groups: int,
        eps: float,
        stride=1,
        padding=0,
        dilation=1,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute equation (4) of arXiv 2005.06828 with plain differentiable operations, `G` times wide.

        y = sum_g [ gamma_g (z_g - mu_g) / sqrt(var_g + eps) + beta_g ],    z_g = W_g x_g

    Args:
        x: `(N, C, H, W)`; weight: `(out, C, kh, kw)`; gamma, beta: `(G * out,)`, group-major, or both None.
        groups: G.
        stride, padding, dilation: As for `F.conv2d`.

    Returns:
        y: `(N, out, H', W')`.
        mean, var: `(G * out,)`, the statistics of the partial sums `z_g` over the batch; `var` is biased.
    """
    # All z_g at once, (N, G * out, H', W'): a grouped convolution takes the weights (G * out, C/G, kh, kw).
    z = F.conv2d(x, torch.cat(weight.chunk(groups, 1)), None, stride, padding, dilation, groups)
    var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    z = (z - mean.view(-1, 1, 1)) / torch.sqrt(var + eps).view(-1, 1, 1)
    if gamma is not None:
        z = z * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)
    return sum(z.chunk(groups, 1)), mean, var
