"""Where checkpoints lie: a folder that all nodes see, or an object store.

    FOLDER/step-00000400/                  takes its name when everything in it is on the disk;
    FOLDER/step-00000400.3f9c.partial/     until then it is called so
    s3://.../checkpoints/step-00000400-3f9c/   nothing is renamed there: it is a checkpoint when it
                                               has a checkpoint.json, which is written last

A name that is being written has a token in it: a process of a start that was given up, and has not
noticed yet, cannot write into what the next one writes.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from cluster.run.folder import CHECKPOINTS, list_checkpoints
from pipeline.remote.dataset import is_remote
from pipeline.remote.filesystem import RetryPolicy
from pipeline.remote.target import StoreTarget, local_path, open_store
from pipeline.tools.files import PARTIAL, atomic_write, sync_folder

JSON = "checkpoint.json"
HURRY = RetryPolicy(attempts=3, first_delay=0.5, stall=10.0)
"""For what training waits for."""
_NAME = re.compile(r"step-(\d+)(-[0-9a-f]+)?")


class CheckpointStorage(Protocol):
    """What a run needs of the place where its checkpoints lie."""

    @property
    def address(self) -> str:
        """How messages call it."""

    def list_complete(self) -> list[str]:
        """Names of the complete checkpoints, newest first; their bytes are not looked at.

        Raises:
            OSError, DuetError: the place cannot be reached.
        """

    def begin(self, step: int, token: str) -> str:
        """Prepare for a checkpoint; returns the name under which it is written. The leader's."""

    def write(self, work: str, file: str, save: Callable[[Path], None]) -> Path:
        """Have `save` write a file of it, and put it on the disk.

        Returns:
            a local path where its bytes can be read until `upload`.
        """

    def upload(self, work: str, file: str, path: Path) -> None:
        """Bring a file that was written to where it belongs."""

    def seal(self, work: str, table: bytes) -> str:
        """Make it a checkpoint: write checkpoint.json; returns its name. The leader's."""

    def read(self, name: str, file: str) -> bytes:
        """Return a small file of a checkpoint."""

    def fetch(self, name: str, files: Sequence[str]) -> tuple[Path, object]:
        """Return a local folder with these files of a checkpoint, there as long as the object."""

    def remove(self, name: str) -> None:
        """Remove a checkpoint, or what was begun."""

    def prepare(self) -> None:
        """Make the place ready to be written to. The leader's, before anything is begun."""

    def remove_unfinished(self, step: int) -> None:
        """Remove what was begun up to `step` and never sealed: crashes leave that. The leader's,
        while nothing of that step is being written."""


def open_storage(run: Path, store: str) -> CheckpointStorage:
    """Return where the checkpoints of a run lie: in its folder, or in `store` if that is given.

    Raises:
        UsageError: no folder, and no address of an object store.
        SetupError: the package for its scheme is not installed.
    """
    if is_remote(store):
        return RemoteStorage(open_store(store, CHECKPOINTS))
    return LocalStorage((local_path(store) if store else run) / CHECKPOINTS)


def find_last_step(run: Path, store: str) -> int:
    """Step of the newest checkpoint of a run; 0 if there is none. Its bytes are not looked at.

    Raises:
        OSError, DuetError: the place cannot be reached.
    """
    return next((parse_step(name) for name in open_storage(run, store).list_complete()), 0)


def is_checkpoint(name: str) -> bool:
    """Whether a folder of this name is a checkpoint, or would be."""
    return _NAME.fullmatch(name) is not None


def parse_step(name: str) -> int:
    """Return the step in a checkpoint's name."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


class LocalStorage:
    """Checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def address(self) -> str:
        """The folder."""
        return str(self._folder)

    def list_complete(self) -> list[str]:
        """Names of the complete ones, newest first."""
        return [path.name for path in list_checkpoints(self._folder)]

    def begin(self, step: int, token: str) -> str:
        """Make a folder to write in.

        Raises:
            FileNotFoundError: on a disk that has gone meanwhile, nothing must be begun anew.
        """
        work = f"step-{step:08d}.{token}{PARTIAL}"
        (self._folder / work).mkdir()
        return work

    def write(self, work: str, file: str, save: Callable[[Path], None]) -> Path:
        """Write a file at its place."""
        path = self._folder / work / file
        save(path)
        with path.open("rb") as written:
            os.fsync(written.fileno())
        return path

    def upload(self, work: str, file: str, path: Path) -> None:
        """It is there."""

    def seal(self, work: str, table: bytes) -> str:
        """Write checkpoint.json, and give the folder its name."""
        with atomic_write(self._folder / work / JSON) as file:
            file.write(table)
        final = self._folder / work.split(".")[0]
        if final.exists():  # a damaged one that was passed over
            self.remove(final.name)
        (self._folder / work).rename(final)
        sync_folder(self._folder)
        return final.name

    def read(self, name: str, file: str) -> bytes:
        """Return a file."""
        return (self._folder / name / file).read_bytes()

    def fetch(self, name: str, files: Sequence[str]) -> tuple[Path, object]:
        """Return the folder of the checkpoint itself."""
        return self._folder / name, None

    def remove(self, name: str) -> None:
        """Remove the folder; one that is removed by half does not look like a checkpoint."""
        path = self._folder / name
        if not name.endswith(PARTIAL):
            path = path.rename(path.with_name(f"{name}.{secrets.token_hex(4)}{PARTIAL}"))
        shutil.rmtree(path, ignore_errors=True)

    def prepare(self) -> None:
        """Make the folder, and make room. What it lies in must be there."""
        self._folder.mkdir(exist_ok=True)
        for left in self._folder.glob(f"step-*{PARTIAL}/"):
            shutil.rmtree(left, ignore_errors=True)

    def remove_unfinished(self, step: int) -> None:
        """Remove folders that were begun and never took their names."""
        for left in self._folder.glob(f"step-*{PARTIAL}/"):
            number = left.name[5:].split(".")[0]
            if number.isdecimal() and int(number) <= step:
                shutil.rmtree(left, ignore_errors=True)


class RemoteStorage:
    """Checkpoints in an object store."""

    def __init__(self, target: StoreTarget) -> None:
        self._target = target

    @property
    def address(self) -> str:
        """The address, without secrets."""
        return self._target.address

    def _all(self) -> dict[str, set[str]]:
        """Files of each checkpoint, complete or not."""
        found: dict[str, set[str]] = {}
        for path in self._target.list_files():
            name, _, file = path.partition("/")
            if _NAME.fullmatch(name):
                found.setdefault(name, set()).add(file)
        return found

    def list_complete(self) -> list[str]:
        """Names of those with a checkpoint.json, newest first."""
        complete = [name for name, files in self._all().items() if JSON in files]
        return sorted(complete, key=lambda name: (parse_step(name), name), reverse=True)

    def begin(self, step: int, token: str) -> str:
        """There is nothing to prepare."""
        return f"step-{step:08d}-{token}"

    def write(self, work: str, file: str, save: Callable[[Path], None]) -> Path:
        """Write a temporary file on this node."""
        folder = Path(tempfile.mkdtemp(prefix="duet-save-"))
        try:
            save(folder / file)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"{error}, in {folder.parent} (TMPDIR names another)") from error
        return folder / file

    def upload(self, work: str, file: str, path: Path) -> None:
        """Upload it."""
        name, size = f"{work}/{file}", path.stat().st_size
        try:
            self._target.request(
                name, lambda system, there: system.put_file(str(path), there), "written", size
            )
        finally:
            shutil.rmtree(path.parent, ignore_errors=True)

    def seal(self, work: str, table: bytes) -> str:
        """Upload checkpoint.json."""
        with replace(self._target, policy=HURRY).create(f"{work}/{JSON}") as file:
            file.write(table)
        return work

    def read(self, name: str, file: str) -> bytes:
        """Download a small file."""
        return self._target.read(f"{name}/{file}")

    def fetch(self, name: str, files: Sequence[str]) -> tuple[Path, object]:
        """Download files into a temporary folder."""
        folder = tempfile.TemporaryDirectory(prefix="duet-checkpoint-")
        for file in files:
            self._download(f"{name}/{file}", Path(folder.name) / file)
        return Path(folder.name), folder

    def _download(self, name: str, local: Path) -> None:
        size = self._target.size(name)
        if size is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        self._target.request(
            name, lambda system, there: system.get_file(there, str(local)), "read", size
        )

    def remove(self, name: str) -> None:
        """Remove its files, checkpoint.json first: half of a checkpoint is none."""
        self._target.remove([f"{name}/{JSON}"])
        self._target.clear(name)

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def remove_unfinished(self, step: int) -> None:
        """Remove files of checkpoints that were begun and never sealed."""
        for name, files in self._all().items():
            if JSON not in files and parse_step(name) <= step:
                self._target.clear(name)
