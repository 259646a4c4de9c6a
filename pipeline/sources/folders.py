"""Folders of pictures: what lies in one, and every picture below it.

Nothing is opened and, where the file system tells folders from files, nothing is even looked at:
a set of fourteen million files is listed at the speed at which the kernel names them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pipeline.sources.listing import PICTURE_ENDINGS, ListingWriter, shown
from pipeline.sources.names import NO_FILE, NO_PICTURE
from pipeline.tools.errors import UsageError


class Inside(NamedTuple):
    """What lies in one folder, each list sorted; hidden names are left out."""

    folders: list[str]
    files: list[str]
    other: list[str]
    """Links that lead nowhere, devices, pipes and sockets; to open them may be unwise."""


def look_into(folder: str | Path) -> Inside:
    """Return what lies in `folder`; links count as what they lead to.

    Raises:
        UsageError: it cannot be read.
    """
    inside = Inside([], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name[0] == ".":
                    continue
                try:
                    if entry.is_file():
                        inside.files.append(entry.name)
                    elif entry.is_dir():
                        inside.folders.append(entry.name)
                    else:
                        inside.other.append(entry.name)
                except OSError:  # a link to itself, or to what we may not see
                    inside.other.append(entry.name)
    except OSError as error:
        raise UsageError(
            f"folder {shown(str(error.filename or folder))} cannot be read ({error.strerror}); "
            "mend it"
        ) from error
    for names in inside:
        names.sort()  # file systems name them in an order of their own
    return inside


def add_folder(folder: Path, class_name: str, writer: ListingWriter) -> None:
    """Add the pictures below `folder`, in a container for each folder that holds any.

    Raises:
        UsageError: a folder cannot be read.
    """
    for path, inside in _walk(os.path.abspath(folder)):
        pictures = []
        for name in inside.files:
            if name.lower().endswith(PICTURE_ENDINGS):
                pictures.append(name)
            else:
                writer.reject(f"{path}/{name}", NO_PICTURE)
        for name in inside.other:
            writer.reject(f"{path}/{name}", NO_FILE)
        if pictures:
            writer.add(writer.container("folder", path), class_name, pictures)


def _walk(top: str) -> Iterator[tuple[str, Inside]]:
    """Yield each folder once, those inside before the one that holds them."""
    # A link to the source or above it would bring the pictures of other classes in.
    above = {*Path(top).resolve().parents, *Path(top).parents}
    seen = {_identity(str(folder)) for folder in above}
    todo: list[tuple[str, Inside | None]] = [(top, None)]
    while todo:
        path, inside = todo.pop()
        if inside is not None:
            yield path, inside
            continue
        if (identity := _identity(path)) in seen:  # a link that leads back up
            continue
        seen.add(identity)
        inside = look_into(path)
        todo.append((path, inside))
        todo += [(f"{path}/{name}", None) for name in reversed(inside.folders)]


def _identity(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError as error:
        raise UsageError(
            f"folder {shown(path)} cannot be read ({error.strerror}); mend it"
        ) from error
    return status.st_dev, status.st_ino
