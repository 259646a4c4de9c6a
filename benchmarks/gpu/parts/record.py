"""The results: a JSON file and a table, whole on the disk after each measurement."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from parts.table import markdown
from pipeline.tools.files import atomic_write, ensure_writable


class Record:
    """Everything found so far. A process that is cut off loses what it was measuring, no more."""

    def __init__(self, out: Path, machine: dict[str, Any], command: str) -> None:
        """Name the two files by date and device.

        Raises:
            UsageError: the folder cannot be written.
        """
        ensure_writable(out, "results folder")
        name = re.sub(r"[^a-z0-9]+", "-", str(machine.get("gpu", "cpu")).lower()).strip("-")
        self.path = out / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{name}.json"
        self.found: dict[str, Any] = {"command": command, "machine": machine, "finished": False}

    def put(self, step: str, found: Any) -> None:
        """Set what a step has found so far."""
        self.found[step] = found
        self._save()

    def add(self, step: str, row: dict[str, Any]) -> None:
        """Add a row to what a step has found."""
        self.found.setdefault(step, []).append(row)
        self._save()

    def _save(self) -> None:
        with atomic_write(self.path) as file:
            file.write((json.dumps(self.found, indent=1) + "\n").encode())
        with atomic_write(self.path.with_suffix(".md")) as file:
            file.write(markdown(self.found).encode())
