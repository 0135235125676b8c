"""Softmax attention: the host's own, and its restriction to a window of the raster order."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from grafting.kernels.window_attention import window_attention
from grafting.operators.registry import Grid, Operator, OperatorConfig, OperatorError, load_strictly, register


@register("attention", kind="mixer")
class Attention(Operator):
    """Multi-head softmax attention over all tokens, `softmax(q kᵀ / √d) v`.

    The host's own mixer (Peebles & Xie, "Scalable Diffusion Models with Transformers", section 3.2), with the
    parameter names of the original DiT: `qkv` laid out as (three, heads, head_dim), then `proj`.
    From the host's weights it is exact at start.
    """

    def __init__(self, dim: int, num_heads: int, config: OperatorConfig) -> None:
        super().__init__(dim, num_heads, config)
        if dim % num_heads:
            raise OperatorError(f"operator {self.name!r}: dim {dim} is not divisible by num_heads {num_heads}")
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        for layer in (self.qkv, self.proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_host(cls, config: OperatorConfig, old_module: nn.Module) -> Attention:
        """Start with the projections of any attention of the same layout."""
        if not isinstance(old_module, Attention):
            raise OperatorError(f"operator {cls.name!r} starts from attention, not {type(old_module).__name__}")
        new = cls(old_module.dim, old_module.num_heads, config)
        new.load_state_dict(old_module.state_dict())
        return new

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.proj(rearrange(self.attend(q, k, v), "b h n d -> b n (h d)"))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, heads, N, head_dim]` queries, keys and values to the attended values, same shape."""
        return F.scaled_dot_product_attention(q, k, v)

    def flops(self, tokens: int) -> int:
        return 2 * tokens * 4 * self.dim**2 + 4 * tokens**2 * self.dim


@register("sliding_window", kind="mixer")
class SlidingWindow(Attention):
    """Attention in which token i sees the tokens j with |i − j| ≤ window of the raster order.

    The window is truncated at both ends of the sequence and ignores the rows of the grid, as the grafting
    paper's sliding-window operator (flash-attn's `window_size=(w, w)`) does. From the host's weights it is
    exact at start when the window covers all tokens.
    """

    class Config(OperatorConfig):
        window: int = Field(4, ge=0, description="tokens visible on each side")

    config: Config

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, self.config.window)

    def load_reference(self, state_dict: Mapping[str, Tensor]) -> None:
        """Weights under flash-attn's `MHA` names: `Wqkv` and `out_proj`."""
        renamed = {
            key.replace("Wqkv.", "qkv.").replace("out_proj.", "proj."): value for key, value in state_dict.items()
        }
        load_strictly(self, renamed)

    def flops(self, tokens: int) -> int:
        window = self.config.window
        # Σ over tokens of the visible keys; the truncated ends lose w(w+1).
        pairs = tokens**2 if window >= tokens - 1 else tokens * (2 * window + 1) - window * (window + 1)
        return 2 * tokens * 4 * self.dim**2 + 4 * pairs * self.dim
