"""The summary table of a run, for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from grafting.report.metrics import MISSING, STAGES, Metrics, StageMetrics, parse_metrics
from grafting.report.numbers import (
    as_interval,
    as_ratio,
    gap_closed,
    milliseconds,
    percent,
    significant,
    with_prefix,
    with_sign,
)

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
        Row("floor: real held-out", "floor", _cells(floor.of_real(), host)),
        Row("floor: VAE reconstructions", "floor", _cells(floor.of_reconstruction(), host)),
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
    against_host = None if is_host else as_ratio(stage.latency_ms, host.latency_ms)
    return (
        cell(stage.fid, significant, as_interval(stage.fid_interval)),
        cell(stage.denoising_loss, significant, as_interval(stage.denoising_loss_interval)),
        cell(stage.class_agreement, percent),
        cell(change, with_sign, as_interval(stage.denoising_loss_change_interval, signed=True)),
        cell(fid_gap, percent),
        cell(loss_gap, percent),
        cell(stage.latency_ms, milliseconds, against_host),
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
    summary = build_summary(parse_metrics(metrics, "metrics"))
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
