"""Where OUT is: files that are whole or not there, in a folder of this machine or one it mounts.

`cluster.build_shards` brings another `Target`, for stores. Names are relative, with `/` between.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.tools.errors import UsageError
from pipeline.tools.files import PARTIAL, sealed, writable_folder

WORK = ".build"
"""Folder in OUT for what a build needs to go on; gone when the set is finished."""


class Piece(NamedTuple):
    """A byte range of a file."""

    name: str
    offset: int
    size: int


class Target(Protocol):
    """A place for a data set. Pickled to workers; many may write different files at a time."""

    @property
    def address(self) -> str:
        """How messages call it."""

    def create(self, name: str, *, durable: bool = True) -> AbstractContextManager[IO[bytes]]:
        """Write a file that takes its name only when the block ends well.

        Args:
            name: relative to the target; folders in it are made.
            durable: whether the file must survive a loss of power (all survive `kill -9`).
        """

    def read(self, name: str) -> bytes:
        """Return a whole small file.

        Raises:
            FileNotFoundError: it is not there.
        """

    def pieces(self, pieces: Sequence[Piece]) -> Iterator[bytes]:
        """Read many byte ranges, in the order asked for; a short one is a file that is too short.

        Raises:
            FileNotFoundError: one of the files is not there.
        """

    def names(self, folder: str = "") -> set[str]:
        """Return the names (with folders) of all whole files below `folder`."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None if it is not there."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are no matter."""

    def clear(self, folder: str) -> None:
        """Remove a folder with all that is in it."""

    def scratch(self) -> AbstractContextManager[Path]:
        """Give a local folder for what a build finds out, for as long as the block runs."""

    def claimed(self) -> AbstractContextManager[None]:
        """Hold the target for one build.

        Raises:
            UsageError: it cannot be written, holds what is no part of an unfinished build, or
                another build holds it.
        """


@dataclass(frozen=True)
class Folder:
    """A `Target` in a folder."""

    address: str

    @property
    def path(self) -> Path:
        """The folder."""
        return Path(self.address)

    @contextmanager
    def create(self, name: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
        """Write a file; see `Target`."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)  # not its parents: OUT may have been deleted under us
        with sealed(path, durable=durable) as file:
            yield file

    def read(self, name: str) -> bytes:
        """Return a whole small file; see `Target`."""
        return (self.path / name).read_bytes()

    def pieces(self, pieces: Sequence[Piece]) -> Iterator[bytes]:
        """Read many byte ranges; see `Target`."""
        for name, offset, size in pieces:
            descriptor = os.open(self.path / name, os.O_RDONLY)
            try:
                yield os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)

    def names(self, folder: str = "") -> set[str]:
        """Return the names of all whole files; see `Target`."""
        found = set()
        for root, _, files in os.walk(self.path / folder):
            below = Path(root).relative_to(self.path)
            found |= {str(below / file) for file in files if not file.endswith(PARTIAL)}
        return found

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None; see `Target`."""
        path = self.path / name
        return path.stat().st_size if path.is_file() else None

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; see `Target`."""
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def clear(self, folder: str) -> None:
        """Remove a folder; see `Target`."""
        shutil.rmtree(self.path / folder, ignore_errors=True)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder for one build; see `Target`."""
        writable_folder(self.path, "data set folder")
        work = self.path / WORK
        if not work.is_dir() and (strangers := sorted(os.listdir(self.path))):
            raise UsageError(
                f"{self.path} holds {strangers[0]}, which is no part of an unfinished data set; "
                "name an empty folder"
            )
        work.mkdir(exist_ok=True)
        with (work / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"{self.path} is being built by another process; wait for it, "
                    "or name another folder"
                ) from error
            self._tidy()
            try:
                yield
            finally:
                self._tidy()
                if work.is_dir() and os.listdir(work) == ["lock"]:  # nothing was begun
                    self.clear(WORK)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give a local folder; see `Target`."""
        folder = self.path / WORK / "plan"
        shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _tidy(self) -> None:
        """Remove what a killed build, or a worker of this one, was writing."""
        for folder in (self.path, *(path for path in (self.path / WORK).rglob("*"))):
            if folder.is_dir():
                for partial in folder.glob(f"*{PARTIAL}"):
                    partial.unlink(missing_ok=True)


def finished(target: Target) -> bool:
    """Say whether a target holds a finished set (the manifest is written last)."""
    return target.size(MANIFEST) is not None
