"""The page: sentences about the result, and everything else put into the template."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import yaml

from grafting.errors import UserError
from grafting.report.charts import (
    TrainingLog,
    distillation_chart,
    final_error_chart,
    final_errors,
    finetuning_chart,
    read_log,
)
from grafting.report.metrics import MISSING, STAGES, Metrics, Training, parse_metrics, read_json, read_text
from grafting.report.numbers import (
    as_ratio,
    duration,
    gap_closed,
    listed,
    percent,
    significant,
    slot_order,
    with_prefix,
)
from grafting.report.samples import read_samples
from grafting.report.table import build_summary


def _grafted_sentence(metrics: Metrics, config: Mapping[str, Any]) -> str | None:
    """What was put where, e.g. `hyena_x on 4 of 8 mixer slots of embedded:digits-dit.`"""
    of_host = f" of {config['host']}" if isinstance(config.get("host"), str) else ""
    if metrics.plan:
        parts = []
        for (operator, kind), count in Counter(
            (operator, slot.split(".")[0]) for slot, operator in metrics.plan.items()
        ).items():
            total = (metrics.slots or {}).get(kind)
            plural = "s" if (total or count) != 1 else ""
            parts.append(f"{operator} on {count}{f' of {total}' if total else ''} {kind} slot{plural}")
        return f"{listed(parts)}{of_host}."
    operators = [str(group["operator"]) for group in _graft_groups(config) if "operator" in group]
    return f"{listed(list(dict.fromkeys(operators)))}{of_host.replace(' of ', ' in ')}." if operators else None


def _graft_groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = config.get("graft")
    return [group for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []


def _result_sentences(metrics: Metrics) -> list[str]:
    """The last measured stage relative to the host, what it repaired and what that took."""
    host, fresh, training = metrics.stage("host"), metrics.stage("fresh"), metrics.training or Training()
    measured = [name for name in ("finetuned", "distilled", "fresh") if name in metrics.stages]
    if not measured:
        return []
    name, last = measured[0], metrics.stage(measured[0])
    sentences = []

    compared = []
    if last.fid is not None and host.fid is not None:
        intervals = (last.fid_interval, host.fid_interval)
        overlap = ""
        if intervals[0] and intervals[1]:
            apart = intervals[0][0] > intervals[1][1] or intervals[0][1] < intervals[1][0]
            overlap = ", intervals apart" if apart else ", intervals overlap"
        ratio = as_ratio(last.fid, host.fid) or "–"
        compared.append(f"FID is {significant(last.fid)} against the host’s {significant(host.fid)} ({ratio}{overlap})")
    if last.denoising_loss is not None and host.denoising_loss is not None:
        ratio = as_ratio(last.denoising_loss, host.denoising_loss) or "–"
        compared.append(
            f"held-out denoising loss {'' if compared else 'is '}{significant(last.denoising_loss)}"
            f" against {significant(host.denoising_loss)} ({ratio})"
        )
    if compared:
        sentences.append(f"{STAGES[name].capitalize()}, {listed(compared)}.")

    if name != "fresh":
        gaps = [
            (gap_closed(last.fid, host.fid, fresh.fid), "in FID"),
            (gap_closed(last.denoising_loss, host.denoising_loss, fresh.denoising_loss), "in denoising loss"),
        ]
        closed = [f"{percent(gap)} {where}" for gap, where in gaps if gap is not None]
        if closed:
            sentence = f"Training closed {listed(closed)} of the gap between fresh operators and host"
            if training.share_of_pretraining is not None:
                sentence += f", for {percent(training.share_of_pretraining)} of the pretraining’s compute"
            sentences.append(f"{sentence}.")
    return sentences


def _fid_basis(metrics: Metrics) -> str | None:
    """What the FIDs rest on; one sentence when all stages share it, else one part per stage."""
    basis: dict[str, list[str]] = {}
    for name, stage in metrics.stages.items():
        images = f"{stage.fid_n:,} images" if stage.fid_n is not None else None
        features = f"features of {stage.fid_extractor}" if stage.fid_extractor else None
        if images or features:
            basis.setdefault(", ".join(filter(None, (images, features))), []).append(name)
    if not basis:
        return None
    if len(basis) == 1:
        return f"FID: {next(iter(basis))}."
    return "FID: " + "; ".join(f"{', '.join(stages)}: {what}" for what, stages in basis.items()) + "."


def _training_rows(metrics: Metrics) -> list[tuple[str, str, str]]:
    training = metrics.training or Training()
    quantities = [
        ("samples", training.samples, training.share_of_pretraining_samples),
        ("FLOPs", training.flops, training.share_of_pretraining),
    ]
    rows = [
        (name, MISSING if n is None else with_prefix(n), MISSING if share is None else percent(share))
        for name, n, share in quantities
        if n is not None or share is not None
    ]
    seconds = {name: value for name, value in (metrics.seconds or {}).items() if value is not None}
    return rows + [(f"time: {name}", duration(value), MISSING) for name, value in seconds.items()]


def write_report(run_folder: Path) -> Path:
    """Render `report.html` in a run folder, in place of an older one, and return its path.

    A partial run gives a page that shows what is there and says what is not. Raises UserError, and leaves an
    older report as it was, when the folder is not a run's or one of its files cannot be read.
    """
    run_folder = Path(run_folder)
    parts = [run_folder / name for name in ("config.yaml", "metrics.json", "log.jsonl", "samples")]
    if not any(part.exists() for part in parts):
        raise UserError(f"{run_folder} is not a run folder: it holds none of {listed([p.name for p in parts])}")
    template = resources.files("grafting.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(template).render(_context(run_folder))
    report = run_folder / "report.html"
    part = report.with_name(f".{report.name}.{os.getpid()}")
    try:
        part.write_text(html, encoding="utf-8")
        os.replace(part, report)
    finally:
        part.unlink(missing_ok=True)
    return report


def _context(run_folder: Path) -> dict[str, Any]:
    """All that the template shows, read from the run folder."""
    config_text, config = _read_config(run_folder / "config.yaml")
    file = run_folder / "metrics.json"
    metrics = parse_metrics(read_json(file), str(file)) if file.exists() else Metrics()
    log = read_log(run_folder / "log.jsonl")
    grids, samples_caption = read_samples(run_folder / "samples")
    distillation, finetuning = distillation_chart(log), finetuning_chart(log)
    seed = metrics.seed if metrics.seed is not None else config.get("seed")
    environment = {} if seed is None else {"seed": seed}
    return {
        "name": str(config.get("name") or run_folder.resolve().name),
        "sentences": [s for s in (_grafted_sentence(metrics, config), *_result_sentences(metrics)) if s],
        "summary": build_summary(metrics),
        "missing_cell": MISSING,
        "fid_basis": _fid_basis(metrics),
        "grids": grids,
        "samples_caption": samples_caption,
        "charts": [chart for chart in (distillation, final_error_chart(log), finetuning) if chart],
        "plan": _plan_rows(metrics, config, log),
        "training": _training_rows(metrics),
        "environment": {**environment, **(metrics.environment or {})},
        "command": metrics.command,
        "config": config_text,
        "notices": _notices(run_folder, metrics, log, [grid.stage for grid in grids]),
    }


def _notices(run_folder: Path, metrics: Metrics, log: TrainingLog, sampled: Sequence[str]) -> list[str]:
    """What a partial run does not have yet, one line each."""
    notices = []
    if not (run_folder / "metrics.json").exists():
        notices.append("metrics.json is missing: no scores yet.")
    elif unscored := [stage for stage in STAGES if stage not in metrics.stages]:
        notices.append(f"Not scored yet: {listed(unscored)}.")
    if not sampled:
        notices.append("No samples yet.")
    elif unsampled := [stage for stage in STAGES if stage not in sampled]:
        notices.append(f"No samples yet: {listed(unsampled)}.")
    if not (run_folder / "log.jsonl").exists():
        notices.append("log.jsonl is missing: no training curves.")
    else:
        curves = {"distillation": log.distill_loss or log.relative_error, "finetuning": log.finetune}
        if untrained := [stage for stage, found in curves.items() if not found]:
            notices.append(f"No records yet in log.jsonl: {listed(untrained)}.")
    if log.unreadable:
        notices.append(f"log.jsonl: {log.unreadable} unreadable line{'s'[: log.unreadable > 1]} skipped.")
    if not (run_folder / "config.yaml").exists():
        notices.append("config.yaml is missing.")
    return notices


def _plan_rows(metrics: Metrics, config: Mapping[str, Any], log: TrainingLog) -> list[tuple[str, str, str, str]]:
    """(slot, operator, its config, final relative error), in the order of the slots."""
    configs: dict[str, set[str]] = {}
    for group in _graft_groups(config):
        fields = group.get("config")
        shown = ", ".join(f"{k}: {v}" for k, v in fields.items()) if isinstance(fields, Mapping) else ""
        configs.setdefault(str(group.get("operator")), set()).add(shown or MISSING)
    errors = final_errors(log)
    rows = []
    for slot in sorted(metrics.plan or {}, key=slot_order):
        operator = (metrics.plan or {})[slot]
        # Two groups with one operator and different configs: the plan does not say which filled this slot.
        found = configs.get(operator, {MISSING})
        shown = next(iter(found)) if len(found) == 1 else "see the config"
        rows.append((slot, operator, shown, significant(errors[slot]) if slot in errors else MISSING))
    return rows


def _read_config(path: Path) -> tuple[str | None, Mapping[str, Any]]:
    if not path.is_file():
        return None, {}
    text = read_text(path)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML ({reason})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected keys and values, such as `name: quickstart`")
    return text, config
