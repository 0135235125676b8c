"""The Host contract: a pretrained model that can be grafted, with all it needs to run.

Legend: B batch, C latent channels, H × W latent size, N tokens, D width.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from grafting.diffusion import DiffusionProcess
from grafting.errors import UserError, nearest
from grafting.hosts.codec import Codec
from grafting.operators import Grid, Kind, Operator


class HostCard(BaseModel):
    """What is known about a host beside its weights: its habits in sampling, and what it cost."""

    model_config = ConfigDict(extra="forbid")

    name: str
    guidance: float = Field(1.5, description="the guidance scale it is usually sampled with")
    guidance_channels: int | None = Field(3, description="leading latent channels that are guided; null means all")
    sampler: str = "ancestral"
    sampling_steps: int = 250
    feature_extractor: str = Field("inception", description="the extractor its images are scored with")
    pretraining_samples: int | None = Field(None, description="training samples seen, repetitions counted")
    pretraining_flops: float | None = None
    description: str = ""
    license: str = ""


class SlotEntry(BaseModel):
    """Which operator stands in a slot, how it is configured and how it was initialised."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    operator: str
    config: dict[str, Any] = {}
    init: str = "fresh"


@dataclass(frozen=True)
class Slot:
    """One replaceable place: `mixer.3` is the self-attention of block 3, at `module_path` in the model."""

    name: str
    kind: Kind
    index: int
    module_path: str


class Host(ABC):
    """A denoiser with its noise process, codec and conditioner.

    `grafts` says which slots hold something else than the pretrained layer; `new_slots` are those that the
    last graft filled. Grafting copies the denoiser and shares everything else.
    """

    family: ClassVar[str]
    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        *,
        card: HostCard,
        codec: Codec | None,
        source: str,
        grafts: dict[str, SlotEntry] | None = None,
        new_slots: list[str] | None = None,
    ) -> None:
        self.model = model.eval()
        self.card = card
        self.codec = codec
        self.source = source
        self.grafts = dict(grafts or {})
        self.new_slots = list(new_slots or [])
        self.process = DiffusionProcess()

    # What a family defines.

    @property
    @abstractmethod
    def slots(self) -> dict[str, Slot]:
        """Every slot by name, mixers first, in the host's own numbering."""

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one latent."""

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """Rows and columns of tokens for the host's latent shape."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Token width D that operators are built with."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """Attention heads that operators are built with."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes that can be asked for."""

    @property
    @abstractmethod
    def null_class(self) -> int:
        """The condition that stands for "none", read from the model."""

    @property
    @abstractmethod
    def class_dropout_prob(self) -> float:
        """Share of conditions that pretraining replaced by the null class."""

    @abstractmethod
    def architecture(self) -> dict[str, Any]:
        """Arguments that rebuild the ungrafted denoiser."""

    @abstractmethod
    def denoise(self, z: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """One denoiser call: `z [B, C, H, W]`, `t [B]` in 0..999, labels `[B]` to the prediction `[B, 2C, H, W]`."""

    # What all share.

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> Host:
        """Move the denoiser (and the codec) to a device; returns the host itself."""
        self.model.to(device)
        if self.codec is not None:
            self.codec.to(device)
        return self

    def slot(self, name: str) -> Slot:
        """A slot by name. Raises UserError naming the nearest one."""
        if name not in self.slots:
            raise UserError(f"{self.card.name} has no slot {name!r}; {nearest(name, self.slots)}")
        return self.slots[name]

    def operator(self, slot: str) -> Operator:
        """The operator that stands in a slot now."""
        module = self.model.get_submodule(self.slot(slot).module_path)
        assert isinstance(module, Operator)
        return module

    def copy(self) -> Host:
        """A host with its own copy of the denoiser that shares everything else."""
        new = copy.copy(self)
        new.model = copy.deepcopy(self.model)
        new.grafts, new.new_slots = dict(self.grafts), list(self.new_slots)
        return new

    def guided(
        self, z: Tensor, t: Tensor, condition: Tensor, guidance: float, guidance_channels: int | None = None
    ) -> Tensor:
        """The prediction under classifier-free guidance, both branches in one batch.

        Only the first `guidance_channels` channels of epsilon are guided (all when None); the other channels
        and the variance values are the conditional branch's, as in the original DiT's sampling.
        """
        if guidance == 1.0:
            return self.denoise(z, t, condition)
        null = torch.full_like(condition, self.null_class)
        both = self.denoise(torch.cat([z, z]), torch.cat([t, t]), torch.cat([condition, null]))
        conditional, unconditional = both.chunk(2)
        channels = z.shape[1] if guidance_channels is None else min(guidance_channels, z.shape[1])
        base = unconditional[:, :channels]
        return torch.cat([base + guidance * (conditional[:, :channels] - base), conditional[:, channels:]], dim=1)

    def save_pretrained(self, folder: Any) -> None:
        """Write `graft.json` and `model.safetensors`, from which `load_host(folder)` rebuilds it bit for bit."""
        from grafting.surgery import save_host  # surgery imports hosts; the method is only a convenience

        save_host(self, folder)
