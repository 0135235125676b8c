"""The report of a run: one self-contained HTML page, and the same table for the terminal.

`write_report` reads what a run folder holds (`config.yaml`, `metrics.json`, `log.jsonl`, `samples/`), all of
it optional, and renders `report.html`; what is not there yet is named on the page. The page needs no network
and no other file: images are data URIs, charts are inline SVG that takes its colours from the page's light or
dark style.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jinja2
import yaml
from markupsafe import Markup, escape
from PIL import Image
from pydantic import BaseModel, ValidationError
from rich import box
from rich.table import Table
from rich.text import Text

from grafting.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAGES = {
    "host": "host",
    "fresh": "with fresh operators",
    "distilled": "after distillation",
    "finetuned": "after finetuning",
}  # name in the files: name in sentences
MISSING = "–"


# ---- metrics.json --------------------------------------------------------------------------------


class StageMetrics(BaseModel):
    """What was measured of one stage; each key of `metrics.json` is optional."""

    fid: float | None = None
    fid_interval: tuple[float, float] | None = None
    fid_n: int | None = None
    fid_extractor: str | None = None
    fid_real: float | None = None
    fid_reconstruction: float | None = None
    denoising_loss: float | None = None
    denoising_loss_interval: tuple[float, float] | None = None
    denoising_loss_change_interval: tuple[float, float] | None = None
    class_agreement: float | None = None
    latency_ms: float | None = None
    images_per_second: float | None = None
    parameters: float | None = None
    flops: float | None = None
    peak_memory_bytes: float | None = None


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


def _parse_metrics(content: Any, source: str) -> Metrics:
    try:
        return Metrics.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{source}{', ' + key if key else ''}: {first['msg']}") from None


# ---- numbers for people --------------------------------------------------------------------------


def significant(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits: 10.7, 0.0781, 1230; very small ones as 1.23e-06."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    rounded = float(f"{value:.{digits - 1}e}")
    if rounded == 0:
        return "0"
    exponent = math.floor(math.log10(abs(rounded)))
    text = f"{rounded:.{digits - 1}e}" if exponent < -4 else f"{rounded:.{max(0, digits - 1 - exponent)}f}"
    return text.replace("-", "−", 1) if value < 0 else text


def with_prefix(value: float, unit: str = "", base: int = 1000) -> str:
    """A count with K, M, G … (`base` 1000) or Ki, Mi, Gi … (`base` 1024): 2.51M, 38.4K, 1.21 GiB."""
    prefixes = ["", "K", "M", "G", "T", "P", "E"]
    power = 0
    while power + 1 < len(prefixes) and abs(float(f"{value:.2e}")) >= base and math.isfinite(value):
        value, power = value / base, power + 1
    number = f"{value:.0f}" if power == 0 and value == round(value, 0) else significant(value)
    prefix = prefixes[power] + ("i" if base == 1024 and power else "")
    return f"{number} {prefix}{unit}" if unit else f"{number}{prefix}"


def percent(share: float) -> str:
    """A share (0..1) in percent with one decimal, and more where it would read 0.0%: 93.4%, 0.012%."""
    value = 100 * share
    text = f"{value:.1f}" if abs(value) >= 1 or value == 0 else significant(value, 2)
    return f"{text}%".replace("-", "−")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _milliseconds(value: float) -> str:
    return f"{significant(value)} ms" if value < 1000 else f"{significant(value / 1000)} s"


def _ratio(value: float | None, host: float | None) -> str | None:
    return None if value is None or not host else f"{value / host:.2f}×"


def _interval(bounds: tuple[float, float] | None, *, signed: bool = False) -> str | None:
    if bounds is None:
        return None
    low, high = (_signed(bound) if signed else significant(bound) for bound in bounds)
    return f"{low} to {high}" if signed or bounds[0] < 0 else f"{low}–{high}"


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + significant(value)


def gap_closed(value: float | None, host: float | None, fresh: float | None) -> float | None:
    """(fresh − value) / (fresh − host): the share of what the graft broke that training has repaired.

    None when one is missing or not finite, or when the fresh operators are no worse than the host.
    """
    if value is None or host is None or fresh is None:
        return None
    closed = (fresh - value) / (fresh - host) if fresh > host else math.nan
    return closed if math.isfinite(closed) else None


# ---- the summary table ---------------------------------------------------------------------------

Group = Literal["Quality", "Against host", "Cost"]


@dataclass(frozen=True)
class Column:
    """A column of the summary table; `group` is the heading above it."""

    heading: str
    group: Group


@dataclass(frozen=True)
class Cell:
    """One value as text, and a second line beneath it (an interval, a ratio to the host)."""

    text: str = MISSING
    detail: str | None = None


@dataclass(frozen=True)
class Row:
    label: str
    stage: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Summary:
    """The table of a run without columns or rows that have nothing in them."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]

    def groups(self) -> list[tuple[Group, list[int]]]:
        """The column groups in order, each with the positions of its columns."""
        groups: dict[Group, list[int]] = {}
        for i, column in enumerate(self.columns):
            groups.setdefault(column.group, []).append(i)
        return list(groups.items())


COLUMNS = (
    Column("FID", "Quality"),
    Column("held-out loss", "Quality"),
    Column("class agreement", "Quality"),
    Column("loss change", "Against host"),
    Column("FID gap closed", "Against host"),
    Column("loss gap closed", "Against host"),
    Column("latency", "Cost"),
    Column("images/s", "Cost"),
    Column("parameters", "Cost"),
    Column("FLOPs", "Cost"),
    Column("peak memory", "Cost"),
)


def build_summary(metrics: Metrics) -> Summary:
    """The rows and columns that both the page and the terminal show."""
    floor, host, fresh = (metrics.stage(name) for name in ("floor", "host", "fresh"))
    rows = [
        Row("floor: real held-out", "floor", _cells(StageMetrics(fid=floor.fid_real), host)),
        Row("floor: VAE reconstructions", "floor", _cells(StageMetrics(fid=floor.fid_reconstruction), host)),
    ]
    for name in STAGES:
        compared = fresh if name in ("distilled", "finetuned") else None
        rows.append(Row(name, name, _cells(metrics.stage(name), host, compared, is_host=name == "host")))
    rows = [row for row in rows if any(cell.text != MISSING for cell in row.cells)]
    kept = [i for i in range(len(COLUMNS)) if any(row.cells[i].text != MISSING for row in rows)]
    return Summary(
        tuple(COLUMNS[i] for i in kept),
        tuple(Row(row.label, row.stage, tuple(row.cells[i] for i in kept)) for row in rows),
    )


def _cells(
    stage: StageMetrics, host: StageMetrics, fresh: StageMetrics | None = None, *, is_host: bool = False
) -> tuple[Cell, ...]:
    """One cell for each of COLUMNS. `fresh` is given for the stages whose share of the gap is asked for."""

    def cell(value: float | None, show: Callable[[float], str], detail: str | None = None) -> Cell:
        return Cell() if value is None else Cell(show(value), detail)

    change = None
    if not is_host and stage.denoising_loss is not None and host.denoising_loss is not None:
        change = stage.denoising_loss - host.denoising_loss
    fid_gap = gap_closed(stage.fid, host.fid, fresh.fid) if fresh else None
    loss_gap = gap_closed(stage.denoising_loss, host.denoising_loss, fresh.denoising_loss) if fresh else None
    against_host = None if is_host else _ratio(stage.latency_ms, host.latency_ms)
    return (
        cell(stage.fid, significant, _interval(stage.fid_interval)),
        cell(stage.denoising_loss, significant, _interval(stage.denoising_loss_interval)),
        cell(stage.class_agreement, percent),
        cell(change, _signed, _interval(stage.denoising_loss_change_interval, signed=True)),
        cell(fid_gap, percent),
        cell(loss_gap, percent),
        cell(stage.latency_ms, _milliseconds, against_host),
        cell(stage.images_per_second, significant),
        cell(stage.parameters, with_prefix),
        cell(stage.flops, with_prefix),
        cell(stage.peak_memory_bytes, lambda value: with_prefix(value, "B", 1024)),
    )


def summary_table(metrics: dict[str, Any]) -> Table:
    """The summary of a run (the content of `metrics.json`) for the terminal.

    The groups of columns are stacked, so that they fit 80 characters. Raises UserError when the metrics are
    malformed.
    """
    summary = build_summary(_parse_metrics(metrics, "metrics"))
    whole = Table.grid(padding=(0, 0, 1, 0))
    for group, positions in summary.groups():
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column(Text(group, "bold"))
        for i in positions:
            table.add_column(Text(summary.columns[i].heading), justify="right")
        for row in summary.rows:
            cells = [row.cells[i] for i in positions]
            if any(cell.text != MISSING for cell in cells):
                style = "bold" if row.stage == "finetuned" else ""
                table.add_row(Text(row.label, style), *(_terminal_cell(cell) for cell in cells))
        whole.add_row(table)
    return whole


def _terminal_cell(cell: Cell) -> Text:
    return Text.assemble(cell.text, (f"\n{cell.detail}" if cell.detail else "", "dim"))


# ---- sentences -----------------------------------------------------------------------------------


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


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
        return f"{_and(parts)}{of_host}."
    operators = [str(group["operator"]) for group in _graft_groups(config) if "operator" in group]
    return f"{_and(list(dict.fromkeys(operators)))}{of_host.replace(' of ', ' in ')}." if operators else None


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
        ratio = _ratio(last.fid, host.fid) or "–"
        compared.append(f"FID is {significant(last.fid)} against the host’s {significant(host.fid)} ({ratio}{overlap})")
    if last.denoising_loss is not None and host.denoising_loss is not None:
        ratio = _ratio(last.denoising_loss, host.denoising_loss) or "–"
        compared.append(
            f"held-out denoising loss {'' if compared else 'is '}{significant(last.denoising_loss)}"
            f" against {significant(host.denoising_loss)} ({ratio})"
        )
    if compared:
        sentences.append(f"{STAGES[name].capitalize()}, {_and(compared)}.")

    if name != "fresh":
        gaps = [
            (gap_closed(last.fid, host.fid, fresh.fid), "in FID"),
            (gap_closed(last.denoising_loss, host.denoising_loss, fresh.denoising_loss), "in denoising loss"),
        ]
        closed = [f"{percent(gap)} {where}" for gap, where in gaps if gap is not None]
        if closed:
            sentence = f"Training closed {_and(closed)} of the gap between fresh operators and host"
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


# ---- log.jsonl and its charts --------------------------------------------------------------------

Series = dict[int, float]


@dataclass(frozen=True)
class TrainingLog:
    """The training curves of a run, each a value by step; `unreadable` counts lines that are not JSON."""

    relative_error: dict[str, Series]
    distill_loss: dict[str, Series]
    finetune: dict[str, Series]
    unreadable: int


def _slot_order(slot: str) -> list[int | str]:
    # Digit runs alternate with text, so that like is compared with like: mixer.2 before mixer.10.
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", slot)]


def read_log(path: Path) -> TrainingLog:
    """Curves from a `log.jsonl`. Where a resumed run logged a step twice, the last record counts."""
    relative_error: dict[str, Series] = {}
    distill_loss: dict[str, Series] = {}
    finetune: dict[str, Series] = {}
    unreadable = 0

    def add(curves: dict[str, Series], name: str, record: Mapping[str, Any], key: str) -> None:
        step, value = record.get("step"), record.get(key)
        if isinstance(step, int) and isinstance(value, (int, float)) and math.isfinite(value):
            curves.setdefault(name, {})[step] = float(value)

    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line) if line.strip() else None
        except json.JSONDecodeError:
            # A run that was cut off may leave half a line; the curves stand without it.
            unreadable += 1
            continue
        if not isinstance(record, dict):
            continue
        if record.get("stage") == "distill" and isinstance(record.get("slot"), str):
            add(relative_error, record["slot"], record, "relative_error")
            add(distill_loss, record["slot"], record, "loss")
        elif record.get("stage") == "finetune":
            add(finetune, "loss", record, "loss")
            add(finetune, "held-out loss", record, "held_out_loss")

    def ordered(curves: dict[str, Series]) -> dict[str, Series]:
        return {slot: curves[slot] for slot in sorted(curves, key=_slot_order)}

    return TrainingLog(ordered(relative_error), ordered(distill_loss), finetune, unreadable)


@dataclass(frozen=True)
class Chart:
    """A chart as inline SVG, its caption, and its legend as (colour, name)."""

    title: str
    svg: Markup
    caption: str
    legend: tuple[tuple[str, str], ...] = ()


# Drawn in these colours, which appear nowhere else, and then replaced by the page's own, light or dark.
INK, GRID, ACCENT, CONTRAST = "#010203", "#010204", "#010205", "#010206"
PAGE_COLOURS = {
    INK: "currentColor",
    GRID: "var(--line)",
    ACCENT: "var(--accent)",
    CONTRAST: "var(--contrast)",
}
# Of middle luminance: about 4:1 against both the light and the dark background.
DEPTH_COLOURS = ["#4f74d9", "#1e8a9e", "#4a8f3c", "#b07a14", "#d1503f", "#b5509c"]
MOST_POINTS = 500


def _figure(height: float) -> tuple[Figure, Axes]:
    # Imported here because it takes most of a second, which the terminal's table need not pay.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=INK, color=GRID, labelsize=10, length=0)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _log_ticks(axes: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low / 1.15, high * 1.15)
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = math.log10(high / low) if high > low else 0
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades > 0.7 else range(1, 10), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _inline_svg(figure: Figure, key: str, label: str, titles: Mapping[str, str]) -> Markup:
    """The figure as SVG inside the page: its ids begin with `key`, and `titles` (by gid) show on hover."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text, in the page's own font; the salt makes the ids, and so the file, reproducible.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "axes.unicode_minus": True}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    view_box = re.search(r'viewBox="([0-9. ]+)"', svg)
    assert view_box is not None
    opening = f'<svg class="chart" viewBox="{view_box[1]}" role="img" aria-label="{escape(label)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    svg = re.sub(r'\bxlink:href="', 'href="', svg)
    svg = re.sub(r'\b(id="|href="#)', rf"\g<1>{key}-", svg).replace("url(#", f"url(#{key}-")
    for gid, title in titles.items():
        svg = svg.replace(f'<g id="{key}-{gid}">', f'<g id="{key}-{gid}"><title>{escape(title)}</title>')
    for drawn, colour in PAGE_COLOURS.items():
        svg = svg.replace(drawn, colour)
    return Markup(svg)


def _depth_colours(count: int) -> list[str]:
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    sweep = LinearSegmentedColormap.from_list("depth", DEPTH_COLOURS)
    return [to_hex(sweep(i / max(1, count - 1))) for i in range(count)]


def _thinned(series: Series) -> tuple[list[int], list[float]]:
    """At most about MOST_POINTS points of a curve, the last one always among them."""
    steps = sorted(series)
    stride = math.ceil(len(steps) / MOST_POINTS)
    steps = steps[::-1][::stride][::-1] if stride > 1 else steps
    return steps, [series[step] for step in steps]


def _positive(curves: Mapping[str, Series]) -> dict[str, Series]:
    """The curves without the points that a logarithmic axis cannot show."""
    kept = ((name, {step: v for step, v in curve.items() if v > 0}) for name, curve in curves.items())
    return {name: curve for name, curve in kept if curve}


def _distillation_chart(log: TrainingLog) -> Chart | None:
    curves, what = _positive(log.relative_error), "held-out relative error"
    if not curves:
        curves, what = _positive(log.distill_loss), "training loss"
    if not curves:
        return None
    figure, axes = _figure(3.3)
    colours = _depth_colours(len(curves))
    titles, legend = {}, []
    for i, ((slot, curve), colour) in enumerate(zip(curves.items(), colours, strict=True)):
        steps, values = _thinned(curve)
        axes.plot(steps, values, color=colour, linewidth=1.8, gid=f"line{i}", marker="" if steps[1:] else "o")
        titles[f"line{i}"] = f"{slot}: {significant(values[-1])} after step {steps[-1]}"
        legend.append((colour, slot))
    values = [value for curve in curves.values() for value in curve.values()]
    _log_ticks(axes, "y", min(values), max(values))
    axes.set_xlabel("step", color=INK)
    svg = _inline_svg(figure, "distillation", f"{what} of {len(curves)} slots during distillation", titles)
    caption = "Per slot, logarithmic; colours run from the first slot to the last."
    return Chart(f"Distillation: {what}", svg, caption, tuple(legend))


def _final_error_chart(log: TrainingLog) -> Chart | None:
    errors = final_errors(log)
    if not errors:
        return None
    figure, axes = _figure(0.75 + 0.27 * len(errors))
    colours = _depth_colours(len(errors))
    places = range(len(errors))
    axes.hlines(places, 0, list(errors.values()), colors=GRID, linewidth=3)
    titles = {}
    for place, (slot, error) in enumerate(errors.items()):
        axes.plot([error], [place], "o", color=colours[place], markersize=8, gid=f"dot{place}")
        axes.annotate(significant(error), (error, place), (9, 0), textcoords="offset points", color=INK,
                      va="center", fontsize=10)  # fmt: skip
        titles[f"dot{place}"] = f"{slot}: {significant(error)}"
    axes.set_yticks(places, list(errors), parse_math=False)
    axes.set_ylim(len(errors) - 0.5, -0.5)
    axes.set_xlim(0, 1.18 * max(errors.values()) or 1)
    axes.grid(False, axis="y")
    axes.locator_params(axis="x", nbins=6)
    listed = ", ".join(f"{slot} {significant(error)}" for slot, error in errors.items())
    svg = _inline_svg(figure, "final-error", f"final relative error per slot: {listed}", titles)
    caption = "Held out; 0 would be the old layer’s own output."
    return Chart("Relative error per slot after distillation", svg, caption)


def final_errors(log: TrainingLog) -> dict[str, float]:
    """The last held-out relative error of each slot."""
    return {slot: curve[max(curve)] for slot, curve in log.relative_error.items()}


def _finetuning_chart(log: TrainingLog) -> Chart | None:
    loss, held_out = log.finetune.get("loss"), log.finetune.get("held-out loss")
    if not loss and not held_out:
        return None
    import numpy as np

    figure, axes = _figure(3.3)
    legend, titles = [], {}
    if loss:
        raw = np.array([loss[step] for step in sorted(loss)])
        # A centred mean over a twentieth of the run; at the ends, over what there is of it.
        window = np.ones(min(len(raw), max(1, len(raw) // 20) // 2 * 2 + 1))
        smooth = np.convolve(raw, window, "same") / np.convolve(np.ones_like(raw), window, "same")
        steps, values = _thinned(loss)
        axes.plot(steps, values, color=ACCENT, alpha=0.3, linewidth=0.9)
        steps, values = _thinned(dict(zip(sorted(loss), smooth.tolist(), strict=True)))
        axes.plot(steps, values, color=ACCENT, linewidth=2, gid="smooth")
        titles["smooth"] = "training loss, smoothed"
        legend.append(("var(--accent)", "training loss (faint: every record)"))
        if not held_out and len(raw) > 20:
            axes.set_ylim(*_frame(np.quantile(raw, 0.005), np.quantile(raw, 0.995)))
    if held_out:
        steps, values = _thinned(held_out)
        axes.plot(steps, values, "o-", color=CONTRAST, linewidth=1.8, markersize=4, gid="held-out")
        titles["held-out"] = f"held-out loss: {significant(values[-1])} after step {steps[-1]}"
        legend.append(("var(--contrast)", "held-out loss"))
    axes.set_xlabel("step", color=INK)
    svg = _inline_svg(figure, "finetuning", f"finetuning: {' and '.join(name for _, name in legend)}", titles)
    return Chart("Finetuning", svg, "The hybrid’s loss, end to end.", tuple(legend))


def _frame(low: float, high: float) -> tuple[float, float]:
    margin = 0.08 * (high - low) or abs(high) or 1.0
    return low - margin, high + margin


# ---- samples -------------------------------------------------------------------------------------

GRID_COLUMNS, GRID_ROWS = 10, 4
LARGEST_TILE = 128  # pixels
GRIDS_BUDGET = 1_700_000  # bytes of PNG over all stages; base64 adds a third, and the page stays below 3 MB


@dataclass(frozen=True)
class SampleGrid:
    """The chosen samples of one stage in one picture. `pixelated` when its pixels are the images' own."""

    stage: str
    source: str
    alt: str
    width: int
    height: int
    pixelated: bool


def read_samples(folder: Path) -> tuple[list[SampleGrid], str | None]:
    """One picture per stage of `samples/`, the same seeds in each, and a caption that says which these are.

    Raises UserError when an image or `labels.json` cannot be read.
    """
    files = {stage: _sample_files(folder / stage) for stage in STAGES}
    files = {stage: found for stage, found in files.items() if found}
    if not files:
        return [], None
    indices = set.intersection(*(set(found) for found in files.values()))
    labels_files = (folder / stage / "labels.json" for stage in files)
    labels_file = next((path for path in (*labels_files, folder / "labels.json") if path.is_file()), None)
    layout, caption = _layout(sorted(indices), _read_labels(labels_file) if labels_file else [])
    if not layout:
        return [], None
    images = {
        stage: {i: _open_image(found[i]) for row in layout for i in row if i is not None}
        for stage, found in files.items()
    }
    width, height = next(iter(images[next(iter(images))].values())).size
    tile = min(1.0, LARGEST_TILE / max(width, height))
    while True:
        size = (max(1, round(tile * width)), max(1, round(tile * height)))
        pictures = {stage: _compose(images[stage], layout, size) for stage in images}
        if sum(map(len, pictures.values())) <= GRIDS_BUDGET or max(size) <= 8:
            break
        tile *= 0.8
    return [
        SampleGrid(
            stage,
            f"data:image/png;base64,{base64.b64encode(picture).decode()}",
            f"Samples, {STAGES[stage]}. {caption}",
            size[0] * len(layout[0]),
            size[1] * len(layout),
            pixelated=tile == 1.0,
        )
        for stage, picture in pictures.items()
    ], caption


def _sample_files(folder: Path) -> dict[int, Path]:
    images = (path for path in sorted(folder.glob("*.png")) if re.fullmatch("[0-9]+", path.stem))
    return {int(path.stem): path for path in images}


def _read_labels(path: Path) -> list[Any]:
    labels = _read_json(path)
    if not isinstance(labels, list) or not all(isinstance(label, (int, str, type(None))) for label in labels):
        raise UserError(f"{path}: expected a list with one class per image")
    return labels


def _layout(indices: Sequence[int], labels: Sequence[Any]) -> tuple[list[list[int | None]], str]:
    """Rows of image indices: the first few of every class, a class per column, or simply the first ones."""
    by_class: dict[Any, list[int]] = {}
    for index in indices:
        if index < len(labels) and labels[index] is not None:
            by_class.setdefault(labels[index], []).append(index)
    classes = sorted(by_class, key=lambda label: _slot_order(str(label)))
    classes = [label for label in classes if len(by_class[label]) > 1][:GRID_COLUMNS]
    if classes:
        rows = min(GRID_ROWS, max(len(by_class[label]) for label in classes))
        layout = [
            [by_class[label][row] if row < len(by_class[label]) else None for label in classes] for row in range(rows)
        ]
        names = _and([str(label) for label in classes])
        if len(classes) > 2 and _consecutive(classes):
            names = f"{classes[0]}–{classes[-1]}"
        return layout, f"A column per class ({names}), the first {rows} of each."
    shown: list[int | None] = [*indices[: GRID_COLUMNS * GRID_ROWS]]
    columns = min(GRID_COLUMNS, len(shown))
    layout = [shown[start : start + columns] for start in range(0, len(shown), columns or 1)]
    if layout:
        layout[-1] += [None] * (columns - len(layout[-1]))
    return layout, f"The first {len(shown)} samples."


def _consecutive(classes: Sequence[Any]) -> bool:
    return all(isinstance(label, int) for label in classes) and classes[-1] - classes[0] == len(classes) - 1


def _open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("L" if image.mode in ("1", "L") else "RGB")
    # A truncated PNG raises SyntaxError, a huge one DecompressionBombError.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a readable image ({reason}); delete it and sample again") from None


def _compose(images: Mapping[int, Image.Image], layout: Sequence[Sequence[int | None]], size: tuple[int, int]) -> bytes:
    """The images as one PNG in the order of `layout`; places without an image stay transparent."""
    holes = any(index is None for row in layout for index in row)
    mode = "L" if all(image.mode == "L" for image in images.values()) else "RGB"
    picture = Image.new(f"{mode}A" if holes else mode, (size[0] * len(layout[0]), size[1] * len(layout)))
    for y, row in enumerate(layout):
        for x, index in enumerate(row):
            if index is not None:
                image = images[index]
                tile = image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
                picture.paste(tile.convert(picture.mode), (x * size[0], y * size[1]))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


# ---- the page ------------------------------------------------------------------------------------


def write_report(run_folder: Path) -> Path:
    """Render `report.html` in a run folder, in place of an older one, and return its path.

    A partial run gives a page that shows what is there and says what is not. Raises UserError, and leaves an
    older report as it was, when the folder is not a run's or one of its files cannot be read.
    """
    run_folder = Path(run_folder)
    parts = [run_folder / name for name in ("config.yaml", "metrics.json", "log.jsonl", "samples")]
    if not any(part.exists() for part in parts):
        raise UserError(f"{run_folder} is not a run folder: it holds none of {_and([p.name for p in parts])}")
    template = resources.files("grafting").joinpath("report.html.jinja").read_text(encoding="utf-8")
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
    metrics = _parse_metrics(_read_json(file), str(file)) if file.exists() else Metrics()
    log = read_log(run_folder / "log.jsonl")
    grids, samples_caption = read_samples(run_folder / "samples")
    distillation, finetuning = _distillation_chart(log), _finetuning_chart(log)
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
        "charts": [chart for chart in (distillation, _final_error_chart(log), finetuning) if chart],
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
        notices.append(f"Not scored yet: {_and(unscored)}.")
    if not sampled:
        notices.append("No samples yet.")
    elif unsampled := [stage for stage in STAGES if stage not in sampled]:
        notices.append(f"No samples yet: {_and(unsampled)}.")
    if not (run_folder / "log.jsonl").exists():
        notices.append("log.jsonl is missing: no training curves.")
    else:
        curves = {"distillation": log.distill_loss or log.relative_error, "finetuning": log.finetune}
        if untrained := [stage for stage, found in curves.items() if not found]:
            notices.append(f"No records yet in log.jsonl: {_and(untrained)}.")
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
    for slot in sorted(metrics.plan or {}, key=_slot_order):
        operator = (metrics.plan or {})[slot]
        # Two groups with one operator and different configs: the plan does not say which filled this slot.
        found = configs.get(operator, {MISSING})
        shown = next(iter(found)) if len(found) == 1 else "see the config"
        rows.append((slot, operator, shown, significant(errors[slot]) if slot in errors else MISSING))
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}); delete it and run the command again"
        ) from None


def _read_config(path: Path) -> tuple[str | None, Mapping[str, Any]]:
    if not path.is_file():
        return None, {}
    text = _read_text(path)
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML ({reason})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected keys and values, such as `name: quickstart`")
    return text, config
