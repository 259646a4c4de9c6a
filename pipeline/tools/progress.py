"""Progress bar on stderr; without a terminal (a job, a log file) plain lines, 30 s apart at most.

Work that is over within a second leaves no line there.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import rich.progress as rp
from rich.text import Text

from pipeline.tools.terminal import Terminal

EVERY = 30.0
"""Seconds between plain lines."""
FIRST = 1.0
"""Seconds until the first plain line."""
TICK = 0.5
"""Seconds between calls of a `Ticker`."""


class Ticker:
    """Thread that calls a function every `TICK` seconds during a `with` block."""

    def __init__(self, tick: Callable[[], None]) -> None:
        """Set the function, which must not raise."""
        self._tick = tick
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ticker", daemon=True)

    def _run(self) -> None:
        while not self._ended.wait(TICK):
            self._tick()

    def __enter__(self) -> Ticker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def announce(what: str) -> Iterator[None]:
    """Say on stderr what the block does while it lasts: work whose amount is not known."""
    console = Terminal(sys.stderr)
    if console.is_terminal:
        with console.status(Text(what)):
            yield
        return
    begun = time.monotonic()
    due = begun + FIRST

    def tick() -> None:
        nonlocal due
        if (now := time.monotonic()) >= due:
            write_line(f"{what}: {now - begun:,.0f} s so far")
            due = now + EVERY

    with Ticker(tick):
        yield


def write_line(text: str) -> None:
    """Write a line to stderr, if somebody reads it."""
    with suppress(OSError, ValueError):  # nobody reads: no reason to end the work
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


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
        console = Terminal(sys.stderr)
        self._rate = _Rate(unit, already)
        self._bar = rp.Progress(
            rp.TextColumn("{task.description}", markup=False),
            rp.BarColumn(bar_width=30),
            rp.MofNCompleteColumn(),
            self._rate,
            rp.TimeRemainingColumn(),
            rp.TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total, completed=already, note="")
        self._begun = self._printed = time.monotonic()
        self._ticker = Ticker(self._tick)

    def advance(self, count: int) -> None:
        """Count `count` more units as done."""
        self._bar.advance(self._task, count)
        if self._bar.disable and time.monotonic() - self._printed >= EVERY:
            self._print_line()

    def _tick(self) -> None:
        wait = FIRST if self._printed == self._begun else EVERY
        if time.monotonic() - self._printed >= wait:
            self._print_line()

    def _print_line(self) -> None:
        self._printed = time.monotonic()
        write_line(self._line())

    def skip(self, count: int) -> None:
        """Count `count` more units as done, without an effect on the rate."""
        self._rate.already += count
        self._bar.advance(self._task, count)

    def _line(self) -> str:
        """Return, for example, `packing: 5,120 of 20,000 img, 412 img/s, 0:00:36 left`."""
        (task,) = self._bar.tasks
        rate, unit = self._rate.measure(task), self._rate.unit
        text = f"{task.description}: {task.completed:,.0f} of {task.total:,.0f} {unit}"
        if rate > 0:
            left = timedelta(seconds=min(10**9, round(((task.total or 0) - task.completed) / rate)))
            text += f", {rate:,.0f} {unit}/s, {left} left"
        return text + (f", {task.fields['note']}" if task.fields["note"] else "")

    def note(self, text: str) -> None:
        """Show a short text at the end of the line."""
        self._bar.update(self._task, note=text)

    def __enter__(self) -> Progress:
        self._bar.start()
        if self._bar.disable:
            self._ticker.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.disable:
            self._ticker.__exit__()
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
