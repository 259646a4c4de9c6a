"""Places of checkpoints: a folder that all nodes see, or an object store.

    FOLDER/step-00000400/                  renamed to this when everything in it is on the disk
    FOLDER/step-00000400.3f9c.partial/     its name until then
    s3://.../checkpoints/step-00000400-3f9c/   a store cannot rename: it is a checkpoint when it has
                                               a checkpoint.json, which is written last

A name that is being written has a random token in it, so a process of a start that was given up
cannot write into the files of the next one.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from cluster.run.folder import CHECKPOINTS, list_checkpoints, read_last_step
from pipeline.dataset.record import LOCK
from pipeline.remote.filesystem import RetryPolicy, is_remote, local_path
from pipeline.remote.lease import Lease, lock_folder
from pipeline.remote.target import StoreTarget, open_store
from pipeline.tools.files import PARTIAL, atomic_write, ensure_writable, sync_path

JSON = "checkpoint.json"
HURRY = RetryPolicy(attempts=3, first_delay=0.5, stall=10.0)
"""Tries and timeouts of requests that training waits for."""
_NAME = re.compile(r"step-(\d+)(-[0-9a-f]+)?")


class CheckpointStorage(Protocol):
    """A folder or an address with the checkpoints of a run."""

    @property
    def address(self) -> str:
        """Path or URL for messages, credentials removed."""

    def list_complete(self) -> list[str]:
        """Return the names of the complete checkpoints, newest first; files are not opened.

        Raises:
            OSError, DuetError: the place cannot be reached.
        """

    def begin(self, step: int, token: str) -> str:
        """Prepare a new checkpoint; return the name under which it is written. Leader only."""

    def write(self, work: str, file: str, save: Callable[[Path], None]) -> Path:
        """Write a file of it with `save(path)`, durably.

        Returns:
            Local path of the file, which exists until `upload`.
        """

    def upload(self, work: str, file: str, path: Path) -> None:
        """Move a written file to its final place."""

    def seal(self, work: str, table: bytes) -> str:
        """Complete the checkpoint: write checkpoint.json; return its name. Leader only."""

    def read(self, name: str, file: str) -> bytes:
        """Return the content of a small file of a checkpoint."""

    def fetch(self, name: str, files: Sequence[str]) -> tuple[Path, object]:
        """Return a local folder with these files, and an object that keeps the folder."""

    def remove(self, name: str) -> None:
        """Remove a checkpoint, complete or not."""

    def prepare(self) -> None:
        """Make the place ready for writing. Leader only, before any `begin`."""

    def remove_unfinished(self, step: int) -> None:
        """Remove incomplete checkpoints up to `step`, which crashes leave behind.

        Leader only, while nothing of that step is being written.
        """


def open_storage(run: Path, store: str) -> CheckpointStorage:
    """Return the storage of a run's checkpoints: in its folder, or in `store` if that is given.

    Raises:
        UsageError: `store` is neither a folder nor an address of an object store.
        SetupError: the package for its scheme is not installed.
    """
    if is_remote(store):
        return RemoteStorage(open_store(store, CHECKPOINTS))
    return LocalStorage((local_path(store) if store else run) / CHECKPOINTS)


def open_named(address: str) -> tuple[CheckpointStorage, str, str] | None:
    """Return the storage of one checkpoint, the storage's address, and the checkpoint's name.

    Args:
        address: folder of the checkpoint (`RUN/checkpoints/step-00000400`), a file in it, or its
            address in a store.

    Returns:
        None if the address is not that of a checkpoint; whether it is there is not looked at.

    Raises:
        UsageError, SetupError: as `open_storage`.
    """
    if is_remote(address):
        base, _, name = address.rstrip("/").rpartition("/")
        return (RemoteStorage(open_store(base)), base, name) if is_checkpoint(name) else None
    path = local_path(address)
    if path.is_file():
        path = path.parent
    if not is_checkpoint(path.name):
        return None
    return LocalStorage(path.parent), str(path.parent), path.name


@contextmanager
def claim_store(run: Path, store: str, run_id: str, say: Callable[[str], None]) -> Iterator[None]:
    """Keep other trainings away from a run's store during the block; a folder is created.

    `pipeline.remote.lease` says how the claim of a dead process is told from a good one.

    Args:
        run: folder of the run, locked by the caller.
        store: the run's setting of that name.
        run_id: name of the run.
        say: gets a line if the claim of the run's former process is waited for.

    Raises:
        UsageError: another training holds the store, or its folder cannot be written.
    """
    owner = f"run {run_id}"
    if is_remote(store):
        with Lease(open_store(store), "claim", "training", owner, say):
            yield
        return
    folder = local_path(store) if store else run
    # A folder that is gone from under a run is not made again: its disk may be away.
    if folder == run or (not folder.is_dir() and read_last_step(run)):
        yield
        return
    with lock_folder(ensure_writable(folder, "store"), LOCK, "training", owner):
        yield


def find_last_step(run: Path, store: str) -> int:
    """Return the step of a run's newest checkpoint, 0 if there is none; its files are not opened.

    Raises:
        OSError, DuetError: the place cannot be reached.
    """
    return next((parse_step(name) for name in open_storage(run, store).list_complete()), 0)


def is_checkpoint(name: str) -> bool:
    """Return whether a name is that of a checkpoint."""
    return _NAME.fullmatch(name) is not None


def parse_step(name: str) -> int:
    """Return the step in a checkpoint's name."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return int(match[1])


class LocalStorage:
    """Checkpoints in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.address = folder, str(folder)

    def list_complete(self) -> list[str]:
        """See `CheckpointStorage`."""
        return [path.name for path in list_checkpoints(self._folder)]

    def begin(self, step: int, token: str) -> str:
        """Create the folder to write in.

        Raises:
            FileNotFoundError: the parent folder is gone, as on a disk that was unmounted.
        """
        work = f"step-{step:08d}.{token}{PARTIAL}"
        (self._folder / work).mkdir()
        return work

    def write(self, work: str, file: str, save: Callable[[Path], None]) -> Path:
        """See `CheckpointStorage`; the file is written in its final place."""
        path = self._folder / work / file
        save(path)
        with path.open("rb") as written:
            os.fsync(written.fileno())
        return path

    def upload(self, work: str, file: str, path: Path) -> None:
        """No-op: the file was written in place."""

    def seal(self, work: str, table: bytes) -> str:
        """Write checkpoint.json, then rename the folder."""
        with atomic_write(self._folder / work / JSON) as file:
            file.write(table)
        final = self._folder / work.split(".")[0]
        if final.exists():  # a damaged one that was skipped
            self.remove(final.name)
        (self._folder / work).rename(final)
        sync_path(self._folder)
        return final.name

    def read(self, name: str, file: str) -> bytes:
        """See `CheckpointStorage`."""
        return (self._folder / name / file).read_bytes()

    def fetch(self, name: str, files: Sequence[str]) -> tuple[Path, object]:
        """Return the folder of the checkpoint itself."""
        return self._folder / name, None

    def remove(self, name: str) -> None:
        """Rename the folder, then remove it: a half-removed one does not look complete."""
        path = self._folder / name
        if not name.endswith(PARTIAL):
            path = path.rename(path.with_name(f"{name}.{secrets.token_hex(4)}{PARTIAL}"))
        shutil.rmtree(path, ignore_errors=True)

    def prepare(self) -> None:
        """Create the folder, whose parent must exist, and remove partial checkpoints."""
        self._folder.mkdir(exist_ok=True)
        for left in self._folder.glob(f"step-*{PARTIAL}/"):
            shutil.rmtree(left, ignore_errors=True)

    def remove_unfinished(self, step: int) -> None:
        """See `CheckpointStorage`."""
        for left in self._folder.glob(f"step-*{PARTIAL}/"):
            number = left.name[5:].split(".")[0]
            if number.isdecimal() and int(number) <= step:
                shutil.rmtree(left, ignore_errors=True)


class RemoteStorage:
    """Checkpoints in an object store."""

    def __init__(self, target: StoreTarget) -> None:
        self._target, self.address = target, target.address

    def _list_all(self) -> dict[str, set[str]]:
        """Return the files of each checkpoint, complete or not."""
        found: dict[str, set[str]] = {}
        for path in self._target.list_files():
            name, _, file = path.partition("/")
            if _NAME.fullmatch(name):
                found.setdefault(name, set()).add(file)
        return found

    def list_complete(self) -> list[str]:
        """See `CheckpointStorage`."""
        complete = [name for name, files in self._list_all().items() if JSON in files]
        return sorted(complete, key=lambda name: (parse_step(name), name), reverse=True)

    def begin(self, step: int, token: str) -> str:
        """No-op: a store has no folders."""
        return f"step-{step:08d}-{token}"

    def write(self, work: str, file: str, save: Callable[[Path], None]) -> Path:
        """See `CheckpointStorage`; the file is a temporary one of this node."""
        folder = Path(tempfile.mkdtemp(prefix="duet-save-"))
        try:
            save(folder / file)
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"{error}, in {folder.parent} (TMPDIR names another)") from error
        return folder / file

    def upload(self, work: str, file: str, path: Path) -> None:
        """Upload the file and remove the local one."""
        try:
            self._target.upload(path, f"{work}/{file}")
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
            self._target.download(f"{name}/{file}", Path(folder.name) / file)
        return Path(folder.name), folder

    def remove(self, name: str) -> None:
        """Remove checkpoint.json first: a half-removed checkpoint is not complete."""
        self._target.remove([f"{name}/{JSON}"])
        self._target.clear(name)

    def prepare(self) -> None:
        """No-op: a store has no folders."""

    def remove_unfinished(self, step: int) -> None:
        """See `CheckpointStorage`."""
        for name, files in self._list_all().items():
            if JSON not in files and parse_step(name) <= step:
                self._target.clear(name)
