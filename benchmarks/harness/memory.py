"""Memory of processes: what the kernel says of this one, and the peak of a reading over time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

EVERY = 0.02
"""Seconds between two readings."""


def read_memory(what: str) -> int:
    """Return bytes of this process: `VmRSS` (now), `VmHWM` (the most ever), `RssAnon` (its own)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


class MemoryPeak:
    """The greatest of many readings during a block."""

    def __init__(self, read: Callable[[], int], every: float = EVERY) -> None:
        """Name the reading, in bytes, and the seconds between two."""
        self.bytes = 0
        self._read, self._every = read, every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._read())
            if self._stop.wait(self._every):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
