"""A config becomes a finished run: graft, distil, finetune, sample, score, report.

Every stage ends with an atomic write, and all randomness is a function of the config's seed. The same command
again therefore continues after the last finished stage, to the same weights and scores.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from grafting import operators
from grafting.config import ExperimentConfig, read_config
from grafting.data import Data, cache_folder, load_data
from grafting.distill import DistillResult, distill
from grafting.errors import UserError
from grafting.eval import agreement, denoising, features, fid, images, speed
from grafting.files import replacing_file, replacing_folder, write_json
from grafting.finetune import FinetuneResult, finetune
from grafting.hosts.base import Host
from grafting.hosts.loading import load_host
from grafting.plan import GraftPlan
from grafting.report import write_report
from grafting.sample import balanced_labels, sample
from grafting.surgery import graft, load_saved_host

DENOISING_REPEATS = 2
SPEED_BATCH = 32


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what `metrics.json` holds."""

    folder: Path
    metrics: dict[str, Any]

    def load_hybrid(self) -> Host:
        """The hybrid that the run ended with."""
        return load_saved_host(self.folder / "hybrid")


class RunFolder:
    """The files of one run. Raises UserError when the folder belongs to another config."""

    def __init__(self, folder: Path, config: ExperimentConfig) -> None:
        self.path = folder
        text = config.to_yaml()
        existing = folder / "config.yaml"
        if existing.is_file():
            if existing.read_text() != text:
                raise UserError(
                    f"{folder} holds a run of another config ({_first_difference(existing.read_text(), text)});"
                    " give this one its own name or output, or delete that folder"
                )
        elif folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no run; give another output")
        else:
            with replacing_file(existing) as temporary:
                temporary.write_text(text)
        self.metrics: dict[str, Any] = {"stages": {}, "training": {}, "seconds": {}}
        if (folder / "metrics.json").is_file():
            try:
                self.metrics = json.loads((folder / "metrics.json").read_text())
            except ValueError as error:
                raise UserError(f"{folder / 'metrics.json'} is damaged ({error}); delete it to score again") from error

    def save_metrics(self) -> None:
        write_json(self.path / "metrics.json", self.metrics)

    def restart_log(self, stage: str) -> None:
        """Drop what an interrupted attempt at a stage logged."""
        path = self.path / "log.jsonl"
        if path.is_file():
            kept = [line for line in path.read_text().splitlines() if not _is_of_stage(line, stage)]
            with replacing_file(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept))

    def log(self, record: dict[str, Any]) -> None:
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def _is_of_stage(line: str, stage: str) -> bool:
    try:
        return bool(json.loads(line).get("stage") == stage)
    except ValueError:
        return True  # a line cut off by a kill


def _first_difference(old: str, new: str) -> str:
    for a, b in zip(old.splitlines(), new.splitlines(), strict=False):
        if a != b:
            return f"{a.strip()!r} there, {b.strip()!r} here"
    return "its length differs"


def prepare(config: ExperimentConfig) -> tuple[Host, GraftPlan]:
    """Load the custom operators and the host, and resolve the plan."""
    for file in config.operators:
        operators.load_file(file)
    host = load_host(config.host, vae=config.vae, num_heads=config.num_heads, convention=config.convention)
    return host, GraftPlan.from_config(config.graft, host)


def run(
    config: str | Path | ExperimentConfig,
    overrides: Sequence[str] = (),
    *,
    say: Callable[[str], None] | None = None,
) -> Run:
    """Do, or continue, an experiment. `say` receives a line at the end of every stage.

    Raises UserError for anything wrong with the config, host, data or folder; existing runs stay untouched.
    """
    if not isinstance(config, ExperimentConfig):
        config = read_config(config, overrides)
    elif overrides:
        raise UserError("overrides go with a config file, not with a parsed config")
    host, plan = prepare(config)
    # The plan is applied before the folder is made: a misfit leaves nothing behind.
    fresh = graft(host, plan, config.seed)
    data = load_data(config.data, host)
    return _Experiment(
        config, host, plan, fresh, data, say or (lambda line: print(line, file=sys.stderr, flush=True))
    ).run()


class _Experiment:
    """The stages of one run in order, each skipped when its result is there."""

    def __init__(
        self,
        config: ExperimentConfig,
        host: Host,
        plan: GraftPlan,
        fresh: Host,
        data: Data,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.host, self.fresh, self.data, self.say = config, host, fresh, data, say
        self.extractor = config.feature_extractor or host.card.feature_extractor
        if "fid" in config.evaluate:
            fid.check_sample_count(config.sample.n, self.extractor)
        self.folder = RunFolder(config.folder(), config)
        self.metrics = self.folder.metrics
        self.metrics["seed"] = config.seed
        self.metrics["environment"] = environment()
        self.metrics["plan"] = {slot: entry.operator for slot, entry in plan}
        self.metrics["slots"] = Counter(slot.kind for slot in host.slots.values())
        self.metrics.setdefault(
            "command", shlex.join(["graft", *sys.argv[1:]]) if sys.argv[0].endswith("graft") else ""
        )
        device = Accelerator().device
        self.host.to(device)
        self.fresh.to(device)
        self._reference: fid.Statistics | None = None
        self._host_losses: Tensor | None = None

    def run(self) -> Run:
        started = time.perf_counter()
        spent_before = self.metrics["seconds"].get("total", 0.0)
        stages = self.metrics["stages"]

        def finish(stage: str, values: dict[str, Any], line: str) -> None:
            stages[stage] = values
            self.metrics["seconds"]["total"] = spent_before + time.perf_counter() - started
            self.folder.save_metrics()
            self.say(f"{stage}: {line}")

        if "floor" not in stages:
            values = self.score_floor()
            finish("floor", values, _line(values))
        if "host" not in stages:
            values = self.score("host", self.host)
            finish("host", values, _line(values))
        if "fresh" not in stages:
            values = self.score("fresh", self.fresh)
            finish("fresh", values, _line(values))
        hybrid = self.fresh
        if self.config.distill is not None:
            hybrid = self.distilled(hybrid)
            if "distilled" not in stages:
                values = self.score("distilled", hybrid)
                finish("distilled", values, _line(values))
        hybrid = self.finetuned(hybrid)
        if self.config.finetune is not None and "finetuned" not in stages:
            values = self.score("finetuned", hybrid)
            finish("finetuned", values, _line(values))
        if "speed" in self.config.evaluate and "latency_ms" not in stages["host"]:
            self.measure_speed(hybrid)
        self.account_training(hybrid)
        self.metrics["seconds"]["total"] = spent_before + time.perf_counter() - started
        self.folder.save_metrics()
        report = write_report(self.folder.path)
        self.say(f"report: {report}")
        return Run(self.folder.path, self.metrics)

    # Stages.

    def distilled(self, hybrid: Host) -> Host:
        """The hybrid after stage 1, from the run's folder or trained now."""
        assert self.config.distill is not None
        folder = self.folder.path / "checkpoints" / "distilled"
        if not folder.is_dir():
            self.folder.restart_log("distill")
            result = distill(
                self.host, hybrid, self.data, self.config.distill, seed=self.config.seed, log=self.folder.log
            )
            for slot, reason in result.stopped.items():
                self.say(f"distill: slot {slot} stopped: {reason}")
            self._save(hybrid, folder, result)
        hybrid, result = self._load(folder, DistillResult)
        self.metrics["seconds"]["distill"] = result.seconds
        self.metrics["training"]["distill_samples"] = result.samples
        self.metrics["training"]["relative_error"] = result.relative_error
        self.metrics["training"]["relative_error_fresh"] = result.relative_error_fresh
        return hybrid

    def finetuned(self, hybrid: Host) -> Host:
        """The hybrid after stage 2 (or as it is when there is none), saved as the run's result."""
        folder = self.folder.path / "hybrid"
        if not folder.is_dir():
            result = FinetuneResult(0, 0.0, 0.0)
            if self.config.finetune is not None:
                self.folder.restart_log("finetune")
                result = finetune(
                    hybrid,
                    self.data,
                    self.config.finetune,
                    teacher=self.host,
                    seed=self.config.seed,
                    log=self.folder.log,
                )
            self._save(hybrid, folder, result)
        hybrid, result = self._load(folder, FinetuneResult)
        self.metrics["seconds"]["finetune"] = result.seconds
        self.metrics["training"]["finetune_samples"] = result.samples
        return hybrid

    def _save(self, hybrid: Host, folder: Path, result: DistillResult | FinetuneResult) -> None:
        with replacing_folder(folder) as temporary:
            hybrid.save_pretrained(temporary)
            write_json(temporary / "result.json", dataclasses.asdict(result))

    def _load(self, folder: Path, kind: type[Any]) -> tuple[Host, Any]:
        """Weights always come from the file, so that a continued run computes with the same bits."""
        hybrid = load_saved_host(folder, self.host.codec)
        hybrid.to(self.host.device)
        return hybrid, kind(**json.loads((folder / "result.json").read_text()))

    # Scores.

    def score(self, stage: str, model: Host) -> dict[str, Any]:
        """Sample a model and score it; the samples stay in the run's folder."""
        wanted = self.config.evaluate
        values: dict[str, Any] = {}
        if "fid" in wanted or "class_agreement" in wanted:
            options = self.config.sample
            labels = balanced_labels(options.n, model.num_classes)
            started = time.perf_counter()
            drawn = sample(
                model,
                options.n,
                condition=labels,
                steps=options.steps,
                sampler=options.sampler,
                guidance=options.guidance,
                guidance_channels=options.guidance_channels,
                seed=self.config.seed,
                batch_size=options.batch_size,
            )
            seconds = self.metrics["seconds"]
            seconds["sample"] = seconds.get("sample", 0.0) + time.perf_counter() - started
            images.write_images(drawn, self.folder.path / "samples" / stage, labels)
            if "fid" in wanted:
                values |= self._fid(drawn)
            if self.extractor == "digits":
                values["class_agreement"] = agreement.class_agreement(drawn, labels)
        if "denoising_loss" in wanted:
            values |= self._denoising(model)
        return values

    def _fid(self, drawn: Tensor) -> dict[str, Any]:
        if self._reference is None:
            self._reference = fid.reference_statistics(self.data.train.images(), self.extractor, cache_folder() / "fid")
        score = fid.fid(drawn, self._reference, self.extractor)
        return {
            "fid": score.value,
            "fid_interval": list(score.interval) if score.interval is not None else None,
            "fid_n": score.n,
            "fid_extractor": score.extractor,
            "fid_reference": score.reference_hash,
        }

    def _losses(self, model: Host) -> Tensor:
        held_out = self.data.held_out
        return denoising.denoising_loss(
            model, held_out.mean, held_out.labels, seed=self.config.seed, repeats=DENOISING_REPEATS
        )

    def _denoising(self, model: Host) -> dict[str, Any]:
        if self._host_losses is None:
            self._host_losses = self._losses(self.host)
        losses = self._host_losses if model is self.host else self._losses(model)
        values = denoising.summary(losses, DENOISING_REPEATS)
        out: dict[str, Any] = {
            "denoising_loss": values.mean,
            "denoising_loss_interval": list(values.interval),
        }
        if model is not self.host:
            change = denoising.paired_difference(losses, self._host_losses, DENOISING_REPEATS)
            out["denoising_loss_change"] = change.mean
            out["denoising_loss_change_interval"] = list(change.interval)
        return out

    def score_floor(self) -> dict[str, Any]:
        """What no model can beat: real held-out images, and the codec's reconstructions of them."""
        if "fid" not in self.config.evaluate:
            return {}
        held_out = self.data.held_out
        held_out = held_out.subset(self.config.sample.n, self.config.seed)  # as many as samples, balanced alike
        real = held_out.images()
        if len(real) <= features.feature_size(self.extractor):
            return {}
        assert self.host.codec is not None
        decoded = self.host.codec.decode(held_out.mean)
        out: dict[str, Any] = {}
        for name, pictures in (("real", real), ("reconstruction", decoded)):
            values = self._fid(pictures)
            out |= {
                f"fid_{name}": values["fid"],
                f"fid_{name}_interval": values["fid_interval"],
                "fid_n": values["fid_n"],
            }
            if self.extractor == "digits":
                out[f"class_agreement_{name}"] = agreement.class_agreement(pictures, held_out.labels)
        return out

    def measure_speed(self, hybrid: Host) -> None:
        """Latency and cost of host and hybrid, measured in turn; the hybrid's stages share one architecture."""
        batch = min(SPEED_BATCH, self.config.sample.batch_size)
        steps = self.config.sample.steps or self.host.card.sampling_steps
        guidance = self.host.card.guidance if self.config.sample.guidance is None else self.config.sample.guidance
        measured = speed.compare(
            {"host": self.host, "hybrid": hybrid}, batch_size=batch, steps=steps, guidance=guidance
        )
        for stage, values in self.metrics["stages"].items():
            if stage != "floor":
                values |= measured["host" if stage == "host" else "hybrid"].model_dump()
        self.folder.save_metrics()
        ratio = measured["host"].latency_ms / measured["hybrid"].latency_ms
        times = {name: f"{name} {values.latency_ms:.1f} ms" for name, values in measured.items()}
        self.say(f"speed: {', '.join(times.values())} ({ratio:.2f}×)")

    def account_training(self, hybrid: Host) -> None:
        """Training cost of both stages, as floating-point operations and as a share of the host's pretraining.

        A forward of the model costs its FLOPs, a training step three times that; stage 1 pays a host forward
        and three times the new operators, stage 2 the hybrid's training and the teacher's forward.
        """
        training = self.metrics["training"]
        host_flops, hybrid_flops = speed.flops(self.host), speed.flops(hybrid)
        tokens = hybrid.grid[0] * hybrid.grid[1]
        new = sum(hybrid.operator(slot).flops(tokens) for slot in hybrid.new_slots)
        distilled, finetuned = training.get("distill_samples", 0), training.get("finetune_samples", 0)
        reuse = self.config.distill.reuse if self.config.distill else 1
        teacher = self.config.finetune is not None and self.config.finetune.teacher_weight > 0
        total = distilled * (host_flops + 3 * new * reuse) + finetuned * (3 * hybrid_flops + teacher * host_flops)
        training |= {"samples": distilled + finetuned, "flops": total}
        samples = self.host.card.pretraining_samples
        if samples is not None:
            pretraining = self.host.card.pretraining_flops or 3.0 * host_flops * samples
            training |= {
                "share_of_pretraining": total / pretraining,
                "share_of_pretraining_samples": training["samples"] / samples,
            }


def _line(values: dict[str, Any]) -> str:
    names = {
        "fid": "FID {:.2f}",
        "fid_real": "FID {:.2f} real held-out images",
        "fid_reconstruction": "{:.2f} reconstructions",
        "denoising_loss": "denoising loss {:.4f}",
        "class_agreement": "class agreement {:.1%}",
    }
    return ", ".join(text.format(values[key]) for key, text in names.items() if key in values) or "done"


def environment() -> dict[str, Any]:
    """Versions and hardware that a score depends on."""
    import accelerate
    import diffusers

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "accelerate": accelerate.__version__,
        "diffusers": diffusers.__version__,
        "device": torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
