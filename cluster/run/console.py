"""Terminal output of a run: a live progress bar, or plain lines where there is no terminal."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import rich.progress as rp
from rich.text import Text

from cluster.run import events
from cluster.run.events import Event, Started, Warned, Worker
from pipeline.tools.progress import EVERY as WAIT_EVERY
from pipeline.tools.progress import Ticker
from pipeline.tools.stdio import OutputError
from pipeline.tools.terminal import Terminal
from pipeline.tools.text import hide_credentials

EVERY = 5.0
"""Seconds between plain progress lines."""
MOST_WORKERS = 16
"""Rows of the worker table, at most."""


class RunConsole:
    """Prints events; a context manager around the run."""

    def __init__(self, console: Terminal | None = None) -> None:
        # The present stdout: later it is redirected, to hide what Ray prints.
        self._console = console or Terminal(sys.stdout)
        self._live = self._console.is_terminal
        self._total = 0
        self._first: tuple[float, int] | None = None
        self._shown = 0.0
        self._starts = 0
        self._bar = rp.Progress(
            rp.TextColumn("{task.description}", markup=False),
            rp.BarColumn(bar_width=24),
            rp.TextColumn("{task.fields[numbers]}", markup=False),
            console=self._console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, numbers="")
        self._ticker = Ticker(self._tick)
        self._waiting = ""
        self._begun = self._said = 0.0

    def __enter__(self) -> RunConsole:
        self._bar.start()
        self._ticker.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._ticker.__exit__()
        self._bar.stop()

    def wait(self, what: str) -> None:
        """Say what is begun; without a terminal every 30 s again, until the run has started."""
        self._begun = time.monotonic()
        self._bar.update(self._task, description=what)
        if not self._live:
            self.say(f"{what} ...")
            self._waiting = what

    def _tick(self) -> None:
        now = time.monotonic()
        if self._waiting and now - self._said >= WAIT_EVERY:
            self.say(f"still {self._waiting}: {now - self._begun:,.0f} s so far")

    def say(self, text: str) -> None:
        """Print a permanent line; a run does not end because its output cannot be written."""
        self._said = time.monotonic()
        try:
            self._console.print(Text(hide_credentials(text)), soft_wrap=True)
        except OutputError as error:
            sys.stderr.write(f"warning: standard output cannot be written ({error})\n")
        except BrokenPipeError:
            # Nobody reads any more, as after a lost connection: the run is saved, and ends.
            if callable(signal.getsignal(signal.SIGHUP)):
                signal.raise_signal(signal.SIGHUP)

    def show(self, event: Event) -> None:
        """Print an event of a worker."""
        match event:
            case Started():
                self._show_start(event)
            case events.Stepped(row):
                self._show_step(row)
            case events.Validated(row):
                self.say(
                    f"step {row['step']:>6}  validation: loss {row['loss']:.3f}"
                    f"  top-1 error {row['top1_error']:.1%}  top-5 error {row['top5_error']:.1%}"
                    f"  ({row['samples']:,} images, {row['seconds']:.1f} s)"
                )
            case events.Saved(step, seconds):
                self.say(f"step {step:>6}  checkpoint ({seconds:.1f} s)")
            case events.Rated(step, text):
                self.say(f"step {step:>6}  from here on: {text}")
            case Warned(text):
                self.say(f"warning: {text}")
            case events.Ended(step):
                self.say(f"step {step:>6}  saved, and ended")
            case events.Finished(step):
                self.say(f"step {step:>6}  done")

    def table(self, workers: Sequence[Worker]) -> None:
        """Print replica, column, node and device of each worker."""
        width = max(len("node"), *(len(worker.node) for worker in workers))
        self.say(f"replica  column   {'node':<{width}}  device")
        for worker in workers[:MOST_WORKERS]:
            device = format_device(worker.gpu)
            self.say(f"{worker.replica:<9}{worker.column:<9}{worker.node:<{width}}  {device}")
        if len(workers) > MOST_WORKERS:
            self.say(f"... {len(workers) - MOST_WORKERS} more; RUN/attempts.jsonl has them all")

    def _show_start(self, event: Started) -> None:
        self._waiting = ""
        self._starts += 1
        self._total = event.total
        self._first = None
        again = "restarted, " if self._starts > 1 else ""
        come_from = f"going on from step {event.step}" if event.step else "starting"
        self.say(f"{again}{come_from}: {event.total - event.step:,} steps on {event.place}")
        self._bar.update(
            self._task, description="training", total=event.total, completed=event.step
        )

    def _show_step(self, row: dict[str, Any]) -> None:
        now = time.monotonic()
        # Counted from the first step on: what it waits for does not come again.
        start, first = self._first = self._first or (now, row["step"])
        done = row["step"] - first
        seconds = (self._total - row["step"]) * (now - start) / max(1, done)
        left = f"  {format_duration(seconds)} left" if done else ""
        # The most important numbers first: a narrow terminal cuts off the end.
        numbers = (
            f"loss {row['loss']:.3f}  top-1 error {row['top1_error']:.1%}"
            f"  {row['img_s']:,.0f} img/s{left}"
            f"  waiting for data {row['data_wait']:.0%}  epoch {row['epoch']:.2f}"
        )
        if self._live:
            counted = f"{row['step']}/{self._total}  {numbers}"
            self._bar.update(self._task, completed=row["step"], numbers=counted)
        elif now - self._shown >= EVERY:
            self._shown = now
            self.say(f"step {row['step']:>6}  {numbers}")


def print_warning(event: Event) -> None:
    """Print a warning to stderr; ignores other events."""
    if isinstance(event, Warned):
        sys.stderr.write(f"warning: {event.text}\n")


def format_device(gpu: int | str | None) -> str:
    """Format the GPU of a worker as GPU 3, or by its id; None: CPU."""
    if isinstance(gpu, str):
        return gpu
    return "CPU" if gpu is None else f"GPU {gpu}"


def format_duration(seconds: float) -> str:
    """Format seconds as 4:05, 1:02:03 or 3 days 4:05:06."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} days {hour}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
