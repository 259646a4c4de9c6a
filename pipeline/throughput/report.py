"""All that was found out, as plain values: the same for the table, the page, a file and a diff."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.throughput.machine import Machine
from pipeline.throughput.remedies import Remedy
from pipeline.throughput.row import Row
from pipeline.tools.errors import UsageError
from pipeline.tools.files import sealed

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """One examination of one stream on one machine."""

    date: str
    command: str
    machine: Machine
    data: dict[str, Any]
    """Where, pictures, bytes, encoding; whether it fits into memory."""
    setting: dict[str, Any]
    """Of the stream."""
    stages: tuple[Row, ...]
    whole: Row
    waits: dict[str, float]
    """Share of the stream's time that its taker waited for each part, 0..1."""
    read_full: float
    read_empty: float
    queue: tuple[tuple[float, int, int], ...]
    """Seconds, batches that lay read, 1 if pixels were ready: at each batch, thinned."""
    sweep: dict[int, tuple[float, float]]
    """By threads: pictures a second of DALI alone, and predicted of the stream."""
    knee: int
    """The fewest threads that give nearly all."""
    bounds: tuple[tuple[str, float, str], ...]
    """What holds the stream back, lowest first: name, pictures a second, how."""
    state: str
    """In words: from memory, disk or store; what bounds and remedies are about."""
    img_s: float
    """In that state."""
    model: float
    """What the model of the bounds gives for it, over that; bounds are scaled to fit."""
    remedies: tuple[Remedy, ...]
    verdict: str
    needed: float | None = None
    """Pictures a second that the trainer takes."""
    warnings: tuple[str, ...] = ()
    version: int = field(default=VERSION)

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        with sealed(path) as file:
            file.write(json.dumps(self.table(), indent=1).encode() + b"\n")

    def table(self) -> dict[str, Any]:
        """As JSON has it."""
        found: dict[str, Any] = rounded(dataclasses.asdict(self))
        return found


def rounded(value: Any) -> Any:
    """Numbers with five digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return value


def load(path: Path) -> dict[str, Any]:
    """Return the table of a saved report.

    Raises:
        UsageError: there is none, or it is no report.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version = table["version"]
        _ = table["whole"]["img_s"], table["stages"], table["machine"]["cores"]
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read ({error.strerror}); name a throughput.json"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is no report of pipeline.throughput; name a throughput.json"
        ) from error
    if version != VERSION:
        raise UsageError(f"{path} is of version {version}, not {VERSION}; make it anew")
    found: dict[str, Any] = table
    return found
