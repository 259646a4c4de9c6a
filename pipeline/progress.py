"""One progress line for long work: done, rate, time left. Silent when stderr is no terminal."""

from __future__ import annotations

import time
from types import TracebackType

import rich.console
import rich.progress as rp
from rich.text import Text


class Progress:
    """`with Progress("packing", total=1000, unit="img") as p: p.advance(10)`."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        console = rich.console.Console(stderr=True)
        self._bar = rp.Progress(
            rp.TextColumn("{task.description}"),
            rp.BarColumn(bar_width=30),
            rp.MofNCompleteColumn(),
            _Rate(unit),
            rp.TimeRemainingColumn(),
            rp.TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total, note="")

    def advance(self, count: int) -> None:
        """Count `count` more units as done."""
        self._bar.advance(self._task, count)

    def note(self, text: str) -> None:
        """Show a short remark at the end of the line."""
        self._bar.update(self._task, note=text)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


class _Rate(rp.ProgressColumn):
    """Units a second since the start (rich's own column leaves out the unit)."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit, self._start = unit, time.monotonic()

    def render(self, task: rp.Task) -> Text:
        """Return, for example, `412 img/s`."""
        rate = task.completed / max(1e-9, time.monotonic() - self._start)
        return Text(f"{rate:,.0f} {self._unit}/s")
