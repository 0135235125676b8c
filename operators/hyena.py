"""The Hyena family of gated convolutions, as the grafting paper uses them (arXiv 2506.05340, section 3 and
appendix), with the parameter names of its published code."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from grafting.kernels.gated_conv import causal_taps, gated_conv
from grafting.operators.registry import Grid, Operator, OperatorConfig, OperatorError, register


class DepthwiseTaps(nn.Module):
    """Parameters of a causal depthwise convolution (`causal_taps`), in the shapes of nn.Conv1d."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        reference = nn.Conv1d(channels, channels, width, groups=channels)
        self.weight = reference.weight
        self.bias = reference.bias

    @torch.no_grad()
    def set_identity(self) -> None:
        """Make the convolution pass its input through."""
        self.weight.zero_()
        self.weight[:, 0, -1] = 1.0
        assert self.bias is not None
        self.bias.zero_()

    def forward(self, u: Tensor) -> Tensor:
        """`[B, N, channels]` to the same shape, convolved along N."""
        return causal_taps(u, self.weight, self.bias)


class HyenaConfig(OperatorConfig):
    kernel_size: int = Field(4, ge=1, description="taps of every short causal filter")


class Hyena(Operator):
    """What the family shares: `out_proj(q · f(k · v))` with q, k, v from one projection.

    `short` puts taps on the projected q, k and v, `inner` on the gated product k·v. There is no activation
    and no dependence on the grid beyond the raster order.
    """

    short: bool
    inner: bool
    Config = HyenaConfig
    config: HyenaConfig

    def __init__(self, dim: int, num_heads: int, config: HyenaConfig) -> None:
        super().__init__(dim, num_heads, config)
        self.in_proj = nn.Linear(dim, 3 * dim)
        self.out_proj = nn.Linear(dim, dim)
        for layer in (self.in_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.short_filter = DepthwiseTaps(3 * dim, config.kernel_size) if self.short else None
        self.inner_filter = DepthwiseTaps(dim, config.kernel_size) if self.inner else None
        if self.inner_filter is not None:
            self.inner_filter.set_identity()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        short, inner = self.short_filter, self.inner_filter
        gated = gated_conv(
            self.in_proj(x),
            short.weight if short is not None else None,
            short.bias if short is not None else None,
            inner.weight if inner is not None else None,
            inner.bias if inner is not None else None,
        )
        return self.out_proj(gated)

    def flops(self, tokens: int) -> int:
        taps = self.config.kernel_size * self.dim * (3 * self.short + self.inner)
        return 2 * tokens * (4 * self.dim**2 + taps + self.dim)


@register("hyena_x", kind="mixer")
class HyenaX(Hyena):
    """`out_proj(T q · (T k · T v))` with short causal taps T on q, k and v, and no inner filter."""

    short, inner = True, False


@register("hyena_y", kind="mixer")
class HyenaY(Hyena):
    """`out_proj(q · T(k · v))` with short causal taps T on the gated product only."""

    short, inner = False, True


@register("hyena_se", kind="mixer")
class HyenaSE(Hyena):
    """`out_proj(T q · T'(T k · T v))`: short causal taps on q, k, v and on their gated product."""

    short, inner = True, True


@register("hyena_x_mlp", kind="mlp")
class HyenaXMlp(Operator):
    """Channel mixer `out_proj(q · k · v)` with taps along the feature axis, one filter per token.

    The published form ("MLP Hyena-X") projects to 3·r·D features, convolves them causally along the features
    before the split into q, k, v (so the first taps of k see the end of q, and those of v the end of k), with
    one filter for each of exactly `tokens` tokens. Tokens do not mix.
    """

    class Config(OperatorConfig):
        tokens: int = Field(256, ge=1, description="number of tokens; the operator accepts no other")
        expansion_ratio: float = Field(2.0, gt=0, description="width of q, k and v as a multiple of dim")
        kernel_size: int = Field(4, ge=1, description="taps of the filter along the features")

    config: Config

    def __init__(self, dim: int, num_heads: int, config: Config) -> None:
        super().__init__(dim, num_heads, config)
        hidden = int(dim * config.expansion_ratio)
        self.in_proj = nn.Linear(dim, 3 * hidden)
        self.out_proj = nn.Linear(hidden, dim)
        for layer in (self.in_proj, self.out_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.short_filter = DepthwiseTaps(config.tokens, config.kernel_size)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if x.shape[1] != self.config.tokens:
            raise OperatorError(
                f"operator 'hyena_x_mlp' was built for {self.config.tokens} tokens and got {x.shape[1]};"
                f" set its config key tokens to {x.shape[1]}"
            )
        # The taps slide along the features, the tokens are their channels.
        projected = self.short_filter(self.in_proj(x).transpose(1, 2)).transpose(1, 2)
        q, k, v = projected.chunk(3, dim=-1)
        return self.out_proj(q * k * v)

    def flops(self, tokens: int) -> int:
        hidden = self.out_proj.in_features
        return 2 * tokens * (4 * self.dim * hidden + 3 * hidden * self.config.kernel_size + hidden)
