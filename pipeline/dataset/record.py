"""Record of its dataset in the folder of a run: RUN/config.toml has its address and its hash."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from pipeline.dataset.segments import Segments, parse_segments
from pipeline.tools.errors import UsageError

RECORD, LOCK = "config.toml", ".lock"
"""Files in the folder of a run: its settings, and the lock of its training, which comes first."""
ADDRESS_KEY, SHA256_KEY = "data", "data_sha256"
"""Keys of RUN/config.toml: address of the dataset, credentials replaced by stars, and SHA-256 of
its manifest. Older runs lack the first."""


SEGMENTS_KEY = "data_segments"
"""Key of RUN/config.toml of a run that has gone on with newer versions: lists as `Segment`."""


def require_run(run: Path) -> None:
    """Check that a folder is that of a run that has begun.

    Raises:
        UsageError: it is not; says what it is.
    """
    if (run / RECORD).is_file():
        return
    if run.is_file():
        raise UsageError(f"{run} is a file; name the folder of a run")
    if (run / LOCK).is_file():
        raise UsageError(
            f"{run} holds a run that has not begun ({RECORD} is missing); wait until its training "
            "says more, or start that again"
        )
    raise UsageError(f"{run} holds no run ({RECORD} is missing); name the --run of a training")


def read_address(run: Path) -> str:
    """Return the address of a run's dataset as it was recorded; "" if there is no record."""
    found = _read_record(run).get(ADDRESS_KEY)
    return found if isinstance(found, str) else ""


def read_versions(run: Path) -> str | Segments | None:
    """Return the version of its dataset that a run reads, or its segments; None: not known."""
    found = _read_record(run).get(SHA256_KEY)
    is_identity = isinstance(found, str) and re.fullmatch("[0-9a-f]{64}", found)
    return read_segments(run) or (found if is_identity else None)


def read_segments(run: Path) -> Segments:
    """Return the segments of a run that has gone on with newer versions; empty for any other.

    Raises:
        UsageError: they cannot be read.
    """
    rows = _read_record(run).get(SEGMENTS_KEY)
    try:
        return parse_segments(rows) if rows is not None else ()
    except ValueError as error:
        raise UsageError(f"{run / RECORD} cannot be read ({error}); restore it") from error


def _read_record(run: Path) -> dict[str, Any]:
    try:
        return tomllib.loads((run / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # of a damaged file, too: whoever needs its settings reports it
        return {}
