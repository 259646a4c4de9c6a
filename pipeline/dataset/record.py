"""Record of its dataset in the folder of a run: RUN/config.toml has its address and its hash."""

from __future__ import annotations

import tomllib
from pathlib import Path

RECORD = "config.toml"
ADDRESS_KEY, SHA256_KEY = "data", "data_sha256"
"""Keys of RUN/config.toml: address of the dataset, credentials replaced by stars, and SHA-256 of
its manifest. Older runs lack the first."""


def read_address(run: Path) -> str:
    """Return the address of a run's dataset as it was recorded; "" if there is no record."""
    try:
        found = tomllib.loads((run / RECORD).read_text(encoding="utf-8")).get(ADDRESS_KEY)
    except (OSError, ValueError):  # of a damaged file, too: whoever needs its settings reports it
        return ""
    return found if isinstance(found, str) else ""
