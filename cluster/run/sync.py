"""A copy of RUN's rows beside the checkpoints in a store: a run that outlives its machines' disks.

STORE/checkpoints/                          checkpoint_places.py
STORE/run/config.toml, attempts.jsonl, ...  whole files
STORE/run/metrics.jsonl/000000000000-000000012345-HASH    bytes of a file that grows: nothing
                                            can be added to an object, so each save adds one
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from cluster.run.folder import (
    ATTEMPTS,
    CONFIG,
    KERNELS,
    LAYERS,
    MACHINE,
    METRICS,
    QUARANTINE,
    RATES,
    VALIDATION,
)
from pipeline.remote.dataset import is_remote
from pipeline.remote.target import open_store
from pipeline.tools.files import atomic_write

GROWING_FILES = (METRICS, VALIDATION, LAYERS, KERNELS, RATES)
LEADER_FILES = (MACHINE, QUARANTINE)
DRIVER_FILES = (CONFIG, ATTEMPTS)
"""Whole files, by who writes them: leader and driver may have different disks."""
BY_HAND = "rates-applied-*.toml"
PART = re.compile(r"(\d+)-(\d+)-([0-9a-f]+)")


class RowSegment(NamedTuple):
    """Bytes `start` to `end` of a file that grows, and the beginning of their SHA-256."""

    start: int
    end: int
    digest: str

    def of(self, name: str) -> str:
        """Its name in the store."""
        return f"{name}/{self.start:012d}-{self.end:012d}-{self.digest}"


def open_mirror(run: Path, store: str) -> RunMirror | None:
    """Return the mirror of a run; None if it has no store, or one that is a folder."""
    return RunMirror(run, store) if store and is_remote(store) else None


class RunMirror:
    """The copy; the leader of a job has one, and the driver another for the files it writes."""

    def __init__(self, run: Path, store: str) -> None:
        """Take the address; nothing is sent yet. Raises as `bucket_of`."""
        self._run, self._target = run, open_store(store, "run")
        self._sent: dict[str, int] = {}

    def begin(self) -> None:
        """Cut the copies down to what is there: call it when RUN's rows were cut to a checkpoint.

        Raises:
            StoreError: the store does not answer.
        """
        for name in GROWING_FILES:
            parts = self._parts(name)
            kept = self._same(name, parts)
            self._sent[name] = kept[-1].end if kept else 0
            self._target.remove([part.of(name) for part in parts if part not in kept])

    def push(self) -> None:
        """Send what is new in the rows, and whole what else the leader writes.

        Raises:
            StoreError, OSError: the store, or the disk.
        """
        for name in GROWING_FILES:
            start = self._sent.get(name, 0)
            new = _bytes(self._run / name, start)
            new = new[: new.rfind(b"\n") + 1]  # the last row may be half written
            if new:
                part = RowSegment(start, start + len(new), _digest(new))
                with self._target.create(part.of(name)) as there:
                    there.write(new)
                self._sent[name] = part.end
        self.push_whole([*LEADER_FILES, *(path.name for path in self._run.glob(BY_HAND))])

    def push_whole(self, names: Iterable[str]) -> None:
        """Send whole files, as far as they are there; raises as `push`."""
        for name in names:
            if (self._run / name).is_file():
                with self._target.create(name) as there:
                    there.write((self._run / name).read_bytes())

    def restore(self) -> list[str]:
        """Fill RUN with what it lacks; rows that do not continue their copy give way to it.

        Such rows are of an earlier time, when the run was on this machine before.

        Returns:
            names of the files that were fetched.

        Raises:
            StoreError: the store does not answer.
        """
        fetched = []
        for name in sorted(self._target.list_files()):
            if "/" not in name and not (self._run / name).exists():
                self._write(name, [self._target.read(name)])
                fetched.append(name)
        for name in GROWING_FILES:
            parts = select_contiguous(self._parts(name))
            if len(self._same(name, parts)) < len(parts):
                self._write(name, (self._target.read(part.of(name)) for part in parts))
                fetched.append(name)
        return fetched

    def _write(self, name: str, parts: Iterable[bytes]) -> None:
        with atomic_write(self._run / name) as file:
            for part in parts:
                file.write(part)

    def _parts(self, name: str) -> list[RowSegment]:
        found = []
        for path in self._target.list_files(name):
            if match := PART.fullmatch(path.rpartition("/")[2]):
                found.append(RowSegment(int(match[1]), int(match[2]), match[3]))
        return sorted(found)

    def _same(self, name: str, parts: Iterable[RowSegment]) -> list[RowSegment]:
        """Those from byte 0 on that the file in RUN begins with."""
        found = []
        for part in select_contiguous(parts):
            if _digest(_bytes(self._run / name, part.start, part.end)) != part.digest:
                break
            found.append(part)
        return found


def select_contiguous(parts: Iterable[RowSegment]) -> list[RowSegment]:
    """Return the parts, in their order, that follow each other from byte 0 on."""
    found: list[RowSegment] = []
    for part in parts:
        if part.start == (found[-1].end if found else 0):
            found.append(part)
    return found


def _bytes(path: Path, start: int, end: int | None = None) -> bytes:
    """Some bytes of a file; none if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)
    except FileNotFoundError:
        return b""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
