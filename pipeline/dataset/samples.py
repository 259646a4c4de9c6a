"""Members of a WebDataset tar -> samples: which file is the picture, which holds the label.

The members of a sample follow each other and share a key, the name up to the first dot behind the
last slash: as `webdataset` and DALI read it. What comes first, what else is there and how endings
are written (`.JPG`, `.image.jpeg`) does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pipeline.dataset.index import split_name
from pipeline.dataset.tar import Member
from pipeline.sources.listing import shown
from pipeline.sources.shard_labels import LABEL_ENDINGS, MOST_BYTES, NUMBER_FIELDS, parse

JPEGS = ("jpg", "jpeg")
OTHERS = ("png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "npy", "npz", "pyd", "pth")
"""What pictures are stored as elsewhere, and not read from shards here."""


class Unfit(Exception):
    """A sample that cannot be trained from as it is; the message is the reason."""


class Part(NamedTuple):
    """One file of a sample."""

    ending: str
    """All behind the first dot, as it is written."""
    name: str
    offset: int
    size: int

    @property
    def kind(self) -> str:
        """What it is, in small letters: `jpg` for `KEY.image.JPG`."""
        return self.ending.rpartition(".")[2].lower()


class Sample(NamedTuple):
    """The files that share a key."""

    key: str
    parts: tuple[Part, ...]

    def picture(self) -> Part:
        """Return the JPEG.

        Raises:
            Unfit: there is none, or several.
        """
        found = [part for part in self.parts if part.kind in JPEGS]
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(f".{shown(part.ending)}" for part in found)
            raise Unfit(f"it has several pictures, {names}; repack with one")
        other = next((part for part in self.parts if part.kind in OTHERS), None)
        if other is None:
            raise Unfit("it has no picture (.jpg or .jpeg)")
        raise Unfit(f"its picture is a .{shown(other.ending)}, no JPEG")


def samples_of(members: Iterable[Member]) -> Iterator[Sample]:
    """Group the members of a tar into samples, in stored order.

    Hidden files and names without a dot are passed over, as DALI and `webdataset` do.
    """
    key, parts, seen = "", list[Part](), set[str]()
    for member in members:
        if not member.regular:
            continue
        base, ending = split_name(member.name)
        if not base or base.endswith("/"):
            continue
        if base != key or ending in seen:  # the same once more is another sample of that key
            if parts:
                yield Sample(key, tuple(parts))
            key, parts, seen = base, [], set()
        parts.append(Part(ending, member.name, member.offset, member.size))
        seen.add(ending)
    if parts:
        yield Sample(key, tuple(parts))


def has_pictures(sample: Sample) -> bool:
    """Whether this is meant to be a sample: a picture or a label, and not a file that lies by."""
    return any(part.kind in (*JPEGS, *OTHERS, "cls") for part in sample.parts)


def label_of(sample: Sample, read: Callable[[int, int], bytes | memoryview]) -> int | str:
    """Return the label of a sample, as it is written: a number from 0, or the name of a class.

    It is found as `build_shards` finds it: in the `.cls`, a field of the `.json`, or the `.txt`.

    Args:
        sample: whose.
        read: gives the bytes at an offset, so many.

    Raises:
        Unfit: it has none.
        OSError: as `read`.
    """
    there = {part.kind: part for part in reversed(sample.parts) if part.kind in LABEL_ENDINGS}
    for kind in LABEL_ENDINGS:
        part = there.get(kind)
        if part is not None and part.size <= MOST_BYTES:
            label = parse(kind, bytes(read(part.offset, part.size))).label
            if label is not None:
                return label
    first = next((kind for kind in LABEL_ENDINGS if kind in there), None)
    if first is None or first == "txt":
        raise Unfit("it has no label (.cls or .json)")
    where = f" (in one of {', '.join(NUMBER_FIELDS)})" if first == "json" else ""
    raise Unfit(f"its .{first} of {there[first].size:,} bytes holds no label{where}")
