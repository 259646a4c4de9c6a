"""ILSVRC's side files: the class of each validation image, and readable names of classes.

ILSVRC's validation images are numbered, not sorted. Their classes come from one of

    ILSVRC2012_devkit_t12.tar.gz    the development kit, or the folder it unpacks to
    LOC_val_solution.csv            Kaggle's: `ILSVRC2012_val_00048981,n03995372 85 1 499 272 ...`
    *synset_labels.txt              a WordNet id a line, the first for image 1
    any other text file             `ILSVRC2012_val_00000001.JPEG n01751748` lines

In the kit, `data/meta.mat` numbers and names the synsets, and
`data/ILSVRC2012_validation_ground_truth.txt` has the number of image 1, 2, 3, ... The archive is
read in memory, not unpacked.
"""

from __future__ import annotations

import gzip
import io
import re
import resource
import struct
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.dataset.tar import escape, read_members
from pipeline.sources.names import IMAGE_ENDINGS, is_class
from pipeline.tools.errors import UsageError
from pipeline.tools.processes import Crash, call_isolated

DEVKIT = "ILSVRC2012_devkit_t12"
BOXES = "ILSVRC2012_bbox"
SOLUTION = "LOC_val_solution.csv"
SYNSET_LABELS = "synset_labels.txt"
TITLES = ("LOC_synset_mapping.txt", "synset_words.txt", "classes.txt", "classes", "words.txt")

GIVE_LABELS = (
    "give --val-labels FILE: ILSVRC2012_devkit_t12.tar.gz, LOC_val_solution.csv, "
    "or a list of WordNet ids"
)

META = "meta.mat"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
ARCHIVES = (".tar.gz", ".tgz", ".tar")
LIMIT = 64 << 20
"""Bytes that a kit, or a list of labels, may unpack to; the real one has a tenth of it."""
MAT_HEADER, MAT_COMPRESSED = 128, 15  # bytes before the first element; its type
MAT_SECONDS = 20
"""CPU seconds that reading `meta.mat` may take; the real one takes 0.2."""

_WNID = re.compile(r"n\d{8}")
_TITLE = re.compile(r"(n\d{8})[\s,:]+(\S.*)")

Value = str | float | None
"""A text or a number; None for anything else."""


def read_structs(data: bytes, name: str) -> list[dict[str, Value]]:
    """Return the elements of a struct array in a MATLAB 5 file.

    SciPy's reader trusts what a file claims, and a damaged one may crash it: it runs in a process
    of its own, with `LIMIT` bytes of memory and `MAT_SECONDS` of CPU time.

    Args:
        data: content of the file.
        name: name of the variable.

    Returns:
        for each struct its fields that are texts or single numbers (others are None).

    Raises:
        ValueError: no such variable, or a damaged file; the message is one line.
    """
    import scipy.io  # noqa: F401 - once, here: the process that reads is a fork of this one

    try:
        found = call_isolated(_load_structs, data, name)
    except Crash as crash:
        raise ValueError(f"it is damaged: its reader crashed ({crash})") from crash
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _load_structs(data: bytes, name: str) -> list[dict[str, Value]] | str:
    """Limit this process, and return the structs of a file or the message of the error."""
    _limit_process(LIMIT, MAT_SECONDS)
    return _parse_structs(data, name)


def _parse_structs(data: bytes, name: str) -> list[dict[str, Value]] | str:
    from scipy.io import loadmat

    if _exceeds_limit(data):
        return f"it unpacks to more than {LIMIT >> 20} MiB"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            variables = loadmat(
                io.BytesIO(data),
                variable_names=[name],
                squeeze_me=True,
                uint16_codec="utf-16-le" if data[126:128] == b"IM" else "utf-16-be",
            )
        structs = np.atleast_1d(variables.get(name, ())).ravel()
        fields = structs.dtype.names
        if not fields:
            return f"it holds no structs named {name}"
        return [dict(zip(fields, map(_plain_value, row), strict=True)) for row in structs.tolist()]
    except MemoryError:
        return f"it unpacks to more than {LIMIT >> 20} MiB"
    except Exception as error:  # SciPy's reader raises anything on damaged input
        return f"it is damaged, or of another version ({error!r})"


def _exceeds_limit(data: bytes) -> bool:
    """Unpack the compressed elements of a MATLAB 5 file as far as `LIMIT` bytes, and count.

    The limit of the process alone would not do: memory that its parent has freed is not counted.
    """
    order, at, room = "<" if data[126:128] == b"IM" else ">", MAT_HEADER, LIMIT
    while at + 8 <= len(data) and room >= 0:
        kind, size = struct.unpack_from(f"{order}II", data, at)
        unpacker, packed = zlib.decompressobj(), data[at + 8 : at + 8 + size]
        while kind == MAT_COMPRESSED and packed and room >= 0:
            try:
                room -= len(unpacker.decompress(packed, 1 << 20))
            except zlib.error:
                break  # damaged: the reader says so
            packed = unpacker.unconsumed_tail
        at += 8 + size
    return room < 0


def _limit_process(memory: int, seconds: int) -> None:
    """End this process after so many seconds of CPU time; let it take so many bytes more."""
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, most))


def _plain_value(value: object) -> Value:
    """Return a field that SciPy read as a text or a number; None for anything else."""
    if isinstance(value, str):
        return value
    return float(value) if isinstance(value, int | float) else None


class Devkit(NamedTuple):
    """Content of a development kit."""

    wnids: dict[int, str]
    """ILSVRC2012_ID -> WordNet id, of the classes that have images of their own."""
    titles: dict[str, str]
    """WordNet id -> words."""
    truth: list[str]
    """The WordNet id of validation image 1, 2, 3, ...; empty if the kit lacks the list."""


def is_devkit(path: Path) -> bool:
    """Return whether this is an archive or a folder that may hold a kit."""
    if path.is_dir():
        return any((path / place / META).is_file() for place in ("", "data"))
    return path.name.endswith(ARCHIVES) and path.is_file()


def read_devkit(path: Path) -> Devkit:
    """Read a kit: the archive, the folder it unpacks to, or that folder's `data`.

    Raises:
        UsageError: no kit, or a damaged one.
    """
    try:
        files = _read_kit_files(path)
    except (OSError, EOFError, zlib.error) as error:
        raise _kit_error(path, getattr(error, "strerror", None) or str(error)) from error
    if META not in files:
        raise _kit_error(path, f"it holds no data/{META}")
    wnids, titles = _read_synsets(path, files[META])
    try:
        numbers = map(int, files.get(TRUTH, b"").strip().splitlines())
        return Devkit(wnids, titles, [wnids[number] for number in numbers])
    except (ValueError, KeyError) as error:
        raise _kit_error(path, f"{TRUTH} says {error}, which is no ILSVRC2012_ID") from error


def read_bounded(path: Path, packed: bool = False) -> bytes:
    """Return the bytes of a file, or those that a gzip file unpacks to, if they are few.

    Raises:
        UsageError: there are more than `LIMIT`.
        OSError, EOFError, zlib.error: it cannot be read.
    """
    with gzip.open(path) if packed else path.open("rb") as file:
        data = file.read(LIMIT + 1)
    if len(data) > LIMIT:
        what = "unpacks to more" if packed else "is larger"
        raise _kit_error(path, f"it {what} than {LIMIT >> 20} MiB")
    return data


def _read_kit_files(path: Path) -> dict[str, bytes]:
    """Return the files of a kit by name, of a folder only those that are used."""
    if path.is_dir():
        folder = path if (path / META).is_file() else path / "data"
        there = filter(Path.is_file, (folder / META, folder / TRUTH))
        return {file.name: read_bounded(file) for file in there}
    with path.open("rb") as archive:
        packed = archive.read(2) == b"\x1f\x8b"
    data = read_bounded(path, packed)
    found: dict[str, bytes] = {}
    for member in read_members(io.BytesIO(data), str(path)):
        if member.regular:
            name = member.name.rpartition("/")[2]
            found.setdefault(name, data[member.offset :][: member.size])
    return found


def _read_synsets(path: Path, meta: bytes) -> tuple[dict[int, str], dict[str, str]]:
    """Return ILSVRC2012_ID -> WordNet id, and WordNet id -> words, of the synsets at the bottom."""
    wnids: dict[int, str] = {}
    titles: dict[str, str] = {}
    try:
        for synset in read_structs(meta, "synsets"):
            if synset["num_children"] != 0:
                continue
            number, wnid = synset["ILSVRC2012_ID"], synset["WNID"]
            if not isinstance(number, float) or not isinstance(wnid, str) or not is_class(wnid):
                raise ValueError(f"synset {len(wnids) + 1} is {wnid!r}, number {number}")
            wnids[int(number)] = wnid
            titles[wnid] = escape(str(synset["words"] or wnid))
    except (ValueError, KeyError, OverflowError) as error:
        raise _kit_error(path, f"{META}: {escape(str(error))}") from error
    if not wnids:
        raise _kit_error(path, f"{META} names no synsets")
    return wnids, titles


def _kit_error(path: Path, what: str) -> UsageError:
    return UsageError(
        f"development kit {escape(str(path))} cannot be used ({what}); "
        "give ILSVRC2012_devkit_t12.tar.gz as it was downloaded"
    )


@dataclass(frozen=True)
class GroundTruth:
    """Classes of the validation images."""

    file: Path
    """File that lists them."""
    labels: dict[str, str]
    """Name of an image without its ending -> class."""
    classes: tuple[str, ...]
    """All classes, sorted."""
    titles: dict[str, str] = field(default_factory=dict)
    """Class -> readable name, of those that have one."""


def strip_ending(name: str) -> str:
    """Return the name of an image without its folder and ending, as lists have it."""
    name = name.rpartition("/")[2]
    for ending in IMAGE_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return name


def validation_stem(place: int) -> str:
    """Return the stem of ILSVRC's validation image `place`, counted from 0."""
    return f"ILSVRC2012_val_{place + 1:08d}"


def is_kit_name(name: str) -> bool:
    """Return whether a folder or a tar of this name is ILSVRC's kit or its boxes, and no class."""
    return name.startswith((DEVKIT, BOXES))


def is_list_name(name: str) -> bool:
    """Return whether a file of this name is one of the lists, which are not rejects."""
    return is_kit_name(name) or name in (SOLUTION, *TITLES) or name.endswith(SYNSET_LABELS)


def read_ground_truth(path: Path) -> GroundTruth:
    """Read the labels of the validation images from a file of any of these kinds.

    Args:
        path: one of the files above, or a folder that holds one.

    Raises:
        UsageError: there is none, or it cannot be parsed.
    """
    if not path.exists():
        raise UsageError(f"labels {escape(str(path))} do not exist; {GIVE_LABELS}")
    if path.name == TRUTH:  # numbers mean something only together with meta.mat
        path = path.parent
    if is_devkit(path):
        kit = read_devkit(path)
        if not kit.truth:
            raise UsageError(f"labels {escape(str(path))} lack {TRUTH}; {GIVE_LABELS}")
        labels = {validation_stem(place): wnid for place, wnid in enumerate(kit.truth)}
        return GroundTruth(path, labels, tuple(sorted(kit.wnids.values())), kit.titles)
    if path.is_dir():
        found = next(_find_labels(path), None)
        if found is None:
            raise UsageError(f"folder {escape(str(path))} holds no labels; {GIVE_LABELS}")
        return read_ground_truth(found)
    return _read_list(path)


def find_ground_truth(source: Path) -> GroundTruth | None:
    """Return the labels that lie in or beside a source, or None."""
    for folder in list_folders(source):
        for path in _find_labels(folder):
            return read_ground_truth(path)
    return None


def find_titles(source: Path, classes: Sequence[str]) -> dict[str, str]:
    """Return readable names of `classes` (WordNet ids) from lists in or beside a source."""
    wanted = {name for name in classes if _WNID.fullmatch(name)}
    for folder in list_folders(source) if wanted else ():
        paths = [*_find_kits(folder), *(folder / name for name in TITLES)]
        for path in filter(Path.exists, paths):
            try:
                titles = read_devkit(path).titles if is_devkit(path) else _read_titles(path)
            except UsageError:
                continue  # a nicety, and perhaps a file that has nothing to do with us
            if wanted & titles.keys():
                return titles
    return {}


def list_folders(source: Path) -> Iterator[Path]:
    """Yield the folders in which lists about a source may lie, the nearest first."""
    source = source.absolute()
    if source.is_dir():
        yield source
    yield source.parent
    if source.parent.name == "CLS-LOC":  # Kaggle: ROOT/ILSVRC/Data/CLS-LOC/val
        yield from source.parent.parents[:3]


def _find_labels(folder: Path) -> Iterator[Path]:
    yield from _find_kits(folder)
    if (folder / SOLUTION).is_file():
        yield folder / SOLUTION
    yield from sorted(folder.glob(f"*{SYNSET_LABELS}"))


def _find_kits(folder: Path) -> Iterator[Path]:
    return filter(is_devkit, (folder / f"{DEVKIT}{ending}" for ending in (*ARCHIVES, "")))


def _read_list(path: Path) -> GroundTruth:
    """Read Kaggle's solution, a list of WordNet ids, or one of names and WordNet ids."""
    lines = _read_lines(path)
    while lines and not lines[-1]:
        del lines[-1]
    if lines and lines[0].lower().startswith("imageid,"):
        del lines[0]
    if not lines:
        raise UsageError(f"labels {escape(str(path))} are empty; {GIVE_LABELS}")
    in_order = len(_split_words(lines[0])) == 1
    labels: dict[str, str] = {}
    for place, line in enumerate(lines):
        words = _split_words(line)
        if not in_order and len(words) == 1 and line.endswith(","):
            continue  # named without a class: the image will be missed, and rejected
        if not words or (len(words) == 1) != in_order or not is_class(words[not in_order]):
            raise UsageError(
                f"labels {escape(str(path))} have a line {line[:80]!r}, which names no "
                f"class; {GIVE_LABELS}"
            )
        name, class_name = (
            (validation_stem(place), words[0]) if in_order else (strip_ending(words[0]), words[1])
        )
        if labels.setdefault(name, class_name) != class_name:
            raise UsageError(
                f"labels {escape(str(path))} have two classes for {escape(name)}, "
                f"{labels[name]!r} and {class_name!r}; remove one"
            )
    return GroundTruth(path, labels, tuple(sorted(set(labels.values()))))


def _split_words(line: str) -> list[str]:
    return line.replace(",", " ").split()


def _read_titles(path: Path) -> dict[str, str]:
    matches = (_TITLE.fullmatch(line) for line in _read_lines(path))
    return {match[1]: escape(match[2]) for match in matches if match}


def _read_lines(path: Path) -> list[str]:
    try:
        text = read_bounded(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"list {escape(str(path))} cannot be read ({error.strerror}); mend it"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"list {escape(str(path))} is no text; {GIVE_LABELS}") from error
    return [line.strip() for line in text.splitlines()]
