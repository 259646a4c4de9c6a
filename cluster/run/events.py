"""Events that workers send to the driver: plain values, since they travel between processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Worker:
    """One row of the worker table."""

    rank: int
    """Rank in the job: replica * size + column."""
    replica: int
    column: str
    """a, b, or `a and b`."""
    node: str
    """Host name of its node."""
    gpu: int | str | None
    """Number or id of its GPU on that node; None on a CPU."""


@dataclass(frozen=True)
class Started:
    """The training loop is about to make its first step after `step`; once per (re)start."""

    step: int
    total: int
    """Steps of the whole run."""
    place: str
    """Description of the workers: their number, device and dtype."""
    saved: int = 0
    """Step of the newest checkpoint; the state after `step` may be in memory only."""


@dataclass(frozen=True)
class Placed:
    """All workers are running and have formed their process groups; precedes `Started`."""

    workers: tuple[Worker, ...]
    """Workers in job order."""


@dataclass(frozen=True)
class Stepped:
    """A row of metrics.jsonl; its metrics are means since the last such event."""

    row: dict[str, Any]


@dataclass(frozen=True)
class Validated:
    """A row of validation.jsonl."""

    row: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A checkpoint was completed."""

    step: int
    seconds: float


@dataclass(frozen=True)
class Rated:
    """The learning rates have changed."""

    step: int
    """Last step before the change."""
    text: str
    """Old and new rates and the reason, in one line."""


@dataclass(frozen=True)
class Warned:
    """A warning for the user; training continues."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The last step was made and its checkpoint saved."""

    step: int


@dataclass(frozen=True)
class Ended:
    """The loop stopped after `step` on request and saved a checkpoint of it."""

    step: int


@dataclass(frozen=True)
class Failed:
    """A worker has failed."""

    text: str
    """Error message, one line."""
    trace: str
    worker: str
    """Name of the worker, for example `replica 0, column b`."""
    exit_code: int
    final: bool
    """True if a restart would fail in the same way."""
    late: bool = False
    """True if another worker did not answer in time."""
    broken_node: str = ""
    """Ray's id of the node whose GPU has failed; empty if none has."""


@dataclass(frozen=True)
class Measured:
    """Result of `cluster.training.profiler.measure`, as plain values."""

    found: dict[str, Any]


Event = (
    Placed | Started | Stepped | Validated | Saved | Rated | Warned | Finished | Ended | Failed
    | Measured
)  # fmt: skip
Tell = Callable[[Event], None]
Publish = Callable[[int, Mapping[str, float]], None]
"""Receives step and metrics of a process, about once a second."""
