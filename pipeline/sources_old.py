"""Where pictures come from: folders and tars, read where they lie, never unpacked.

A source is one of

    SRC/<class>/**/*.jpg        a folder per class (nested folders and links are followed)
    SRC/<class>.tar             a tar per class, as inside ILSVRC2012_img_train.tar
    SRC.tar                     one tar of such tars, or of `<class>/picture` members

Whatever it is, a picture ends as a byte range of one file, so that reading it needs no tar code.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple, cast

from pipeline.errors import UsageError

PICTURE_ENDINGS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
WHOLE_FILE = -1


class Picture(NamedTuple):
    """One candidate picture: `size` bytes at `offset` of the file `path`.

    `size` is `WHOLE_FILE` for a plain file. `name` is how messages call it.
    """

    path: str
    offset: int
    size: int
    label: int
    name: str


class Reject(NamedTuple):
    """A file that will not be packed, and why."""

    name: str
    reason: str


@dataclass
class Source:
    """What a scan found: pictures sorted by class and name, class names, files left out."""

    pictures: list[Picture]
    classes: tuple[str, ...]
    rejects: list[Reject] = field(default_factory=list)


class _Found(NamedTuple):
    path: str
    offset: int
    size: int
    name: str
    inside: str
    """Path inside the class, which orders the pictures of a class."""


def scan(source: Path, classes: Sequence[str] | None = None) -> Source:
    """List the pictures of a source without opening them.

    Args:
        source: folder or tar, as in the module's docstring.
        classes: the class list of the training split, when this is another split of the same
            set; without it the sorted class names of `source` become the list.

    Raises:
        UsageError: nothing there, no classes, a class without pictures, an unknown class, or a
            tar that cannot be read.
    """
    groups = dict(sorted(_groups(source).items()))
    if not groups:
        raise UsageError(
            f"source {source} is empty; it needs a folder (or a tar) of pictures per class"
        )
    for name in groups:
        if not name.isprintable():  # nor is a name in an encoding other than the system's
            raise UsageError(f"class name {name!r} of source {source} is no text; rename it")
    names = tuple(classes) if classes is not None else tuple(groups)
    unknown = [name for name in groups if name not in set(names)]
    if unknown:
        raise UsageError(
            f"source {source} has class {unknown[0]!r}, which the training source lacks; "
            "remove it, or add it to the training pictures"
        )
    if len(names) < 2:
        raise UsageError(f"source {source} has one class, {names[0]!r}; it needs two or more")
    labels = {name: label for label, name in enumerate(names)}
    result = Source(pictures=[], classes=names)
    for name, found in groups.items():
        before = len(result.pictures)
        for item in sorted(found, key=lambda item: item.inside):
            if Path(item.name).suffix.lower() in PICTURE_ENDINGS:
                result.pictures.append(
                    Picture(item.path, item.offset, item.size, labels[name], item.name)
                )
            else:
                result.rejects.append(Reject(item.name, "no picture: unknown file ending"))
        if len(result.pictures) == before:
            raise UsageError(
                f"class {name!r} of source {source} has no pictures; add some or remove it"
            )
    return result


def read(picture: Picture) -> bytes:
    """Return the encoded bytes of a picture.

    Raises:
        OSError: the file went away, or ends early.
    """
    with open(picture.path, "rb", buffering=0) as file:
        if picture.size == WHOLE_FILE:
            return file.read()
        data = os.pread(file.fileno(), picture.size, picture.offset)
    if len(data) != picture.size:
        raise OSError(f"{picture.path} ends inside {picture.name}")
    return data


def _groups(source: Path) -> dict[str, list[_Found]]:
    """Return class name -> what lies in it."""
    if source.is_file():
        return _tar_groups(source)
    if not source.is_dir():
        raise UsageError(f"source {source} does not exist; name a folder or a tar of pictures")
    groups: dict[str, list[_Found]] = {}
    for entry in sorted(source.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found, name = list(_walk(entry)), entry.name
        elif entry.suffix == ".tar":
            found, name = list(_tar_members(entry)), entry.stem
        elif entry.suffix.lower() in PICTURE_ENDINGS:
            raise UsageError(
                f"picture {entry} lies outside a class; put it into a folder named as its class"
            )
        else:
            continue  # a README or a list beside the classes
        if name in groups:
            raise UsageError(f"class {name!r} is both a folder and a tar in source {source}")
        groups[name] = found
    return groups


def _walk(folder: Path) -> Iterator[_Found]:
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise UsageError(f"folder {error.filename} cannot be read ({error.strerror}); mend it")

    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith("."):
                path = os.path.join(root, name)
                yield _Found(
                    os.path.abspath(path), 0, WHOLE_FILE, path, os.path.relpath(path, folder)
                )


def _tar_groups(path: Path) -> dict[str, list[_Found]]:
    """Classes of one tar: its inner tars, or the folders of its members."""
    groups: dict[str, list[_Found]] = {}
    with path.open("rb") as file:
        for member in _members(file, path):
            inside = Path(member.name)
            if inside.suffix == ".tar":
                inner = cast(IO[bytes], _Section(file, member.offset_data, member.size))
                if inside.stem in groups:
                    raise UsageError(f"tar {path} holds class {inside.stem!r} twice; merge them")
                groups[inside.stem] = [
                    _Found(
                        os.path.abspath(path),
                        member.offset_data + picture.offset_data,
                        picture.size,
                        f"{path}/{member.name}/{picture.name}",
                        picture.name,
                    )
                    for picture in _members(inner, path / member.name)
                ]
            elif inside.parent.name:
                groups.setdefault(inside.parent.name, []).append(_member(path, member))
            else:
                raise UsageError(
                    f"{path} holds {member.name} outside a class; "
                    "it needs tars or folders, one a class"
                )
    return groups


def _tar_members(path: Path) -> Iterator[_Found]:
    with path.open("rb") as file:
        for member in _members(file, path):
            yield _member(path, member)


def _member(path: Path, member: tarfile.TarInfo) -> _Found:
    return _Found(
        os.path.abspath(path),
        member.offset_data,
        member.size,
        f"{path}/{member.name}",
        member.name,
    )


def _members(file: IO[bytes], path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and not Path(member.name).name.startswith("."):
                    yield member
    except (tarfile.TarError, EOFError) as error:
        raise UsageError(
            f"tar {path} cannot be read ({error}); it must be whole and not compressed"
        ) from error


class _Section:
    """A byte range of an open file, as tarfile wants to see it (read, seek, tell)."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._place = file, start, size, 0

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = base + place
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self._place)
        count = left if count < 0 else min(count, left)
        data = os.pread(self._file.fileno(), count, self._start + self._place)
        self._place += len(data)
        return data
