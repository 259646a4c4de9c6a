"""Lists tars of images: one a class, a tar of such tars, or folders in a tar.

The images of a tar inside a tar are byte ranges of the outer one, so nothing is unpacked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipeline.dataset.tar import Member, TarFault, escape, read_members
from pipeline.sources.listing import Kind, ListingWriter
from pipeline.sources.names import (
    HIDDEN,
    describe_no_image,
    describe_special,
    is_archive,
    is_document,
    is_hidden,
    is_image,
    is_system,
    is_tar,
)
from pipeline.sources.paths import open_file
from pipeline.tools.errors import (
    SYSTEM_ERRORS,
    DamagedSource,
    DuetError,
    UsageError,
    summarize_error,
)

BATCH = 1 << 14
"""Images added to the listing at a time; memory does not grow with the tar."""


class ImageBuffer:
    """Buffers images of one container for the listing."""

    def __init__(self, writer: ListingWriter, kind: Kind, address: str) -> None:
        self.writer, self.address = writer, address
        self._container = writer.container(kind, address)
        self._images: list[tuple[str, str, int, int]] = []

    def add(self, class_name: str, name: str, place: int, size: int) -> None:
        """Add an image."""
        self._images.append((class_name, name, place, size))
        if len(self._images) >= BATCH:
            self.flush()

    def flush(self) -> None:
        """Add the buffered images to the listing."""
        if self._images:
            classes, names, places, sizes = zip(*self._images, strict=True)
            self.writer.add(self._container, classes, names, places, sizes, replace=True)
            self._images.clear()

    def reject(self, name: str, reason: str) -> None:
        """Reject a file of the container."""
        self.writer.reject(f"{self.address}/{name}", reason)

    @contextmanager
    def until_fault(self) -> Iterator[None]:
        """Flush the images of the block, which may end where the container is damaged."""
        try:
            yield
        except DamagedSource as error:
            self.flush()
            self.writer.add_fault(error, self.address)
        self.flush()


def add_class_tar(path: Path, class_name: str, writer: ListingWriter) -> None:
    """Add the images of a tar that is one class, whatever folders they lie in."""
    address = os.path.abspath(path)
    found = ImageBuffer(writer, "tar", address)
    with found.until_fault(), open_tar(address) as file:
        _add_all(read_members(file, address, lenient=True), "", class_name, found)


def add_tar(path: Path, writer: ListingWriter) -> None:
    """Add the images of one tar that holds a tar or a folder per class.

    Raises:
        UsageError: an image lies outside a class, or an archive beside the classes.
    """
    address = os.path.abspath(path)
    found = ImageBuffer(writer, "tar", address)
    inner: set[str] = set()
    packed: str | None = None
    folder, class_name, above = "", "", ""
    with found.until_fault(), open_tar(address) as file:
        for member in select_files(_read_outer(file, inner, found), found):
            name = member.name
            at = name.rfind("/") + 1
            if is_tar(name):
                _add_inner(file, member, inner, found)
                continue
            if name[:at] != folder:  # members of a class mostly follow one another
                folder, class_name = name[:at], get_class(name)
            if is_archive(name) and (packed is None or not class_name):
                packed = name
            if class_name == "..":
                found.reject(name, "no class: its folder is `..`")
            elif not is_image(name):
                if class_name or not is_document(name):  # else a README beside the classes
                    found.reject(name, describe_no_image(name))
            elif class_name:
                above = _check_parent(address, name, above)
                found.add(class_name, name, member.offset, member.size)
            else:
                raise UsageError(
                    f"{escape(address)} holds {escape(name)} outside a class; "
                    "it needs tars or folders, one a class"
                )
    # Beside tars that are classes it may be one, too; inside a class it is a reject.
    if packed is not None and (inner or not get_class(packed)):
        raise UsageError(
            f"tar {escape(address)} holds {escape(packed)}, an archive that is not looked into; "
            "put a plain .tar in its place if it is a class, else remove it"
        )


def _read_outer(file: BinaryIO, inner: set[str], found: ImageBuffer) -> Iterator[Member]:
    """Yield the members of a tar of classes; one that ends inside a class has a part of it."""
    try:
        yield from read_members(file, found.address, lenient=True)
    except TarFault as fault:
        cut = fault.cut
        if cut is None or not is_tar(cut.name) or is_hidden(cut.name) or is_system(cut.name):
            raise
        faults = len(found.writer.faults)
        _add_inner(file, cut, inner, found, end=fault.offset + fault.lost)
        if len(found.writer.faults) == faults:  # no byte of its own is missing
            raise


def _add_inner(
    file: BinaryIO, outer: Member, known: set[str], found: ImageBuffer, end: int | None = None
) -> None:
    """Add the images of a tar inside a tar: one class; of one that is cut at `end`, if any."""
    class_name = outer.name.rpartition("/")[2][:-4]
    if class_name in known:
        raise UsageError(
            f"tar {escape(found.address)} holds class {class_name!r} twice; merge them"
        )
    known.add(class_name)
    if end is None:
        found.writer.need_class(class_name)
    stop = outer.offset + outer.size
    name = f"{found.address}/{outer.name}"
    with found.until_fault():
        inside = read_members(file, name, outer.offset, end or stop, lenient=True)
        try:
            _add_all(inside, f"{outer.name}/", class_name, found)
        except TarFault as fault:
            fault.lost = stop - fault.offset  # it had that size, whatever is there
            raise


def _check_parent(address: str, name: str, known: str) -> str:
    """Return the folder that an image's class lies in (with a slash), the same for all classes.

    Raises:
        UsageError: it is another: which of the folders is the class, nobody knows.
    """
    above = "/" + "/".join(part for part in _split_folders(name)[:-1] if part != "..")
    if known and above != known:
        raise UsageError(
            f"tar {escape(address)} has classes in {escape(known)} and in {escape(above)} "
            f"({escape(name)}); unpack it, or put all class folders into one"
        )
    return above


def _split_folders(name: str) -> list[str]:
    return [part for part in name.split("/")[:-1] if part not in ("", ".")]


def get_class(name: str) -> str:
    """Return the folder that a member lies in, "" if in none, ".." if its path has only that."""
    return (_split_folders(name) or [""])[-1]


def open_tar(address: str) -> BinaryIO:
    """Open a tar on a disk or in a store, unbuffered.

    Raises:
        DamagedSource: it is on a disk, and cannot be opened.
        OSError: for a reason of the process or the machine; of a store, `Unreachable`.
    """
    try:
        return open_file(address)
    except DuetError:
        raise
    except OSError as error:
        if error.errno in SYSTEM_ERRORS:
            raise
        why = summarize_error(error)
        message = f"tar {escape(address)} cannot be read ({why}); mend it"
        raise DamagedSource(message, address, 0, f"it cannot be opened: {why}") from error


def select_files(
    members: Iterator[Member], found: ImageBuffer, prefix: str = ""
) -> Iterator[Member]:
    """Yield the regular files; an image that is hidden or a link is rejected."""
    for member in members:
        if is_system(member.name):
            continue
        if is_hidden(member.name):
            if is_image(member.name) or is_archive(member.name):
                found.reject(prefix + member.name, HIDDEN)
        elif member.regular:
            yield member
        elif is_image(member.name):
            found.reject(prefix + member.name, describe_special(member))


def _add_all(inside: Iterator[Member], prefix: str, class_name: str, found: ImageBuffer) -> None:
    """Add all members of a tar that is one class."""
    for name, offset, size, *_ in select_files(inside, found, prefix):
        if is_image(name):
            found.add(class_name, prefix + name, offset, size)
        else:
            found.reject(prefix + name, describe_no_image(name))
