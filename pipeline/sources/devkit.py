"""ILSVRC2012's development kit: which picture of the validation set is of which class.

`data/meta.mat` numbers the synsets and names them; `data/ILSVRC2012_validation_ground_truth.txt`
has that number for picture 1, 2, 3, ... The kit is read as it was handed out, in memory.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import NamedTuple

from pipeline.dataset.tar import members
from pipeline.sources.listing import shown
from pipeline.sources.matlab import read_structs
from pipeline.sources.names import is_class
from pipeline.tools.errors import UsageError

META = "meta.mat"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
ARCHIVES = (".tar.gz", ".tgz", ".tar")

LIMIT = 64 << 20
"""Bytes that a kit, or a list of labels, may unpack to; the real one has a tenth of it."""


class Devkit(NamedTuple):
    """What a development kit says."""

    wnids: dict[int, str]
    """ILSVRC2012_ID -> WordNet id, of the classes that have pictures of their own."""
    titles: dict[str, str]
    """WordNet id -> words."""
    truth: list[str]
    """The WordNet id of validation picture 1, 2, 3, ...; empty if the kit lacks the list."""


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
    for member in members(io.BytesIO(data), str(path)):
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
            titles[wnid] = shown(str(synset["words"] or wnid))
    except (ValueError, KeyError, OverflowError) as error:
        raise _wrong(path, f"{META}: {shown(str(error))}") from error
    if not wnids:
        raise _wrong(path, f"{META} names no synsets")
    return wnids, titles


def _wrong(path: Path, what: str) -> UsageError:
    return UsageError(
        f"development kit {shown(str(path))} cannot be used ({what}); "
        "give ILSVRC2012_devkit_t12.tar.gz as it was downloaded"
    )
