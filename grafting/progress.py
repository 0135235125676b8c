"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 15.0


class Tracker:
    """Counts the steps of one piece of work and shows them."""

    def __init__(self, total: int, description: str, progress: Progress | None, task: TaskID | None) -> None:
        self.total, self.description, self.done = total, description, 0
        self._progress, self._task = progress, task
        self._started = self._last = time.monotonic()

    def advance(self, count: int = 1, note: str = "") -> None:
        """Record `count` finished steps; `note` is shown beside them."""
        self.done += count
        now = time.monotonic()
        rate = self.done / max(now - self._started, 1e-9)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self.done, rate=f"{rate:.3g}/s", note=note)
        elif now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            left = (self.total - self.done) / rate
            line = f"{self.description}: {self.done}/{self.total}, {rate:.3g}/s, {left:.0f} s left"
            print(f"{line}, {note}" if note else line, file=sys.stderr, flush=True)


@contextmanager
def track(total: int, description: str) -> Iterator[Tracker]:
    """Show the progress of `total` steps while the block runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Tracker(total, description, None, None)
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>9}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Tracker(total, description, progress, progress.add_task(description, total=total, rate="", note=""))
