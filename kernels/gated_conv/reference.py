"""Gated depthwise causal convolution in plain PyTorch, between the projections of a Hyena operator.

Legend: B batch, N tokens, D width, W taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_taps(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution `y[n] = b + Σ_j w[j] u[n − (W−1) + j]` along the last axis but one.

    `u [B, N, channels]`, `weight [channels, 1, W]` as nn.Conv1d holds it (`w[W−1]` multiplies the current
    position), `bias [channels]`; returns `[B, N, channels]`. Positions before the first count as zero.
    """
    width = weight.shape[-1]
    # W shifted multiply-adds over the channels-last layout: on CPU faster than grouped conv1d.
    padded = F.pad(u, (0, 0, width - 1, 0))
    taps = weight.squeeze(1).t()
    last = padded[:, width - 1 :]
    y = last * taps[width - 1] if bias is None else torch.addcmul(bias, last, taps[width - 1])
    for j in range(width - 1):
        y = torch.addcmul(y, padded[:, j : j + u.shape[1]], taps[j])
    return y


def gated_conv(
    projected: Tensor,
    short_weight: Tensor | None = None,
    short_bias: Tensor | None = None,
    inner_weight: Tensor | None = None,
    inner_bias: Tensor | None = None,
) -> Tensor:
    """`T q · T'(T k · T v)` for `q, k, v = split(projected)`: `[B, N, 3D]` to `[B, N, D]`.

    The short taps T, `short_weight [3D, 1, W]` and `short_bias [3D]`, act on the projected q, k and v; the
    inner taps T', `inner_weight [D, 1, W]` and `inner_bias [D]`, on the gated product. A weight that is None
    leaves its convolution out: Hyena-SE has both, Hyena-X the short, Hyena-Y the inner one ("Exploring
    Diffusion Transformer Designs via Grafting", arXiv 2506.05340, section 3).
    """
    if short_weight is not None:
        projected = causal_taps(projected, short_weight, short_bias)
    q, k, v = projected.chunk(3, dim=-1)
    gated = k * v
    if inner_weight is not None:
        gated = causal_taps(gated, inner_weight, inner_bias)
    return q * gated
