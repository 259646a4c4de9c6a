"""Files that are either whole or not there: write beside, fsync, rename."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from pipeline.tools.errors import UsageError

PARTIAL = ".partial"
"""Ending of a file that is being written; whatever has it may be deleted."""


@contextmanager
def sealed(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a new file for writing that takes its name only when the block ends well.

    The bytes and the rename are on the disk when the block is left, unless it need not be
    `durable`: then a loss of power may take it. If the block raises, the file of that name is
    untouched and the partial one is removed.
    """
    # Not the process's id alone: on another node one may have the same, and write the same file.
    unique = f"{secrets.token_hex(4)}.{os.getpid()}"
    partial = path.with_name(f"{path.name}.{unique}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
        if durable:
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put the names in `folder` on the disk (a rename is durable only after this)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as `sha256sum` prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def writable_folder(path: Path, what: str) -> Path:
    """Create `path` if need be and prove that a file can be written in it.

    Raises:
        UsageError: it is a file, or cannot be created or written.
    """
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise UsageError(
            f"{what} {path} is an address; name a local folder, and upload it as it is"
        )
    probe = path / f".write-test.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise UsageError(
            f"{what} {path} cannot be written ({error.strerror}); name another folder"
        ) from error
    return path
