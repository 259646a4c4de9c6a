"""A copy of RUN's rows beside the checkpoints in a store: a run that outlives its machines' disks.

STORE/checkpoints/                          checkpoint_places.py
STORE/run/config.toml, attempts.jsonl, ...  whole files
STORE/run/metrics.jsonl/000000000000-000000012345    bytes of a file that grows: nothing can
                                            be added to an object, so each save adds one
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cluster.run_folder import ATTEMPTS, CONFIG, MACHINE, QUARANTINE
from pipeline.dataset import is_remote
from pipeline.errors import UsageError
from pipeline.files import sealed
from pipeline.packing.store_target import StoreTarget, target_for

GROWING = ("metrics.jsonl", "validation.jsonl", "layers.jsonl", "rates.jsonl")
WHOLE = (CONFIG, ATTEMPTS, MACHINE, QUARANTINE)
BY_HAND = "rates-applied-*.toml"


def mirror_of(run: Path, store: str) -> Mirror | None:
    """Return the mirror of a run; None if it has no store, or one that is a folder."""
    return Mirror(run, store) if store and is_remote(store) else None


class Mirror:
    """The copy; the leader of a job has one, and the driver another for the files it writes."""

    def __init__(self, run: Path, store: str) -> None:
        """Take the address; nothing is sent yet."""
        target = target_for(f"{store.rstrip('/')}/run")
        assert isinstance(target, StoreTarget)
        self._run, self._target = run, target
        self._sent: dict[str, int] = {}

    def begin(self) -> None:
        """Cut the copies down to what is there: call it when RUN's rows were cut to a checkpoint.

        Raises:
            StoreError: the store does not answer.
        """
        for name in GROWING:
            size = _size(self._run / name)
            parts = self._parts(name)
            kept = [part for part in contiguous(parts) if part[1] <= size]
            self._sent[name] = kept[-1][1] if kept else 0
            self._target.remove([_part(name, *part) for part in parts if part not in kept])

    def push(self) -> None:
        """Send what is new in the rows, and the other files whole.

        Raises:
            StoreError, OSError: the store, or the disk.
        """
        for name in GROWING:
            path, start = self._run / name, self._sent.get(name, 0)
            if not path.exists():
                continue
            with path.open("rb") as file:
                file.seek(start)
                new = file.read()
            new = new[: new.rfind(b"\n") + 1]  # the last row may be half written
            if new:
                with self._target.create(_part(name, start, start + len(new))) as there:
                    there.write(new)
                self._sent[name] = start + len(new)
        self.push_whole([*WHOLE, *(path.name for path in self._run.glob(BY_HAND))])

    def push_whole(self, names: Iterable[str] = WHOLE) -> None:
        """Send whole files, as far as they are there."""
        for name in names:
            if (self._run / name).is_file():
                with self._target.create(name) as there:
                    there.write((self._run / name).read_bytes())

    def restore(self) -> list[str]:
        """Fill RUN with what it lacks, and replace what is shorter than its copy.

        Returns:
            names of the files that were fetched.

        Raises:
            StoreError: the store does not answer.
        """
        there, fetched = self._target.names(), []
        for name in sorted(there):
            if "/" in name:
                continue
            if name not in GROWING and not (self._run / name).exists():
                self._write(name, [self._target.read(name)])
                fetched.append(name)
        for name in GROWING:
            parts = contiguous(self._parts(name))
            if parts and parts[-1][1] > _size(self._run / name):
                self._write(name, [self._target.read(_part(name, *part)) for part in parts])
                fetched.append(name)
        return fetched

    def _write(self, name: str, parts: Iterable[bytes]) -> None:
        with sealed(self._run / name) as file:
            for part in parts:
                file.write(part)

    def _parts(self, name: str) -> list[tuple[int, int]]:
        found = []
        for path in self._target.names(name):
            start, _, end = path.rpartition("/")[2].partition("-")
            if start.isdecimal() and end.isdecimal():
                found.append((int(start), int(end)))
        return sorted(found)


def contiguous(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the parts, (start, end) each in order, that follow each other from byte 0 on."""
    found: list[tuple[int, int]] = []
    for start, end in parts:
        if start == (found[-1][1] if found else 0):
            found.append((start, end))
    return found


def _part(name: str, start: int, end: int) -> str:
    return f"{name}/{start:012d}-{end:012d}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def check_store(store: str) -> None:
    """Refuse an address that cannot hold checkpoints.

    Raises:
        UsageError: an unknown scheme, or one where nothing can be written.
        SetupError: its package is not installed.
    """
    if not store or not is_remote(store):
        return
    if not store.partition("://")[2].strip("/"):
        raise UsageError(f"store {store} names no bucket; give one such as s3://bucket/folder")
    target_for(store)
