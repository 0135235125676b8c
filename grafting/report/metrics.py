"""What `metrics.json` may hold, read into types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from grafting.errors import UserError

STAGES = {
    "host": "host",
    "fresh": "with fresh operators",
    "distilled": "after distillation",
    "finetuned": "after finetuning",
}  # name in the files: name in sentences
MISSING = "–"


class StageMetrics(BaseModel):
    """What was measured of one stage; each key of `metrics.json` is optional."""

    fid: float | None = None
    fid_interval: tuple[float, float] | None = None
    fid_n: int | None = None
    fid_extractor: str | None = None
    fid_real: float | None = None
    fid_real_interval: tuple[float, float] | None = None
    fid_reconstruction: float | None = None
    fid_reconstruction_interval: tuple[float, float] | None = None
    denoising_loss: float | None = None
    denoising_loss_interval: tuple[float, float] | None = None
    denoising_loss_change_interval: tuple[float, float] | None = None
    class_agreement: float | None = None
    class_agreement_real: float | None = None
    class_agreement_reconstruction: float | None = None
    latency_ms: float | None = None
    images_per_second: float | None = None
    parameters: float | None = None
    flops: float | None = None
    peak_memory_bytes: float | None = None

    def of_real(self) -> StageMetrics:
        """The floor that real held-out images set."""
        return StageMetrics(
            fid=self.fid_real, fid_interval=self.fid_real_interval, class_agreement=self.class_agreement_real
        )

    def of_reconstruction(self) -> StageMetrics:
        """The floor that the codec's reconstructions of them set."""
        return StageMetrics(
            fid=self.fid_reconstruction,
            fid_interval=self.fid_reconstruction_interval,
            class_agreement=self.class_agreement_reconstruction,
        )


class Training(BaseModel):
    """What both training stages cost together, also as shares of the host's pretraining (0..1)."""

    flops: float | None = None
    share_of_pretraining: float | None = None
    samples: float | None = None
    share_of_pretraining_samples: float | None = None


class Metrics(BaseModel):
    """The content of `metrics.json`. `slots` is how many slots of each kind the host has."""

    stages: dict[str, StageMetrics] = {}
    training: Training | None = None
    seconds: dict[str, float | None] | None = None
    seed: int | None = None
    environment: dict[str, Any] | None = None
    plan: dict[str, str] | None = None
    slots: dict[str, int] | None = None
    command: str | None = None

    def stage(self, name: str) -> StageMetrics:
        return self.stages.get(name) or StageMetrics()


def parse_metrics(content: Any, source: str) -> Metrics:
    try:
        return Metrics.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{source}{', ' + key if key else ''}: {first['msg']}") from None


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}); delete it and run the command again"
        ) from None
