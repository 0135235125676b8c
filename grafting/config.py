"""The typed config of an experiment, read from YAML with `key=value` overrides.

Every error is one UserError line that names the key (with the nearest known one) or the file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from grafting.errors import UserError, nearest
from grafting.plan import GraftGroup, describe_validation_error

Precision = Literal["no", "bf16", "fp16"]
Schedule = Literal["constant", "linear", "cosine"]
Sampler = Literal["ancestral", "ddim", "dpm_solver"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Where images and labels come from."""

    source: str = Field("embedded:digits", description="embedded:digits, or a folder with one sub-folder per class")
    held_out: float = Field(0.1, gt=0, lt=1, description="share of a folder's images kept for scoring")


class OptimizerConfig(_Section):
    """What both stages share."""

    steps: int = Field(300, ge=1, description="optimizer steps")
    batch_size: int = Field(64, ge=1, description="samples per step over all processes")
    schedule: Schedule = Field("linear", description="decay of the learning rate after the warm-up")
    decay_from: float = Field(0.3, ge=0, lt=1, description="share of the steps before the decay begins")
    warmup: int = Field(20, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    images: int | None = Field(None, ge=1, description="cap on the distinct training images; null uses all")
    log_every: int = Field(10, ge=1)
    mixed_precision: Precision = "no"

    def rate(self, step: int) -> float:
        """Learning-rate factor of a step, 0-based: warm-up, plateau, decay to zero at the end."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        progress = (step / self.steps - self.decay_from) / (1 - self.decay_from)
        if self.schedule == "constant" or progress <= 0:
            return warm
        if self.schedule == "linear":
            return warm * (1 - progress)
        return warm * 0.5 * (1 + math.cos(math.pi * progress))


class DistillConfig(OptimizerConfig):
    """Stage 1, activation distillation."""

    lr: float = Field(2e-3, gt=0)
    objective: Literal["l1", "l2", "huber"] = "l1"
    huber_delta: float = Field(1.0, gt=0)
    reuse: int = Field(1, ge=1, description="optimizer steps per host forward, on a ring of as many batches")
    evaluate_every: int = Field(50, ge=1, description="steps between measurements of the held-out relative error")


class FinetuneConfig(OptimizerConfig):
    """Stage 2, end-to-end training of the hybrid."""

    lr_new: float = Field(1e-3, gt=0, description="learning rate of the grafted operators")
    lr_old: float = Field(5e-4, ge=0, description="learning rate of the host's own layers; 0 freezes them")
    accumulate: int = Field(1, ge=1, description="micro-batches per step; batch_size must divide by it")
    ema_decay: float = Field(0.99, ge=0, lt=1)
    label_dropout: float | None = Field(None, ge=0, le=1, description="null takes the host's own")
    teacher_weight: float = Field(0.0, ge=0, description="weight of matching the host's noise and variance values")


class SampleConfig(_Section):
    """How images are drawn; null takes the host's own habit."""

    n: int = Field(1000, ge=1)
    steps: int | None = Field(None, ge=1, le=1000)
    sampler: Sampler | None = None
    guidance: float | None = Field(None, ge=0)
    guidance_channels: int | Literal["all"] | None = None
    batch_size: int = Field(128, ge=1)


Metric = Literal["fid", "denoising_loss", "class_agreement", "speed"]


class ExperimentConfig(_Section):
    """One experiment: `graft run FILE`."""

    name: str = Field("experiment", min_length=1, pattern=r"^[\w][\w.-]*$")
    output: str | None = Field(None, description="the run's folder; runs/<name> unless given")
    seed: int = Field(0, ge=0)
    host: str = "embedded:digits-dit"
    vae: str | None = Field(None, description="codec of a bare checkpoint: a folder or hub id")
    num_heads: int | None = Field(None, ge=1, description="attention heads, where a checkpoint's sizes do not tell")
    convention: Literal["original", "diffusers"] = "original"
    operators: list[str] = Field([], description="Python files that register custom operators")
    graft: list[GraftGroup] = Field(min_length=1)
    data: DataConfig = DataConfig()
    distill: DistillConfig | None = DistillConfig()
    finetune: FinetuneConfig | None = FinetuneConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: list[Metric] = ["fid", "speed"]
    feature_extractor: str | None = Field(None, description="for FID; null takes the host's own")

    @field_validator("evaluate")
    @classmethod
    def _always(cls, value: list[Metric]) -> list[Metric]:
        """FID never stands alone: the held-out denoising loss goes with it."""
        extra: list[Metric] = ["denoising_loss"] if "fid" in value and "denoising_loss" not in value else []
        return list(dict.fromkeys([*value, *extra]))

    def folder(self) -> Path:
        return Path(self.output).expanduser() if self.output else Path("runs") / self.name

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from YAML. Raises UserError for anything wrong with the file, a key or an override."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"config {path} is not a text file; it must be YAML") from None
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror or error}") from None
    return parse_config(text, overrides, str(path))


def parse_config(text: str, overrides: Sequence[str] = (), source: str = "config") -> ExperimentConfig:
    """`read_config` for YAML text; relative paths in it are the caller's working directory's."""
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{source} is not valid YAML: {reason[:200]}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{source} must be a mapping of keys, such as {{host: …, graft: […]}}")
    for override in overrides:
        _apply_override(raw, override)
    try:
        return ExperimentConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{source}: {describe_validation_error(error, '', ExperimentConfig)}") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply") from None


def _apply_override(raw: dict[Any, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not key=value, such as distill.steps=100")
    try:
        parsed = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"override {override!r}: the value is not valid YAML: {' '.join(str(error).split())[:120]}"
        ) from None
    parts = key.split(".")
    current: Any = raw
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(current, list):
            if not part.isdecimal() or int(part) >= len(current):
                raise UserError(f"override {override!r}: {'.'.join(parts[:depth])} is a list of {len(current)}")
            if last:
                current[int(part)] = parsed
            else:
                current = current[int(part)]
        elif isinstance(current, dict):
            if last:
                current[part] = parsed
            else:
                if current.get(part) is None:
                    if depth == 0 and part not in ExperimentConfig.model_fields:
                        raise UserError(f"unknown key {key!r}; {nearest(part, ExperimentConfig.model_fields)}")
                    current[part] = {}
                current = current[part]
        else:
            raise UserError(f"override {override!r}: {'.'.join(parts[:depth])} has no keys of its own")
