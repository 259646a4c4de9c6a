"""Reads the files of a run, any of which may be missing or damaged.

A run of ImageNet has about a million rows, so `Series` keeps columns of numbers, not rows.
"""

from __future__ import annotations

import math
import tomllib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.config import translate_values
from cluster.run.folder import (
    ATTEMPTS,
    CONFIG,
    LAYERS,
    MACHINE,
    METRICS,
    RATES,
    VALIDATION,
)
from cluster.run.jsonl import WAITS, read_tail
from cluster.run.state import RunState, read_state
from pipeline.dataset.record import require_run
from pipeline.tools.errors import UsageError, refuse_forbidden
from pipeline.tools.jsonl import Row, parse_json, parse_rows

Floats = npt.NDArray[np.float64]

STEP_NUMBERS = (
    "epoch", "loss", "top1_error", "lr", "img_s", "data_wait", *WAITS, "seconds", "replaced",
    "lr_bias", "memory",
)  # fmt: skip
MOST_ATTEMPTS = 200
"""Number of starts and ends that are read, the newest ones."""
VALIDATION_NUMBERS = ("loss", "top1_error", "top5_error", "samples")
EVALUATION_PARTS: dict[str, type | tuple[type, ...]] = {
    "top1_error": (int, float),
    "top5_error": (int, float),
    "classes": dict,
    "confusion": list,
}


@dataclass(frozen=True)
class Series:
    """Rows of a JSON-lines file as columns; numbers missing in a row are NaN."""

    columns: dict[str, Floats]
    """Always with "position" and "step", which increase strictly."""
    unreadable: int = 0
    """Number of lines that were skipped because they are no row."""
    restarts: tuple[tuple[int, int], ...] = ()
    """(last step before, step resumed from) of every restart; repeated rows are dropped."""

    def __len__(self) -> int:
        return len(self.columns["position"])

    def __getitem__(self, name: str) -> Floats:
        return self.columns[name]

    def last(self, name: str) -> float:
        """Return the last value of a column; NaN without rows."""
        return float(self[name][-1]) if len(self) else math.nan


@dataclass(frozen=True)
class Records:
    """Content of RUN for a report."""

    run: Path
    metrics: Series
    validation: Series
    config: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Evaluations by views, 1 or 10."""
    rates: tuple[dict[str, Any], ...] = ()
    """Rows of rates.jsonl, one for every change of the learning rates."""
    updates: dict[str, Floats] = field(default_factory=dict)
    """Mean |update| over mean |weight| by layer, and "position", all of one length."""
    attempts: tuple[dict[str, Any], ...] = ()
    """Rows of attempts.jsonl, one for every start and end of the workers."""
    state: RunState | None = None
    """State of the run; None if its config.toml cannot be read."""
    notes: tuple[str, ...] = ()
    """A sentence for everything that was damaged or missing."""


def read_records(run: Path) -> Records:
    """Read the files of RUN.

    Raises:
        UsageError: RUN is no run: it has neither metrics.jsonl nor config.toml.
    """
    if not (run / METRICS).is_file():
        require_run(run)
    notes: list[str] = []
    metrics = read_series(run / METRICS, STEP_NUMBERS)
    validation = read_series(run / VALIDATION, VALIDATION_NUMBERS)
    for name, series in ((METRICS, metrics), (VALIDATION, validation)):
        if series.unreadable:
            lines = "line" if series.unreadable == 1 else "lines"
            notes.append(f"{series.unreadable:,} {lines} of {name} could not be read; left out.")
    evaluations = {
        views: table
        for views in (1, 10)
        if (table := _read_evaluation(run / f"evaluation-{views}.json", notes))
    }
    return Records(
        run=run,
        metrics=metrics,
        validation=validation,
        config=translate_values(_read_table(run / CONFIG, notes)),
        machine=_read_table(run / MACHINE, notes),
        evaluations=evaluations,
        rates=tuple(
            row for row in _iterate_rows(run / RATES) if row and isinstance(row.get("set"), dict)
        ),
        updates=read_updates(run / LAYERS),
        attempts=tuple(read_tail(run / ATTEMPTS, MOST_ATTEMPTS)),
        state=_read_state(run),
        notes=tuple(notes),
    )


def _read_state(run: Path) -> RunState | None:
    try:
        return read_state(run)
    except UsageError:
        return None


def read_series(path: Path, names: tuple[str, ...]) -> Series:
    """Read the numbers `names` of every row; a missing file is a series without rows."""
    numbers = {name: array("d") for name in ("position", "step", *names)}
    unreadable = 0
    restarts = []
    for row in _iterate_rows(path):
        if row is None:
            unreadable += 1
            continue
        steps = numbers["step"]
        if len(steps) and row["step"] <= steps[-1]:
            restarts.append((int(steps[-1]), max(0, int(row["step"]) - 1)))
            keep = int(np.searchsorted(np.frombuffer(steps), row["step"]))
            for name, column in numbers.items():
                numbers[name] = column[:keep]
        for name, column in numbers.items():
            column.append(_parse_number(row.get(name)))
    return Series(
        columns={name: np.array(column, float) for name, column in numbers.items()},
        unreadable=unreadable,
        restarts=tuple(restarts),
    )


def read_updates(path: Path) -> dict[str, Floats]:
    """Read update over weight of each layer, mean over its columns; empty without rows."""
    found: dict[str, list[float]] = {}
    rows = [row for row in _iterate_rows(path) if row and isinstance(row.get("layers"), dict)]
    for number, row in enumerate(rows):
        found.setdefault("position", []).append(row["position"])
        sums: dict[str, list[float]] = {}
        for key, means in row["layers"].items():
            column, _, rest = str(key).partition(".")
            layer, _, kind = rest.partition(".")
            if column and kind == "weight" and isinstance(means, list) and len(means) > 1:
                sums.setdefault(layer, []).append(
                    _parse_number(means[1]) / max(_parse_number(means[0]), 1e-30)
                )
        for layer, ratios in sums.items():
            values = found.setdefault(layer, [])
            values += [math.nan] * (number - len(values)) + [float(np.mean(ratios))]
    return {
        name: np.array(values + [math.nan] * (len(rows) - len(values)))
        for name, values in found.items()
    }


def _iterate_rows(path: Path) -> Iterator[Row | None]:
    """Yield each line as a row with a position and a step; None for any other line.

    Raises:
        SetupError: the file is there and may not be read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        refuse_forbidden(error)
        return
    with file:
        for row in parse_rows(file):
            try:
                whole = row and math.isfinite(row["position"]) and math.isfinite(row["step"])
            except (KeyError, TypeError):
                whole = False
            yield row if whole else None


def _parse_number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _read_table(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read a JSON object or TOML table; empty, with a note, when the file is damaged."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        table = tomllib.loads(text) if path.suffix == ".toml" else parse_json(text)
        if not isinstance(table, dict):
            raise ValueError("it is no table")
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {str(error).splitlines()[0]}.")
        return {}
    return table


def _read_evaluation(path: Path, notes: list[str]) -> dict[str, Any]:
    """Read an evaluation; empty, with a note, if a part has the wrong type."""
    table = _read_table(path, notes)
    wrong = [
        name
        for name, kind in EVALUATION_PARTS.items()
        if name in table and not isinstance(table[name], kind)
    ]
    if wrong:
        notes.append(f"{path.name} is left out: {', '.join(wrong)} cannot be read.")
        return {}
    return table
