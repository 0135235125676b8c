"""Channel mixers: the host's own MLP at any width."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from grafting.operators.registry import Grid, Operator, OperatorConfig, OperatorError, register


@register("mlp", kind="mlp")
class Mlp(Operator):
    """Two linear layers with the tanh approximation of GELU between, `fc2(gelu(fc1 x))`.

    The host's own channel mixer with the parameter names of the original DiT (timm's `Mlp`). From the host's
    weights it is exact at start when the width is the host's.
    """

    class Config(OperatorConfig):
        expansion_ratio: float = Field(4.0, gt=0, description="hidden width as a multiple of dim")

    config: Config

    def __init__(self, dim: int, num_heads: int, config: Config) -> None:
        super().__init__(dim, num_heads, config)
        hidden = int(dim * config.expansion_ratio)
        if hidden < 1:
            raise OperatorError(f"operator 'mlp': expansion_ratio {config.expansion_ratio} leaves no hidden unit")
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_host(cls, config: OperatorConfig, old_module: nn.Module) -> Mlp:
        """Start with the host's weights; the width must be the host's."""
        if not isinstance(old_module, Mlp) or not isinstance(config, Mlp.Config):
            raise OperatorError(f"operator 'mlp' starts from an MLP, not {type(old_module).__name__}")
        if int(old_module.dim * config.expansion_ratio) != old_module.fc1.out_features:
            raise OperatorError(
                f"operator 'mlp' starts from the host's weights only at the host's own width"
                f" (expansion_ratio {old_module.fc1.out_features / old_module.dim:g}); use init: fresh"
            )
        new = cls(old_module.dim, old_module.num_heads, config)
        new.load_state_dict(old_module.state_dict())
        return new

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
