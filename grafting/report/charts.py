"""`log.jsonl` and its charts: inline SVG that takes its colours from the page's light or dark style."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from markupsafe import Markup, escape

from grafting.report.numbers import significant, slot_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Series = dict[int, float]


@dataclass(frozen=True)
class TrainingLog:
    """The training curves of a run, each a value by step; `unreadable` counts lines that are not JSON."""

    relative_error: dict[str, Series]
    distill_loss: dict[str, Series]
    finetune: dict[str, Series]
    unreadable: int


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
        return {slot: curves[slot] for slot in sorted(curves, key=slot_order)}

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


def distillation_chart(log: TrainingLog) -> Chart | None:
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


def final_error_chart(log: TrainingLog) -> Chart | None:
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


def finetuning_chart(log: TrainingLog) -> Chart | None:
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
