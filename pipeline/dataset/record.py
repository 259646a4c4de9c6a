"""Record of its dataset in the folder of a run: RUN/config.toml has its address and its hash."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pipeline.tools.errors import UsageError

RECORD, LOCK = "config.toml", ".lock"
"""Files in the folder of a run: its settings, and the lock of its training, which comes first."""
ADDRESS_KEY, SHA256_KEY = "data", "data_sha256"
"""Keys of RUN/config.toml: address of the dataset, credentials replaced by stars, and SHA-256 of
its manifest. Older runs lack the first."""


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
    try:
        found = tomllib.loads((run / RECORD).read_text(encoding="utf-8")).get(ADDRESS_KEY)
    except (OSError, ValueError):  # of a damaged file, too: whoever needs its settings reports it
        return ""
    return found if isinstance(found, str) else ""
