"""Lists beside a source: the class of each validation image, and readable names of classes.

ILSVRC's validation images are numbered, not sorted. Their classes come from one of

    ILSVRC2012_devkit_t12.tar.gz    the development kit, or the folder it unpacks to
    LOC_val_solution.csv            Kaggle's: `ILSVRC2012_val_00048981,n03995372 85 1 499 272 ...`
    *synset_labels.txt              a WordNet id a line, the first for image 1
    any other text file             `ILSVRC2012_val_00000001.JPEG n01751748` lines

Reads an array of structs out of a MATLAB 5 file: just enough for ILSVRC's `meta.mat`.

SciPy's reader takes a damaged file for its word and crashes the process. This one reads texts and
numbers, is bounded, and raises `ValueError` for whatever is not as it should be.

ILSVRC2012's development kit: which image of the validation set is of which class.

`data/meta.mat` numbers the synsets and names them; `data/ILSVRC2012_validation_ground_truth.txt`
has that number for image 1, 2, 3, ... The kit is read as it was handed out, in memory.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pipeline.dataset.tar import escape, read_members
from pipeline.sources.listing import PICTURE_ENDINGS, is_class
from pipeline.tools.errors import UsageError

_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _CHAR = 2, 4
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
"""Type of an element -> code of `struct`."""
_TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}

Value = str | float | None
Element = tuple[int, bytes]


def read_structs(data: bytes, name: str, limit: int) -> list[dict[str, Value]]:
    """Return the elements of a struct array.

    Args:
        data: of the file.
        name: of the variable.
        limit: bytes that a variable may unpack to.

    Returns:
        for each struct its fields that are texts or single numbers (others are None).

    Raises:
        ValueError: no such variable, or a damaged file; the message is one line.
    """
    try:
        order = {b"IM": "<", b"MI": ">"}[data[126:128]]
        for kind, body in _elements(data[128:], order):
            if kind == _COMPRESSED:
                unpacked = zlib.decompressobj().decompress(body, limit + 1)
                if len(unpacked) > limit:
                    raise ValueError(f"it unpacks to more than {limit >> 20} MiB")
                kind, body = next(_elements(unpacked, order))
            if kind == _MATRIX and (found := _structs(body, name, order)) is not None:
                return found
    except (KeyError, IndexError, StopIteration, struct.error, zlib.error) as error:
        raise ValueError(f"it is damaged, or of another version ({error!r})") from error
    raise ValueError(f"it holds no structs named {name}")


def _structs(body: bytes, name: str, order: str) -> list[dict[str, Value]] | None:
    """Return the structs of a matrix, None if it is another variable."""
    parts = _elements(body, order)
    (_, flags), _, (_, found) = islice(parts, 3)
    if found != name.encode() or _class(flags, order) != _STRUCT:
        return None
    (length,) = struct.unpack(order + "i", next(parts)[1])
    text = next(parts)[1]
    if not 0 < length <= 64 or not 0 < len(text) <= 1 << 12:
        raise ValueError("its structs have no fields")
    starts = range(0, len(text), length)
    fields = [text[at : at + length].partition(b"\0")[0].decode("latin-1") for at in starts]
    result = []
    while first := next(parts, None):
        values = [first, *islice(parts, len(fields) - 1)]
        result.append(
            {field: _value(*one, order) for field, one in zip(fields, values, strict=True)}
        )
    return result


def _value(kind: int, body: bytes, order: str) -> Value:
    """Return the text or the number that a field is."""
    if kind != _MATRIX or not body:
        return None
    parts = list(islice(_elements(body, order), 4))
    if len(parts) < 4:
        return None
    stored, content = parts[3]
    if _class(parts[0][1], order) == _CHAR:
        encoding = _TEXTS[stored]
        if encoding == "utf-16":
            encoding += "-le" if order == "<" else "-be"
        return content.decode(encoding, "replace")
    if (code := _NUMBERS.get(stored)) and len(content) == struct.calcsize(code):
        return float(struct.unpack(order + code, content)[0])
    return None


def _class(flags: bytes, order: str) -> int:
    """Return what a matrix is, of its flags."""
    return int(struct.unpack_from(order + "I", flags)[0]) & 0xFF


def _elements(data: bytes, order: str) -> Iterator[Element]:
    """Yield type and content of the elements that follow each other in `data`."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        start = at + 8
        if kind >> 16:  # up to four bytes lie in the tag itself
            kind, size, start = kind & 0xFFFF, kind >> 16, at + 4
        if start + size > len(data) or (start == at + 4 and size > 4):
            raise ValueError("it is damaged: an element goes on after its end")
        yield kind, data[start : start + size]
        padding = 0 if kind == _COMPRESSED else -size % 8
        at = at + 8 if start == at + 4 else start + size + padding


META = "meta.mat"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
ARCHIVES = (".tar.gz", ".tgz", ".tar")

LIMIT = 64 << 20
"""Bytes that a kit, or a list of labels, may unpack to; the real one has a tenth of it."""


class Devkit(NamedTuple):
    """What a development kit says."""

    wnids: dict[int, str]
    """ILSVRC2012_ID -> WordNet id, of the classes that have images of their own."""
    titles: dict[str, str]
    """WordNet id -> words."""
    truth: list[str]
    """The WordNet id of validation image 1, 2, 3, ...; empty if the kit lacks the list."""


def is_devkit(path: Path) -> bool:
    """Whether this is an archive or a folder that a kit may lie in."""
    if path.is_dir():
        return any((path / place / META).is_file() for place in ("", "data"))
    return path.name.endswith(ARCHIVES) and path.is_file()


def read_devkit(path: Path) -> Devkit:
    """Read a kit: the archive, the folder it unpacks to, or that folder's `data`.

    Raises:
        UsageError: no kit, or a damaged one.
    """
    try:
        meta, truth = _from_folder(path) if path.is_dir() else _from_archive(path)
    except (OSError, EOFError, zlib.error) as error:
        raise _wrong(path, getattr(error, "strerror", None) or str(error)) from error
    if meta is None:
        raise _wrong(path, f"it holds no data/{META}")
    wnids, titles = _synsets(path, meta)
    try:
        numbers = [int(line) for line in (truth or b"").strip().splitlines()]
        return Devkit(wnids, titles, [wnids[number] for number in numbers])
    except (ValueError, KeyError) as error:
        raise _wrong(path, f"{TRUTH} says {error}, which is no ILSVRC2012_ID") from error


def bounded(path: Path) -> bytes:
    """Return the bytes of a file that should be small.

    Raises:
        UsageError: it is not.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        raise _wrong(path, f"it is larger than {LIMIT >> 20} MiB")
    return data


def _from_folder(path: Path) -> tuple[bytes | None, bytes | None]:
    folder = path if (path / META).is_file() else path / "data"
    meta, truth = folder / META, folder / TRUTH
    return (
        bounded(meta) if meta.is_file() else None,
        bounded(truth) if truth.is_file() else None,
    )


def _from_archive(path: Path) -> tuple[bytes | None, bytes | None]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    if packed:
        with gzip.open(path) as stream:
            data = stream.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise _wrong(path, f"it unpacks to more than {LIMIT >> 20} MiB")
    else:
        data = bounded(path)
    found: dict[str, bytes] = {}
    for member in read_members(io.BytesIO(data), str(path)):
        if member.regular:
            name = member.name.rpartition("/")[2]
            found.setdefault(name, data[member.offset :][: member.size])
    return found.get(META), found.get(TRUTH)


def _synsets(path: Path, meta: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """Return ILSVRC2012_ID -> WordNet id, and WordNet id -> words, of the synsets at the bottom."""
    wnids: dict[int, str] = {}
    titles: dict[str, str] = {}
    try:
        for synset in read_structs(meta, "synsets", LIMIT):
            if synset["num_children"] != 0:
                continue
            number, wnid = synset["ILSVRC2012_ID"], synset["WNID"]
            if not isinstance(number, float) or not isinstance(wnid, str) or not is_class(wnid):
                raise ValueError(f"synset {len(wnids) + 1} is {wnid!r}, number {number}")
            wnids[int(number)] = wnid
            titles[wnid] = escape(str(synset["words"] or wnid))
    except (ValueError, KeyError, OverflowError) as error:
        raise _wrong(path, f"{META}: {escape(str(error))}") from error
    if not wnids:
        raise _wrong(path, f"{META} names no synsets")
    return wnids, titles


def _wrong(path: Path, what: str) -> UsageError:
    return UsageError(
        f"development kit {escape(str(path))} cannot be used ({what}); "
        "give ILSVRC2012_devkit_t12.tar.gz as it was downloaded"
    )


DEVKIT = "ILSVRC2012_devkit_t12"
SOLUTION = "LOC_val_solution.csv"
SYNSET_LABELS = "synset_labels.txt"
TITLES = ("LOC_synset_mapping.txt", "synset_words.txt", "classes.txt", "classes", "words.txt")

GIVE_LABELS = (
    "give --val-labels FILE: ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, "
    "or a list of WordNet ids"
)

_WNID = re.compile(r"n\d{8}")
_TITLE = re.compile(r"(n\d{8})[\s,:]+(\S.*)")


@dataclass(frozen=True)
class GroundTruth:
    """Which image is of which class."""

    file: Path
    """Where that is written."""
    labels: dict[str, str]
    """Name of an image without its ending -> class."""
    classes: tuple[str, ...]
    """All classes, sorted."""
    titles: dict[str, str] = field(default_factory=dict)
    """Class -> readable name, of those that have one."""


def stem(name: str) -> str:
    """Return the name of an image without its folder and ending, as lists have it."""
    name = name.rpartition("/")[2]
    for ending in PICTURE_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def numbered(place: int) -> str:
    """Return the stem of ILSVRC's validation image `place`, counted from 0."""
    return f"ILSVRC2012_val_{place + 1:08d}"


def is_kit(name: str) -> bool:
    """Whether a folder or a tar of this name is ILSVRC's kit, and no class."""
    return name.startswith(DEVKIT)


def is_list(name: str) -> bool:
    """Whether a file of this name is one of the lists, which are nothing to reject."""
    return is_kit(name) or name in (SOLUTION, *TITLES) or name.endswith(SYNSET_LABELS)


def read_ground_truth(path: Path) -> GroundTruth:
    """Read the labels of the validation images, whatever they are written in.

    Args:
        path: one of the files above, or a folder that holds one.

    Raises:
        UsageError: there is none, or it cannot be understood.
    """
    if not path.exists():
        raise UsageError(f"labels {escape(str(path))} do not exist; {GIVE_LABELS}")
    if path.name == TRUTH:  # numbers mean something only together with meta.mat
        path = path.parent
    if is_devkit(path):
        kit = read_devkit(path)
        if not kit.truth:
            raise UsageError(f"labels {escape(str(path))} lack {TRUTH}; {GIVE_LABELS}")
        labels = {numbered(place): wnid for place, wnid in enumerate(kit.truth)}
        return GroundTruth(path, labels, tuple(sorted(kit.wnids.values())), kit.titles)
    if path.is_dir():
        found = next(_candidates(path), None)
        if found is None:
            raise UsageError(f"folder {escape(str(path))} holds no labels; {GIVE_LABELS}")
        return read_ground_truth(found)
    return _read_list(path)


def find_ground_truth(source: Path) -> GroundTruth | None:
    """Return the labels that lie in or beside a source, or None."""
    for folder in beside(source):
        for path in _candidates(folder):
            return read_ground_truth(path)
    return None


def find_titles(source: Path, classes: Sequence[str]) -> dict[str, str]:
    """Return readable names of `classes` (WordNet ids) from lists in or beside a source."""
    wanted = {name for name in classes if _WNID.fullmatch(name)}
    for folder in beside(source) if wanted else ():
        paths = [*_kits(folder), *(folder / name for name in TITLES)]
        for path in filter(Path.exists, paths):
            try:
                titles = read_devkit(path).titles if is_devkit(path) else _titles(path)
            except UsageError:
                continue  # a nicety, and perhaps a file that has nothing to do with us
            if wanted & titles.keys():
                return titles
    return {}


def beside(source: Path) -> Iterator[Path]:
    """Yield the folders in which lists about a source may lie, the nearest first."""
    source = source.absolute()
    if source.is_dir():
        yield source
    yield source.parent
    if source.parent.name == "CLS-LOC":  # Kaggle: ROOT/ILSVRC/Data/CLS-LOC/val
        yield from source.parent.parents[:3]


def _candidates(folder: Path) -> Iterator[Path]:
    yield from _kits(folder)
    if (folder / SOLUTION).is_file():
        yield folder / SOLUTION
    yield from sorted(folder.glob(f"*{SYNSET_LABELS}"))


def _kits(folder: Path) -> Iterator[Path]:
    for ending in (".tar.gz", ".tgz", ".tar", ""):
        if is_devkit(path := folder / f"{DEVKIT}{ending}"):
            yield path


def _read_list(path: Path) -> GroundTruth:
    """Read Kaggle's solution, a list of WordNet ids, or one of names and WordNet ids."""
    lines = _lines(path)
    while lines and not lines[-1]:
        del lines[-1]
    if lines and lines[0].lower().startswith("imageid,"):
        del lines[0]
    if not lines:
        raise UsageError(f"labels {escape(str(path))} are empty; {GIVE_LABELS}")
    in_order = len(_words(lines[0])) == 1
    labels: dict[str, str] = {}
    for place, line in enumerate(lines):
        words = _words(line)
        if not in_order and len(words) == 1 and line.endswith(","):
            continue  # named without a class: the image will be missed, and rejected
        if not words or (len(words) == 1) != in_order or not is_class(words[not in_order]):
            raise UsageError(
                f"labels {escape(str(path))} have a line {line[:80]!r}, which names no "
                f"class; {GIVE_LABELS}"
            )
        name, class_name = (numbered(place), words[0]) if in_order else (stem(words[0]), words[1])
        if labels.setdefault(name, class_name) != class_name:
            raise UsageError(
                f"labels {escape(str(path))} have two classes for {escape(name)}, "
                f"{labels[name]!r} and {class_name!r}; remove one"
            )
    return GroundTruth(path, labels, tuple(sorted(set(labels.values()))))


def _words(line: str) -> list[str]:
    return line.replace(",", " ").split()


def _titles(path: Path) -> dict[str, str]:
    matches = (_TITLE.fullmatch(line) for line in _lines(path))
    return {match[1]: escape(match[2]) for match in matches if match}


def _lines(path: Path) -> list[str]:
    try:
        text = bounded(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"list {escape(str(path))} cannot be read ({error.strerror}); mend it"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"list {escape(str(path))} is no text; {GIVE_LABELS}") from error
    return [line.strip() for line in text.splitlines()]
