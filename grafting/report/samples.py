"""Grids of a run's samples, side by side on the same seeds."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from grafting.errors import UserError
from grafting.report.metrics import STAGES, read_json
from grafting.report.numbers import listed, slot_order

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
    labels = read_json(path)
    if not isinstance(labels, list) or not all(isinstance(label, (int, str, type(None))) for label in labels):
        raise UserError(f"{path}: expected a list with one class per image")
    return labels


def _layout(indices: Sequence[int], labels: Sequence[Any]) -> tuple[list[list[int | None]], str]:
    """Rows of image indices: the first few of every class, a class per column, or simply the first ones."""
    by_class: dict[Any, list[int]] = {}
    for index in indices:
        if index < len(labels) and labels[index] is not None:
            by_class.setdefault(labels[index], []).append(index)
    classes = sorted(by_class, key=lambda label: slot_order(str(label)))
    classes = [label for label in classes if len(by_class[label]) > 1][:GRID_COLUMNS]
    if classes:
        rows = min(GRID_ROWS, max(len(by_class[label]) for label in classes))
        layout = [
            [by_class[label][row] if row < len(by_class[label]) else None for label in classes] for row in range(rows)
        ]
        names = listed([str(label) for label in classes])
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
