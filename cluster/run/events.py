"""What a worker tells whoever watches it. Plain values: they travel between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Worker:
    """A line of the table of workers."""

    rank: int
    """In the job: replica * size + column."""
    replica: int
    column: str
    """a, b, or `a and b`."""
    node: str
    """Name of its node."""
    gpu: int | None
    """Number of its GPU on that node; None on a CPU."""


@dataclass(frozen=True)
class Started:
    """The loop is about to make its first step after `step`; once for every (re)start."""

    step: int
    total: int
    """Steps of the whole run."""
    place: str
    """The workers in words: how many, where, with what."""


@dataclass(frozen=True)
class Placed:
    """The workers are where they are, and know their places; before `Started`."""

    workers: tuple[Worker, ...]
    """In job order."""


@dataclass(frozen=True)
class Stepped:
    """A row of metrics.jsonl; numbers are means since the last such event."""

    row: dict[str, Any]


@dataclass(frozen=True)
class Validated:
    """A row of validation.jsonl."""

    row: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete."""

    step: int
    seconds: float


@dataclass(frozen=True)
class Rated:
    """The learning rates change."""

    step: int
    """The last step before it."""
    text: str
    """From what to what, and why; one line."""


@dataclass(frozen=True)
class Warned:
    """Something the user should know; training goes on."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The last step is made and saved."""

    step: int


@dataclass(frozen=True)
class Ended:
    """The loop has ended after `step` because it was asked to, and saved it."""

    step: int


@dataclass(frozen=True)
class Failed:
    """A worker gives up."""

    text: str
    """One line."""
    trace: str
    worker: str
    """For example `replica 0, column b`."""
    exit_code: int
    final: bool
    """The same would happen again: do not restart."""


@dataclass(frozen=True)
class Measured:
    """What `headspace.measure` has found; plain values."""

    found: dict[str, Any]


Event = (
    Placed | Started | Stepped | Validated | Saved | Rated | Warned | Finished | Ended | Failed
    | Measured
)  # fmt: skip
Tell = Callable[[Event], None]
Publish = Callable[[int, Mapping[str, float]], None]
"""Gets step and numbers of a process, now and then."""
