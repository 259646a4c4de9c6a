"""Copies the files of RUN into the store of its checkpoints, so a run survives its machines' disks.

STORE/checkpoints/                          see `cluster.checkpoint.storage`
STORE/run/config.toml, attempts.jsonl, ...  whole files
STORE/run/metrics.jsonl/000000000000-000000012345-HASH    bytes of a file that grows: an object
                                            cannot be appended to, so each checkpoint adds one
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
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
from pipeline.remote.filesystem import is_remote
from pipeline.remote.target import open_store
from pipeline.tools.files import atomic_write, is_plain_name

GROWING_FILES = (METRICS, VALIDATION, LAYERS, KERNELS, RATES)
LEADER_FILES = (MACHINE, QUARANTINE)
DRIVER_FILES = (CONFIG, ATTEMPTS)
"""Whole files, by the process that writes them: leader and driver may have different disks."""
MANUAL_RATES = "rates-applied-*.toml"
_SEGMENT_NAME = re.compile(r"(\d+)-(\d+)-([0-9a-f]+)")


class RowSegment(NamedTuple):
    """Bytes `start` to `end` of a growing file, and 16 hexadecimal digits of their SHA-256."""

    start: int
    end: int
    digest: str

    def object_name(self, name: str) -> str:
        """Return its name in the store, given that of the file."""
        return f"{name}/{self.start:012d}-{self.end:012d}-{self.digest}"


def open_mirror(run: Path, store: str) -> RunMirror | None:
    """Return the mirror of a run; None if it has no store, or one in a folder."""
    return RunMirror(run, store) if store and is_remote(store) else None


class RunMirror:
    """The copy of a run in its store; leader and driver of a job each have one for their files."""

    def __init__(self, run: Path, store: str) -> None:
        """Check the address; nothing is sent yet. Raises as `open_store`."""
        self._run, self._target = run, open_store(store, "run")
        self._sent: dict[str, int] = {}

    def begin(self) -> None:
        """Remove segments beyond the end of RUN's files, after those were cut back to a checkpoint.

        Raises:
            StoreError: the store does not answer.
        """
        for name in GROWING_FILES:
            segments = self._list_segments(name)
            kept = self._select_equal(name, segments)
            self._sent[name] = kept[-1].end if kept else 0
            self._target.remove(
                [segment.object_name(name) for segment in segments if segment not in kept]
            )

    def push(self) -> None:
        """Upload new rows of the growing files, and the leader's other files as a whole.

        Raises:
            StoreError, OSError: the store or the disk fails.
        """
        for name in GROWING_FILES:
            start = self._sent.get(name, 0)
            new = _read_bytes(self._run / name, start)
            new = new[: new.rfind(b"\n") + 1]  # the last row may be incomplete
            if new:
                segment = RowSegment(start, start + len(new), _hash(new))
                with self._target.create(segment.object_name(name)) as there:
                    there.write(new)
                self._sent[name] = segment.end
        self.push_whole([*LEADER_FILES, *(path.name for path in self._run.glob(MANUAL_RATES))])

    def push_whole(self, names: Iterable[str]) -> None:
        """Upload whole files, if they exist; raises as `push`."""
        for name in names:
            if (self._run / name).is_file():
                with self._target.create(name) as there:
                    there.write((self._run / name).read_bytes())

    def restore(self) -> list[str]:
        """Download files that RUN lacks, and growing files that differ from their copy.

        Those are of an earlier time, when the run was on this machine before.

        Returns:
            Names of the downloaded files.

        Raises:
            StoreError: the store does not answer.
        """
        fetched = []
        for name in sorted(self._target.list_files()):
            # A store is not to be trusted with any other name in RUN.
            if _is_whole_file(name) and not (self._run / name).exists():
                self.fetch(name)
                fetched.append(name)
        for name in GROWING_FILES:
            segments = select_contiguous(self._list_segments(name))
            if len(self._select_equal(name, segments)) < len(segments):
                self._write(
                    name, (self._target.read(segment.object_name(name)) for segment in segments)
                )
                fetched.append(name)
        return fetched

    def fetch(self, name: str) -> bool:
        """Download a whole file; return whether the store has it.

        Raises:
            StoreError: the store does not answer.
        """
        try:
            self._write(name, [self._target.read(name)])
        except FileNotFoundError:
            return False
        return True

    def _write(self, name: str, segments: Iterable[bytes]) -> None:
        with atomic_write(self._run / name) as file:
            for segment in segments:
                file.write(segment)

    def _list_segments(self, name: str) -> list[RowSegment]:
        names = (path.rpartition("/")[2] for path in self._target.list_files(name))
        found = filter(None, map(_SEGMENT_NAME.fullmatch, names))
        return sorted(RowSegment(int(match[1]), int(match[2]), match[3]) for match in found)

    def _select_equal(self, name: str, segments: Iterable[RowSegment]) -> list[RowSegment]:
        """Return the segments from byte 0 on that the file in RUN begins with."""
        found = []
        for segment in select_contiguous(segments):
            if _hash(_read_bytes(self._run / name, segment.start, segment.end)) != segment.digest:
                break
            found.append(segment)
        return found


def _is_whole_file(name: str) -> bool:
    is_known = name in (*LEADER_FILES, *DRIVER_FILES) or fnmatchcase(name, MANUAL_RATES)
    return is_known and is_plain_name(name)


def select_contiguous(segments: Iterable[RowSegment]) -> list[RowSegment]:
    """Return the segments, in order, that follow each other without gaps from byte 0 on."""
    found: list[RowSegment] = []
    for segment in segments:
        if segment.start == (found[-1].end if found else 0):
            found.append(segment)
    return found


def _read_bytes(path: Path, start: int, end: int | None = None) -> bytes:
    """Return bytes `start` to `end` (or all that follow) of a file; none if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else end - start)
    except FileNotFoundError:
        return b""


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
