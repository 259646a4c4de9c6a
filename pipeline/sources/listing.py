"""Listing of a source: one row an image, kept in mapped files, so that memory stays small.

Fourteen million images are 24 bytes and a name each; they are written out as they are found and
mapped back, so that neither the scan nor the plan grows with the set.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.dataset.samples import Classes, UnknownClasses, refuse_same_names, sort_classes
from pipeline.dataset.tar import ENCODING, escape
from pipeline.sources.faults import Faults
from pipeline.tools.errors import DamagedSource, UsageError
from pipeline.tools.jsonl import read_all_rows
from pipeline.tools.text import hide_credentials

ROW_DTYPE = np.dtype([("container", "<u4"), ("label", "<i4"), ("place", "<u8"), ("size", "<i8")])
"""An image: its container, its label, its place in the container, and its size in bytes.

`place` is an offset in a tar, a row of a parquet file, and 0 for a file in a folder. `size` is
`WHOLE_FILE` where only the container knows it."""

MEMBER_PLACE = np.dtype([("place", "<u8"), ("size", "<i8")])
"""Another member of a sample: its place in the container and its size, as in `ROW_DTYPE`."""

_HASH_DTYPE = np.dtype([("hash", "<i8"), ("row", "<u8")])
"""Hash of the container and the name of an image, and its row."""
_VALUE = re.compile(r"'[^']*'|[0-9][0-9,.]*")
"""Parts in which reasons of one kind differ."""

WHOLE_FILE = -1
DAMAGED = "damaged, and skipped from here on"
"""Beginning of the reason of a reject that stands for the rest of a damaged source."""

Kind = Literal["folder", "tar", "parquet"]


class Container(NamedTuple):
    """A folder, an uncompressed tar or a parquet file with images."""

    kind: Kind
    address: str
    """Absolute path, or an address that fsspec knows (`s3://bucket/shard.tar`)."""


class Reject(NamedTuple):
    """A file that will not be packed, and the reason; or the rest of a damaged source."""

    name: str
    reason: str
    source: str | None = None
    """The tar or parquet file that it lies in, or the source that is damaged."""
    offset: int | None = None
    """Byte in that tar, row of that parquet file."""

    def to_json_line(self) -> str:
        """Return the line of `rejects.jsonl`, without what is None."""
        row = {name: value for name, value in self._asdict().items() if value is not None}
        return json.dumps(row) + "\n"


def read_rejects(file: Path) -> Iterator[Reject]:
    """Yield the rejects in a file of such lines."""
    for row in read_all_rows(file):
        yield Reject(**{name: row[name] for name in Reject._fields if name in row})


def summarize_rejects(rejects: Iterable[Reject]) -> str:
    """Return the most frequent reason, how often it was noted, and an example."""
    counts: Counter[str] = Counter()
    first: dict[str, Reject] = {}
    for reject in rejects:
        kind = _VALUE.sub("", reject.reason)
        counts[kind] += 1
        first.setdefault(kind, reject)
    if not counts:
        return "no reason was noted"
    ((kind, count),) = counts.most_common(1)
    name, reason, *_ = first[kind]
    return f"{escape(reason)} ({count:,} {'time' if count == 1 else 'times'}, as {escape(name)})"


class Unreadable(Exception):
    """One image cannot be read from its container; the message is the reason, one line."""


class SourceReader(Protocol):
    """Reads images out of one container; fastest in the order of the listing."""

    def read(self, name: str, place: int, size: int) -> bytes:
        """Return the encoded bytes of the image with this name, place and size.

        Raises:
            Unreadable: this image cannot be read (a file without permission, an empty row); the
                container's other images can.
            OSError: the container disappeared or became shorter.
        """

    def read_member(self, field: str, name: str, place: int, size: int) -> bytes:
        """Return another member of the sample of image `name`: its `.field`; raises as `read`.

        Place and size are those of the member.
        """

    def close(self) -> None:
        """Close the container."""


class Names(Sequence[str]):
    """Names of images inside their containers, read from a mapped file."""

    def __init__(self, text: npt.NDArray[np.uint8], ends: npt.NDArray[np.uint64]) -> None:
        self.text = text
        """uint8 [bytes]: all names end to end, encoded in `ENCODING`."""
        self.ends = ends
        """uint64 [n]: end of each name in `text`."""

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        """Return the name at `place`."""
        place = int(place)
        start = int(self.ends[place - 1]) if place else 0
        return self.text[start : int(self.ends[place])].tobytes().decode(*ENCODING)


@dataclass(frozen=True)
class Listing:
    """The images of one source, in the order in which they are best read."""

    source: str
    """Path or address as the user named it."""
    containers: tuple[Container, ...]
    rows: npt.NDArray[np.void]
    """`ROW_DTYPE` [n]"""
    names: Names
    """Name of each image inside its container; messages use `full_name`."""
    members: npt.NDArray[np.void]
    """`MEMBER_PLACE` [n, fields]: places of the other members of each sample."""
    classes: tuple[str, ...]
    """A label is a place in this list; empty without labels, which are -1 then."""
    titles: tuple[str, ...] | None
    """Readable names of the classes, if the source has them."""
    rejects_file: Path
    rejected: int
    """Number of files that the scan rejected; `rejects` reads them back."""
    lost: int = 0
    """Images behind the faults of damaged sources beyond one for each fault: as many as rows say,
    else estimated."""
    notes: tuple[str, ...] = ()
    """Sentences about what was read otherwise than a user may expect, or not used."""
    numbered: bool = False
    """True if the source numbers its classes itself, by its labels or in a list."""

    def __len__(self) -> int:
        return len(self.rows)

    def full_name(self, place: int) -> str:
        """Return container and name of an image: `/data/n01440764.tar/n01440764_18.JPEG`."""
        address = self.containers[self.rows[place]["container"]].address
        return f"{address.rstrip('/')}/{self.names[place]}"

    def make_reject(self, place: int, reason: str) -> Reject:
        """Return the reject of an image."""
        kind, address = self.containers[self.rows[place]["container"]]
        if kind == "folder":  # its name is its place
            return Reject(self.full_name(place), reason)
        offset = int(self.rows[place]["place"])
        return Reject(self.full_name(place), reason, hide_credentials(address), offset)

    def rejects(self) -> Iterator[Reject]:
        """Read the files that the scan rejected, in the order in which it found them."""
        return read_rejects(self.rejects_file)


class ListingWriter:
    """Collects a `Listing` in the files of a folder.

    `add` is called once a folder, a tar or a row group, not once an image.
    """

    def __init__(
        self,
        scratch: Path,
        source: str,
        fields: Sequence[str] = (),
        labelled: bool = True,
        strict: bool = False,
    ) -> None:
        """Begin an empty listing.

        Args:
            scratch: folder for this writer alone; created if missing.
            source: path or address as the user named it.
            fields: other members of each sample that are listed, too.
            labelled: False for images without classes.
            strict: refuse damage, which else is skipped and noted.
        """
        self.fields, self.labelled, self.strict = tuple(fields), labelled, strict
        scratch.mkdir(parents=True, exist_ok=True)
        self._scratch, self._source = scratch, source
        self._containers: list[Container] = []
        self._counts: Counter[str] = Counter()
        """Number of images of each container, by its address."""
        self.faults = Faults()
        self._classes: dict[str, int] = {}
        self._rows = (scratch / "rows.bin").open("w+b")
        self._text = (scratch / "names.bin").open("w+b")
        self._ends = (scratch / "ends.bin").open("w+b")
        self._hashes = (scratch / "hashes.bin").open("w+b")
        self._members = (scratch / "members.bin").open("w+b")
        self._rejects = (scratch / "rejects.jsonl").open("w", encoding="utf-8")
        self._ignored: Counter[str] = Counter()
        self._ignored_example = ""
        self.notes: list[str] = []
        """Sentences for `Listing.notes`."""
        self._end = self.images = self.rejected = 0
        self.kind: str | None = None
        """Kind that the source was taken for, for messages; None if it is not known yet."""

    def container(self, kind: Kind, address: str) -> int:
        """Add a container, unless it is the last one added, and return its number."""
        container = Container(kind, address)
        if self._containers[-1:] != [container]:
            self._containers.append(container)
        return len(self._containers) - 1

    def add(
        self,
        container: int,
        classes: str | Sequence[str],
        names: Sequence[str],
        places: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        replace: bool = False,
        members: Sequence[Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        """Add images of one container, in the order in which they lie there.

        Args:
            container: number that `container` returned.
            classes: class of all of them, or of each.
            names: names of the images, unique inside the container.
            places: offsets or row numbers; None for files of a folder.
            sizes: bytes of each; None where only the container knows them.
            replace: whether a later image of the same name in the container replaces an earlier
                one; else all names are unique.
            members: place and size of each of the `fields` of each image; None where its name or
                place is enough to find them.
        """
        if replace:
            hashes = np.zeros(len(names), _HASH_DTYPE)
            hashes["hash"] = [hash((container, _plain_path(name))) for name in names]
            hashes["row"] = np.arange(self.images, self.images + len(names))
            self._hashes.write(hashes.tobytes())
        rows = np.zeros(len(names), ROW_DTYPE)
        rows["container"] = container
        if isinstance(classes, str):
            rows["label"] = self.need_class(classes)
        else:
            rows["label"] = [self.need_class(name) for name in classes]
        if places is not None:
            rows["place"] = places
        rows["size"] = WHOLE_FILE if sizes is None else sizes
        encoded = [name.encode(*ENCODING) for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.uint64) + np.uint64(self._end)
        self._rows.write(rows.tobytes())
        self._text.write(b"".join(encoded))
        self._ends.write(ends.tobytes())
        if self.fields:
            found = np.zeros((len(names), len(self.fields)), MEMBER_PLACE)
            found["size"] = WHOLE_FILE
            if members is not None and names:
                found[...] = members
            self._members.write(found.tobytes())
        self.images += len(names)
        self._counts[self._containers[container].address] += len(names)
        self._end = int(ends[-1]) if len(ends) else self._end

    def reject(self, name: str, reason: str) -> None:
        """Add a file that cannot be packed; `name` as `Listing.full_name` would return it."""
        self._rejects.write(Reject(name, reason).to_json_line())
        self.rejected += 1

    def add_fault(self, error: DamagedSource, address: str) -> None:
        """Note that the rest of a container cannot be read.

        Args:
            error: the damage.
            address: address of the container, whose images before the fault have been added.

        Raises:
            DamagedSource: with `strict`.
        """
        if self.strict:
            raise error
        known = any(one == Container("parquet", address) for one in self._containers[-1:])
        self.faults.add(error, address, self._counts[address], known)
        name, source = hide_credentials(error.source), hide_credentials(address)
        reason = f"{DAMAGED}: {error.reason}"
        self._rejects.write(Reject(name, reason, source, error.offset).to_json_line())
        self.rejected += 1

    def summarize_rejects(self, *marks: str) -> str:
        """Return the most frequent reason so far, of all names or those with a mark in them."""
        if not self._rejects.closed:
            self._rejects.flush()
        rejects = read_rejects(self._scratch / "rejects.jsonl")
        return summarize_rejects(
            one for one in rejects if not marks or any(mark in one.name for mark in marks)
        )

    def ignore(self, endings: Counter[str], example: str) -> None:
        """Count files beside images that are not used, by the endings of their names."""
        self._ignored.update(endings)
        self._ignored_example = self._ignored_example or example

    def need_class(self, name: str) -> int:
        """Add a class, which `finish` refuses without images; return its number."""
        return self._classes.setdefault(name, len(self._classes))

    def finish(
        self, classes: Sequence[str] | None = None, titles: Sequence[str] | None = None
    ) -> Listing:
        """Close the files and return the listing.

        Args:
            classes: class list that is given from outside (by the training split, a parquet's
                features); None for the sorted names of the classes that were added.
            titles: readable names of `classes`.

        Raises:
            UsageError: no images, fewer than two classes, an unknown class, one without
                images (unless `classes` is given), or one whose name is no text.
        """
        for file in (
            self._rows, self._text, self._ends, self._hashes, self._members, self._rejects,
        ):  # fmt: skip
            file.close()
        self._drop_replaced()
        if not self.labelled:
            return self._finish_unlabelled()
        if not self.images:
            self.faults.refuse()
        found = sort_classes(self._classes)
        names = tuple(classes) if classes is not None else tuple(found)
        known = Classes(names)
        self._check(known, found)
        rows_file = self._scratch / "rows.bin"
        table = np.array([known.find_number(name) for name in self._classes], np.int32)
        counts = _relabel(rows_file, table)
        for name, count in zip(self._classes, counts.tolist(), strict=True):
            if count == 0:
                marks = f"/{name}/", f"/{name}.tar/"
                self.faults.refuse_class(name, marks)
                why = self.summarize_rejects(*marks)
                raise UsageError(
                    f"class {name!r} of source {self._source} has no images that can be packed "
                    f"(rejected: {why}); add some or remove it"
                )
        return self._make_listing(names, None if titles is None else tuple(titles))

    def _finish_unlabelled(self) -> Listing:
        """Return the listing of images without classes, each with label -1."""
        if not self.images:
            self.faults.refuse()
            why = f" (rejected: {self.summarize_rejects()})" if self.rejected else ""
            raise UsageError(f"source {self._source} holds no images{why}")
        _relabel(self._scratch / "rows.bin", np.full(len(self._classes), -1, np.int32))
        return self._make_listing((), None)

    def _make_listing(self, classes: tuple[str, ...], titles: tuple[str, ...] | None) -> Listing:
        members = map_file(self._scratch / "members.bin", MEMBER_PLACE)
        lost = self.faults.estimate_lost(self._counts)
        return Listing(
            source=self._source,
            containers=tuple(self._containers),
            rows=map_file(self._scratch / "rows.bin", ROW_DTYPE),
            names=Names(
                map_file(self._scratch / "names.bin", np.dtype(np.uint8)),
                map_file(self._scratch / "ends.bin", np.dtype(np.uint64)),
            ),
            members=members.reshape(self.images, len(self.fields)),
            classes=classes,
            titles=titles,
            rejects_file=self._scratch / "rejects.jsonl",
            rejected=self.rejected,
            lost=sum(lost) - len(lost),
            notes=(*self.notes, *self._describe_ignored(), *self.faults.describe(lost)),
        )

    def _describe_ignored(self) -> Iterator[str]:
        if total := self._ignored.total():
            some = [f"{count:,} {escape(end)}" for end, count in self._ignored.most_common(5)]
            more = ", ..." if len(self._ignored) > len(some) else ""
            yield (
                f"{total:,} files beside the images of {self._source} are not packed: "
                f"{', '.join(some)}{more} (as {self._ignored_example})"
            )

    def _drop_replaced(self) -> None:
        """Drop the images that a later one replaces, as when the tar is unpacked."""
        paths = [self._scratch / name for name in ("rows.bin", "names.bin", "ends.bin")]
        found = np.fromfile(self._scratch / "hashes.bin", _HASH_DTYPE)
        order = np.sort(found["hash"])
        twice = order[1:][order[1:] == order[:-1]]
        if not len(twice):
            return
        assert not self.fields  # no kind of source that may have them replaces images
        rows = np.fromfile(paths[0], ROW_DTYPE)
        text, ends = np.fromfile(paths[1], np.uint8), np.fromfile(paths[2], np.uint64)
        names, last = Names(text, ends), dict[tuple[int, str], int]()
        keep = np.ones(len(rows), np.bool_)
        for row in found["row"][np.isin(found["hash"], twice)].tolist():
            key = int(rows[row]["container"]), _plain_path(names[row])
            if key in last:
                keep[last[key]] = False
            last[key] = row
        count = len(rows) - int(keep.sum())
        if not count:  # two names of one hash
            return
        dropped = int(np.argmin(keep))
        example = f"{self._containers[rows[dropped]['container']].address}/{names[dropped]}"
        self.notes.append(
            f"{count:,} {'member' if count == 1 else 'members'} of tars count as replaced by a "
            f"later one of the same name, as when they are unpacked (as {escape(example)})"
        )
        sizes = np.diff(ends, prepend=np.uint64(0)).astype(np.int64)
        rows[keep].tofile(paths[0])
        text[np.repeat(keep, sizes)].tofile(paths[1])
        np.cumsum(sizes[keep]).astype(np.uint64).tofile(paths[2])
        self.images -= count

    def _check(self, known: Classes, found: list[str]) -> None:
        if not found:
            why = f" (rejected: {self.summarize_rejects()})" if self.rejected else ""
            raise UsageError(
                f"source {self._source} holds no images of any class{why}; it needs a folder "
                "(or a tar) of images per class"
            )
        unknown = [name for name in found if isinstance(known.find_number(name), str)]
        for name in found:
            if not name.isprintable():  # nor is a name in an encoding other than the system's
                raise UsageError(
                    f"class name {name!r} of source {self._source} is no text; rename it"
                )
            if name in unknown:
                like = next((one for one in known.names if _loosely(one) == _loosely(name)), None)
                raise UnknownClasses(
                    f"source {self._source} has class {name!r}, which the training source lacks"
                    f"{'' if like is None else f' (it has {like!r})'}; "
                    "remove it, or add it to the training images",
                    unknown,
                )
        refuse_same_names(found, f"source {self._source}")
        if len(known.names) < 2:
            raise UsageError(
                f"source {self._source} has one class, {known.names[0]!r}; it needs two or more"
            )


def _plain_path(name: str) -> str:
    """Return the name of a tar's member as it is unpacked: `a/1.jpg` for `./a//1.jpg`."""
    return posixpath.normpath(name) if "./" in name or "//" in name else name


def _loosely(name: str) -> str:
    """Return a class name without what the eye passes over: case, spaces, leading zeros."""
    return "".join(name.casefold().split()).lstrip("0")


ROWS_AT_A_TIME = 1 << 20
"""Rows handled at a time where a whole column would be large."""


def _relabel(path: Path, table: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Turn labels, places among the classes as seen, into those in `table`.

    Returns:
        the number of images of each class as seen.
    """
    counts = np.zeros(len(table), np.int64)
    with path.open("r+b") as file:  # not mapped: its pages would count as our memory
        while len(rows := np.fromfile(file, ROW_DTYPE, ROWS_AT_A_TIME)):
            counts += np.bincount(rows["label"], minlength=len(table))
            rows["label"] = table[rows["label"]]
            file.seek(-rows.nbytes, 1)
            rows.tofile(file)
            file.flush()
    return counts


def map_file(path: Path, dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
    """Map a file of such values, which may be empty, for reading."""
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")


MOST_IMAGE_BYTES = 256 << 20
"""Size limit of an image in bytes: memory must not depend on what a source claims."""


def refuse_if_too_large(size: int) -> None:
    """Raise `Unreadable` for an image that is too large to be held in memory."""
    if size > MOST_IMAGE_BYTES:
        raise Unreadable(f"too large: {size:,} bytes, {MOST_IMAGE_BYTES:,} are read at most")
