"""WebDataset samples: groups the members of a tar, finds images and labels, numbers the classes.

The members of a sample follow each other and share a key, which is the name up to the first dot
behind the last slash, as `webdataset` and DALI read it. Their order, other members and the case of
endings (`.JPG`, `.image.jpeg`) do not matter. The label is in a `.cls`, a field of a `.json`, or a
`.txt` that holds just a number.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.dataset.tar import Member, escape
from pipeline.tools.errors import UsageError
from pipeline.tools.files import read_document
from pipeline.tools.jsonl import parse_json

JPEG_ENDINGS = ("jpg", "jpeg")
"""Endings of the images that are read from shards as they are."""
IMAGE_KINDS = (
    *JPEG_ENDINGS,
    "jpe",
    "jfif",
    "png",
    "webp",
    "bmp",
    "gif",
    "tif",
    "tiff",
    "ppm",
    "pgm",
    "avif",
    "heic",
    "heif",
    "hif",
    "jxl",
    "jp2",
    "j2k",
    "j2c",
    "jpx",
    "jpf",
)
"""Last parts of the names of images that can be packed, in lower case."""
_ARRAY_KINDS = ("npy", "npz", "pyd", "pth")
_COMPRESSIONS = ("gz", "bz2", "xz", "zst")
LABEL_ENDINGS = ("cls", "json", "txt")
"""Endings of labels, best first."""
MAX_LABEL_BYTES = 1 << 16
"""Size limit of a label in bytes; larger members are not read."""
LONGEST_WORD = 200
NUMBER_FIELDS = ("label", "cls", "class", "class_id", "class_index", "target")
NAME_FIELDS = ("class_name", "classname", "label_name", "class_text", "label_text")
MAX_CLASSES = 1_000_000
"""Largest number of classes; a larger label is some other id."""

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""Key and ending of a member, `webdataset`'s pattern."""
_FIELD = re.compile(r"[a-z0-9_-]+([.][a-z0-9_-]+)*")
"""Ending of a member, in small letters."""
_DECIMAL = re.compile(r"[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
"""A number as programs write it: `3`, `3.0`, `3.000e+00`."""
_META = re.compile(r"__[^/]*__($|/)")
"""Names of members that webdataset skips."""
TORN = (
    "its image and its label do not follow each other in the tar; write it sorted by name "
    "(tar --sort=name)"
)
"""Reason for rejecting both halves of a sample."""


@lru_cache(256)  # a shard has few endings, and each is asked about ten times a sample
def _last_part(ending: str) -> str:
    return ending.rpartition(".")[2].lower()


def is_field(name: object) -> bool:
    """Return whether this can name a field: the ending of a member in lower case, `seg.png`."""
    return isinstance(name, str) and len(name) <= 100 and _FIELD.fullmatch(name) is not None


class UnfitSample(Exception):
    """A sample without a usable image or label; the message is the reason."""

    def __init__(self, reason: str, lacks: Literal["image", "label"] | None = None) -> None:
        super().__init__(reason)
        self.lacks = lacks
        """Half of the sample that is missing."""


class SampleFile(NamedTuple):
    """A file of a sample."""

    ending: str
    """The name behind the first dot, as it is written."""
    name: str
    offset: int
    size: int
    regular: bool = True
    """True for a file with data, False for a folder, link, device or pipe."""

    @property
    def kind(self) -> str:
        """Last part of the ending in lower case: `jpg` for `KEY.image.JPG`."""
        return _last_part(self.ending)

    @property
    def is_compressed_image(self) -> bool:
        """True for `KEY.jpg.gz`."""
        below = self.ending.lower().split(".")[-2:-1]
        return self.kind in _COMPRESSIONS and any(kind in IMAGE_KINDS for kind in below)


class Sample(NamedTuple):
    """The files that share a key, in stored order."""

    key: str
    parts: tuple[SampleFile, ...]

    def find_image(self) -> SampleFile:
        """Return the image: the only one, else the only `KEY.jpg` beside `KEY.seg.png`, else the
        only JPEG beside images of other kinds.

        Raises:
            UnfitSample: there is none, or several.
        """
        images = [part for part in self.parts if part.kind in IMAGE_KINDS]
        found = [part for part in images if "." not in part.ending] or images
        if len(found) > 1:
            found = [part for part in found if part.kind in JPEG_ENDINGS] or found
        if len(found) == 1:
            return found[0]
        if found:
            names = " and ".join(f".{escape(part.ending)}" for part in found)
            raise UnfitSample(f"it has several images, {names}; repack with one")
        array = next((part for part in self.parts if part.kind in _ARRAY_KINDS), None)
        if array is not None:
            raise UnfitSample(f"its image is a .{escape(array.ending)}, which is not read")
        packed = next((part for part in self.parts if part.is_compressed_image), None)
        if packed is not None:
            raise UnfitSample(f"its image is a .{escape(packed.ending)}, compressed; unpack it")
        raise UnfitSample("it has no image", "image")

    def without(self, fields: Container[str]) -> Sample:
        """Return the sample without the files whose endings are these, in any case of letters."""
        parts = (part for part in self.parts if part.ending.lower() not in fields)
        return Sample(self.key, tuple(parts))

    def find_member(self, field: str) -> SampleFile:
        """Return the file whose ending is `field` (`json`, `seg.png`) in any case of letters.

        Raises:
            UnfitSample: there is none.
        """
        for part in self.parts:
            if part.ending.lower() == field:
                return part
        raise UnfitSample(f"it has no .{field}")


def group_by_key(members: Iterable[Member]) -> Iterator[tuple[str, Iterator[SampleFile]]]:
    """Group the members that follow each other by their key, as `webdataset` does.

    Names without a key are skipped; links are kept. As with `groupby`, the files of a group are
    gone once the next group is taken.
    """
    matches = ((_NAME.fullmatch(member.name), member) for member in members)
    named = ((match[1], match[2], member) for match, member in matches if match)
    for key, group in groupby(named, key=itemgetter(0)):
        yield key, (SampleFile(ending, *member[:4]) for _, ending, member in group)


def group_samples(
    members: Iterable[Member], skip: Callable[[Member], object] = lambda member: None
) -> Iterator[Sample]:
    """Group the members of a tar into samples, in stored order.

    Hidden files (as `._KEY.jpg` of macOS), links, `__meta__` and names without a dot belong to no
    sample, as with DALI and `webdataset`.

    Args:
        members: members of a tar.
        skip: called with each member that belongs to no sample.
    """

    def belongs(member: Member) -> bool:
        name = member.name.rpartition("/")[2]
        if member.regular and name.find(".") > 0 and not _META.match(member.name):
            return True
        skip(member)
        return False

    for key, group in group_by_key(filter(belongs, members)):
        parts: dict[str, SampleFile] = {}
        for part in group:
            if part.ending in parts:  # a repeated ending begins another sample of that key
                yield Sample(key, tuple(parts.values()))
                parts = {}
            parts[part.ending] = part
        yield Sample(key, tuple(parts.values()))


def is_meant(sample: Sample) -> bool:
    """Return whether this is meant to be a sample: it has an image or a `.cls`."""
    return any(
        part.kind in (*IMAGE_KINDS, *_ARRAY_KINDS, "cls") or part.is_compressed_image
        for part in sample.parts
    )


def find_torn(unfit: Iterable[tuple[str, UnfitSample]]) -> set[str]:
    """Return the keys of a shard, among those of unfit samples, whose halves lie apart (`TORN`)."""
    keys: dict[str | None, set[str]] = {"image": set(), "label": set()}
    for key, error in unfit:
        keys.setdefault(error.lacks, set()).add(key)
    return keys["image"] & keys["label"]


Read = Callable[[int, int], bytes | memoryview]
"""Called with offset and size; returns these bytes of a tar."""


class SampleLabel(NamedTuple):
    """Label of a sample."""

    label: int | str
    """A number from 0, or the name of a class."""
    title: str | None
    """Readable name of the class, if it is given beside the number."""
    file: SampleFile
    """File that holds the label."""


def find_label(sample: Sample, read: Read) -> SampleLabel:
    """Return the label of a sample, from the best of its files that holds one.

    Args:
        sample: the sample.
        read: reads the tar.

    Raises:
        UnfitSample: it has no label.
        OSError: as `read`.
    """
    there = {part.kind: part for part in reversed(sample.parts) if part.kind in LABEL_ENDINGS}
    for kind in LABEL_ENDINGS:
        if kind in there:
            label, title = read_member_label(there[kind], read)
            if label is not None:
                return SampleLabel(label, title, there[kind])
    first = next((kind for kind in LABEL_ENDINGS if kind in there), None)
    if first is None or first == "txt":
        raise UnfitSample("it has no label (.cls or .json)", "label")
    where = f" (in one of {', '.join(NUMBER_FIELDS)})" if first == "json" else ""
    raise UnfitSample(f"its .{first} of {there[first].size:,} bytes holds no label{where}")


class MemberLabel(NamedTuple):
    """Label in one member."""

    label: int | str | None
    """A number from 0, a word, or None if the member holds no label."""
    title: str | None = None
    """Readable name of the class, if it is given beside the number."""


def read_member_label(file: SampleFile, read: Read) -> MemberLabel:
    """Return the label in a `.cls`, `.json` or `.txt` file of a sample, if it is not too large."""
    if file.size > MAX_LABEL_BYTES:
        return MemberLabel(None)
    return parse_label(file.kind, bytes(read(file.offset, file.size)))


def parse_label(ending: str, body: bytes) -> MemberLabel:
    """Return the label in the content of a `.cls`, `.json` or `.txt` member."""
    try:
        if ending == "json":
            return _from_table(parse_json(body))
        label = parse_text(body.decode())
    except ValueError:  # no JSON, or no UTF-8
        return MemberLabel(None)
    # A text may be a caption: only a number is a label.
    return MemberLabel(None if ending == "txt" and isinstance(label, str) else label)


def parse_text(text: str) -> int | str | None:
    """Return a label that is written as a text: `3` and `3.0` are number 3, `cat` is a word."""
    text = text.strip()
    if _DECIMAL.fullmatch(text):
        value = float(text)
        if text.startswith("-"):
            return None  # -1 stands for "unknown"
        if value.is_integer():
            return _from_value(value)
    return text if text and text.isprintable() and len(text) <= LONGEST_WORD else None


def _from_table(table: object) -> MemberLabel:
    if not isinstance(table, dict):
        return MemberLabel(None)
    labels = [_from_value(table.get(name)) for name in NUMBER_FIELDS]
    names = [_from_value(table.get(name)) for name in NAME_FIELDS]
    words = [value for value in (*names, *labels) if isinstance(value, str)]
    numbers = [value for value in labels if isinstance(value, int)]
    word = words[0] if words else None
    return MemberLabel(numbers[0], word) if numbers else MemberLabel(word)


def _from_value(value: object) -> int | str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # data frames turn a column with a gap into floats
    if isinstance(value, int) and not isinstance(value, bool):
        # No data set has a class number of ten digits; Python refuses to print thousands of them.
        return value if 0 <= value < 10**9 else None
    return parse_text(value) if isinstance(value, str) else None


def compose(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): macOS writes `é` as two characters."""
    return unicodedata.normalize("NFC", name)


def sort_classes(names: Iterable[str]) -> list[str]:
    """Return class names in their order: sorted, as numbers if all consist of digits."""
    names = sorted(names)
    if all(name.isascii() and name.isdigit() and len(name) <= LONGEST_WORD for name in names):
        names.sort(key=int)
    return names


def number_classes(names: Sequence[str]) -> Mapping[int, int] | None:
    """Return the place in `names` of the class that each number means.

    A number counts places. Where the names are numbers themselves, it is the class of that name.
    None: only some names are numbers, or two are the same one, and they are not at their places.
    """
    numbers = [parse_text(name) for name in names]
    found = [(one, place) for place, one in enumerate(numbers) if isinstance(one, int)]
    if all(number == place for number, place in found):
        return {place: place for place in range(len(names))}
    return dict(found) if len(dict(found)) == len(names) else None


class UnknownClasses(UsageError):
    """Classes of a source that are not in the list that was given."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


@dataclass(frozen=True)
class Classes:
    """The classes of a data set; a label is an index into `names`."""

    names: tuple[str, ...]

    decimals: bool = False
    """True where a name such as "3.0" is what the shards hold: a word before it was a number."""

    @classmethod
    def from_labels(cls, labels: Sequence[Sequence[int | str]]) -> Classes:
        """Return the classes of the training samples' labels.

        Numbers count from 0, and are the names of their classes; words are sorted.

        Raises:
            UsageError: there are numbers and names, no label 0, fewer than two classes, or two
                that differ only in Unicode form.
        """
        seen = {label for part in labels for label in part}
        numbers = [label for label in seen if isinstance(label, int)]
        words = sort_classes(label for label in seen if isinstance(label, str))
        if words and numbers:
            raise UsageError(
                f"some labels are numbers ({min(numbers)}) and some names ({words[0]!r}); "
                "give the list of all classes with --class-names FILE"
            )
        refuse_same_names(words, "the shards")
        if len(words) > 1:
            return cls(tuple(words))
        if numbers and min(numbers) > 0:
            raise UsageError(
                f"labels run from {min(numbers)} to {max(numbers)}, and Duet counts from 0; if "
                "they do, too, give the list of all classes with --class-names FILE, else repack"
            )
        if not seen:
            raise UsageError("there is no training sample")
        if max(numbers, default=0) < 1:
            raise UsageError("the training samples are of one class; it needs two or more")
        return cls(tuple(map(str, range(max(numbers) + 1))))

    def find_number(self, label: int | str) -> int | str:
        """Return the number of a label, or a text: the reason why it has none."""
        if isinstance(label, str):
            place = self._places.get(label, self._places.get(compose(label)))
            return f"label {label!r} is no class of this set" if place is None else place
        if label in self._decimals:
            return self._decimals[label]
        if 0 <= label < len(self.names):
            return label
        return f"label {str(label)[:40]} is outside the classes, 0 to {len(self.names) - 1}"

    def refuse_shift(self, used: Container[int], reasons: Iterable[str]) -> None:
        """Refuse labels that count from 1: each would be that of the next class.

        Args:
            used: labels of the samples.
            reasons: reasons why other samples have no number.

        Raises:
            UsageError: no label is 0, and one is the number of classes.
        """
        count = len(self.names)
        if 0 not in used and self.find_number(count) in set(reasons):
            raise UsageError(
                f"labels run to {count}, and none is 0: Duet counts the {count} classes from 0; "
                "subtract 1 from each label, or give --class-names FILE a first line for 0"
            )

    @cached_property
    def _places(self) -> dict[str, int]:
        composed = {compose(name): place for place, name in enumerate(self.names)}
        return composed | {name: place for place, name in enumerate(self.names)}

    @cached_property
    def _decimals(self) -> dict[int, int]:
        numbers = map(parse_text, self.names if self.decimals else ())
        return {
            number: place
            for place, number in enumerate(numbers)
            if isinstance(number, int) and not self.names[place].isdigit()
        }


def refuse_same_names(names: Iterable[str], source: str) -> None:
    """Raise `UsageError` for two class names of a source that differ only in Unicode form."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(compose(name), name)
        if other != name:
            raise UsageError(
                f"classes {other!a} and {name!a} of {source} are the same name in two "
                "Unicode forms; give them one name"
            )


def read_classes(path: Path) -> tuple[str, ...]:
    """Read class names: a JSON list, or one name per line, in the order of the labels.

    Raises:
        UsageError: it cannot be read, is empty, or has a name twice.
    """
    try:
        text = read_document(path)
        names = parse_json(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no UTF-8 text or JSON list"
        raise UsageError(
            f"--class-names {path} cannot be read ({why}); name another file"
        ) from error
    names = [name.strip() if isinstance(name, str) else name for name in names]
    while names and names[-1] == "":
        names.pop()
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise UsageError(f"--class-names {path} has {name!r}, which is no name; one a line")
    if len(names) < 2:
        raise UsageError(f"--class-names {path} names {len(names)} classes; it needs two or more")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UsageError(
            f"--class-names {path} has {twice!r} more than once; a label needs one name"
        )
    return tuple(names)
