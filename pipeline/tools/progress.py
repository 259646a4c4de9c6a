"""Progress bar on stderr; without a terminal (a job, a log file) a plain line every 30 s."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

import rich.console
import rich.progress as rp
from rich.text import Text

EVERY = 30.0
"""Seconds between plain lines."""


class Progress:
    """`with Progress("packing", total=1000, unit="img") as p: p.advance(10)`."""

    def __init__(self, what: str, total: int, unit: str, already: int = 0) -> None:
        """Create the bar.

        Args:
            what: name of the work.
            total: number of units of work.
            unit: name of a unit ("img").
            already: units that an earlier run has done, which do not count for the rate.
        """
        console = rich.console.Console(stderr=True)
        self._rate = _Rate(unit, already)
        self._bar = rp.Progress(
            rp.TextColumn("{task.description}"),
            rp.BarColumn(bar_width=30),
            rp.MofNCompleteColumn(),
            self._rate,
            rp.TimeRemainingColumn(),
            rp.TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total, completed=already, note="")
        self._printed = time.monotonic()

    def advance(self, count: int) -> None:
        """Count `count` more units as done."""
        self._bar.advance(self._task, count)
        if self._bar.disable and time.monotonic() - self._printed >= EVERY:
            self._printed = time.monotonic()
            sys.stderr.write(self._line() + "\n")
            sys.stderr.flush()

    def skip(self, count: int) -> None:
        """Count `count` more units as done, without an effect on the rate."""
        self._rate.already += count
        self._bar.advance(self._task, count)

    def _line(self) -> str:
        """Return, for example, `packing: 5,120 of 20,000 img, 412 img/s, 0:00:36 left`."""
        (task,) = self._bar.tasks
        rate, unit = max(1e-9, self._rate.measure(task)), self._rate.unit
        left = timedelta(seconds=min(10**9, round(((task.total or 0) - task.completed) / rate)))
        note = f", {task.fields['note']}" if task.fields["note"] else ""
        return (
            f"{task.description}: {task.completed:,.0f} of {task.total:,.0f} {unit}, "
            f"{rate:,.0f} {unit}/s, {left} left{note}"
        )

    def note(self, text: str) -> None:
        """Show a short text at the end of the line."""
        self._bar.update(self._task, note=text)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class _Rate(rp.ProgressColumn):
    """Column with the units per second since the start (rich's own has no unit)."""

    def __init__(self, unit: str, already: int) -> None:
        super().__init__()
        self.unit, self.already, self._start = unit, already, time.monotonic()

    def measure(self, task: rp.Task) -> float:
        """Return the units per second."""
        return (task.completed - self.already) / max(1e-9, time.monotonic() - self._start)

    def render(self, task: rp.Task) -> Text:
        """Return, for example, `412 img/s`."""
        return Text(f"{self.measure(task):,.0f} {self.unit}/s")
