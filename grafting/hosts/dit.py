"""DiT (Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023) as a host.

Our own module with the original's argument names and state-dict keys, whose mixers and MLPs are operators.
Legend: B batch, C latent channels, H × W latent size, N tokens, D hidden size.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from grafting import operators
from grafting.hosts.base import Host, Slot
from grafting.operators import Grid, Kind

Convention = Literal["original", "diffusers"]

# name: (depth, hidden_size, patch_size, num_heads), table 1 of the paper.
SIZES: dict[str, tuple[int, int, int, int]] = {
    f"DiT-{letter}/{patch}": (depth, width, patch, heads)
    for letter, depth, width, heads in (
        ("S", 12, 384, 6),
        ("B", 12, 768, 12),
        ("L", 24, 1024, 16),
        ("XL", 28, 1152, 16),
    )
    for patch in (2, 4, 8)
}
# Of every published DiT; shapes do not tell the dropout.
PUBLISHED_MLP_RATIO = 4.0
PUBLISHED_CLASS_DROPOUT = 0.1


class TimestepEmbedder(nn.Module):
    """Timesteps `[B]` to `[B, D]`: a sinusoid of 256 features (cosines first) and two linear layers.

    The original divides the log frequencies by 128; diffusers, following another model, by 127.
    """

    FREQUENCIES = 256

    def __init__(self, hidden_size: int, convention: Convention) -> None:
        super().__init__()
        self.convention = convention
        self.mlp = nn.Sequential(
            nn.Linear(self.FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def sinusoid(self, t: Tensor) -> Tensor:
        half = self.FREQUENCIES // 2
        divisor = half if self.convention == "original" else half - 1
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / divisor)
        angles = t.float()[:, None] * frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.sinusoid(t).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Labels `[B]` to `[B, D]`; one more row than classes holds the null class when labels can be dropped."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x (1 + scale) + shift` with `[B, D]` modulations of `[B, N, D]` tokens."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class DiTBlock(nn.Module):
    """Attention and MLP behind adaptive LayerNorm with zero-initialised gates (adaLN-Zero).

    `attn` and `mlp` are the block's slots.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, norm2_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn: nn.Module = operators.build("attention", dim=hidden_size, num_heads=num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=norm2_eps)
        self.mlp: nn.Module = operators.build("mlp", dim=hidden_size, num_heads=num_heads, expansion_ratio=mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor, grid: Grid | None = None) -> Tensor:
        """Tokens `x [B, N, D]` and conditioning `c [B, D]`; the grid defaults to one row of N tokens."""
        grid = grid or (1, x.shape[1])
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = torch.addcmul(x, gate_msa[:, None], self.attn(modulate(self.norm1(x), shift_msa, scale_msa), grid))
        return torch.addcmul(x, gate_mlp[:, None], self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp), grid))


class FinalLayer(nn.Module):
    """Adaptive LayerNorm and the projection of tokens to patches."""

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    """The class-conditional diffusion transformer.

    Takes the original's arguments and holds its state-dict keys. `convention="diffusers"` computes the time
    sinusoid and the second norm's eps as diffusers' `DiTTransformer2DModel` does.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        convention: Convention = "original",
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not divisible by patch_size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not divisible by num_heads {num_heads} and by 4")
        self.arguments = {
            "input_size": input_size,
            "patch_size": patch_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
            "convention": convention,
        }
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads
        self.num_classes, self.class_dropout_prob, self.learn_sigma = (
            num_classes,
            class_dropout_prob,
            learn_sigma,
        )
        self.out_channels = in_channels * (2 if learn_sigma else 1)

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size, convention)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        side = input_size // patch_size
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", sincos_2d(hidden_size, side)[None])  # fixed, but in the state dict
        norm2_eps = 1e-6 if convention == "original" else 1e-5
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, norm2_eps) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self._initialize()

    def _initialize(self) -> None:
        """The original's initialisation: Xavier everywhere, normal embedders, zero gates and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        if self.x_embedder.proj.bias is not None:
            nn.init.zeros_(self.x_embedder.proj.bias)
        for embedder in (
            self.y_embedder.embedding_table,
            self.t_embedder.mlp[0],
            self.t_embedder.mlp[2],
        ):
            nn.init.normal_(embedder.get_parameter("weight"), std=0.02)
        for zeroed in (
            *(block.get_submodule("adaLN_modulation.1") for block in self.blocks),
            self.final_layer.adaLN_modulation[1],
            self.final_layer.linear,
        ):
            nn.init.zeros_(zeroed.get_parameter("weight"))
            nn.init.zeros_(zeroed.get_parameter("bias"))

    @property
    def grid(self) -> Grid:
        side = self.input_size // self.patch_size
        return side, side

    @property
    def null_class(self) -> int:
        """The label that stands for "no class". Raises ValueError when the model was trained without one."""
        if self.y_embedder.embedding_table.num_embeddings == self.num_classes:
            raise ValueError("this DiT has no null class (class_dropout_prob 0): guidance is not defined for it")
        return self.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Latents `x [B, C, H, W]`, timesteps `t [B]` and labels `y [B]` to `[B, 2C, H, W]` (C without sigma)."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c, self.grid)
        return self.unpatchify(self.final_layer(x, c))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, p·p·C']` to `[B, C', H, W]`."""
        (rows, columns), p = self.grid, self.patch_size
        x = x.reshape(x.shape[0], rows, columns, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, rows * p, columns * p)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, guidance_channels: int = 3) -> Tensor:
        """The original's guided forward: `x` and `y` hold a conditional and a null half.

        Only the first half of `x` is read, and only the first `guidance_channels` channels of epsilon are
        guided; the others stay as computed for each half.
        """
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        conditional, null = out[:, :guidance_channels].chunk(2)
        guided = null + cfg_scale * (conditional - null)
        return torch.cat([torch.cat([guided, guided]), out[:, guidance_channels:]], dim=1)


def sincos_2d(dim: int, side: int) -> Tensor:
    """Fixed position table `[side², dim]`: the first half of the features encodes the column, the second the row."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, dim/2]
    columns = axis[None, :, :].expand(side, side, -1)
    rows = axis[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, dim).float()


class DiTHost(Host):
    """A class-conditional DiT as a host."""

    family = "dit"
    model: DiT

    @property
    def slots(self) -> dict[str, Slot]:
        places: tuple[tuple[Kind, str], ...] = (("mixer", "attn"), ("mlp", "mlp"))
        return {
            f"{kind}.{index}": Slot(f"{kind}.{index}", kind, index, f"blocks.{index}.{attribute}")
            for kind, attribute in places
            for index in range(self.model.depth)
        }

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self.model.in_channels, self.model.input_size, self.model.input_size

    @property
    def grid(self) -> Grid:
        return self.model.grid

    @property
    def width(self) -> int:
        return self.model.hidden_size

    @property
    def num_heads(self) -> int:
        return self.model.num_heads

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def null_class(self) -> int:
        return self.model.null_class

    @property
    def class_dropout_prob(self) -> float:
        return self.model.class_dropout_prob

    def architecture(self) -> dict[str, Any]:
        return dict(self.model.arguments)

    def denoise(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.model(z, t, condition)
