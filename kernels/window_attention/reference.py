"""Bidirectional sliding-window attention in plain PyTorch.

Legend: B batch, h heads, N tokens, d head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """`softmax(q kᵀ / √d) v` in which token i sees the tokens j with |i − j| ≤ `window`.

    `q, k, v [B, h, N, d]` to `[B, h, N, d]`. The window is truncated at both ends, as flash-attn's
    `window_size=(w, w)`. Each token's neighbourhood is gathered, so time and memory grow with
    N × (2·window + 1).
    """
    tokens = q.shape[-2]
    if 2 * window + 1 >= tokens:  # the band is most of the matrix: mask it
        position = torch.arange(tokens, device=q.device)
        band = (position[:, None] - position[None, :]).abs() <= window
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band)
    # [B, h, N, d, 2w+1]: views of the padded keys and values, one per offset.
    k_near = F.pad(k, (0, 0, window, window)).unfold(-2, 2 * window + 1, 1)
    v_near = F.pad(v, (0, 0, window, window)).unfold(-2, 2 * window + 1, 1)
    scores = torch.einsum("bhnd,bhndw->bhnw", q, k_near) * q.shape[-1] ** -0.5
    offsets = torch.arange(-window, window + 1, device=q.device)
    source = torch.arange(tokens, device=q.device)[:, None] + offsets
    scores = scores.masked_fill((source < 0) | (source >= tokens), float("-inf"))
    return torch.einsum("bhnw,bhndw->bhnd", scores.softmax(-1), v_near)
