"""Members of a sample besides its image, masks among them, and labels of a user's own.

A member is read by its byte range and checked by its CRC-32, as the image is. By the last part of
its ending, `json` is parsed, `txt` is text, `cls` a number or a text, `npy` an array, and all else
is bytes. A mask is a PNG of one channel and eight bits, decoded to its values: palette entries stay
numbers. The DALI graph cuts, resizes and flips it with its image.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.dataset.images import Pixels, decode_mask
from pipeline.stream.config import StreamConfig
from pipeline.stream.mixture import MixedReader
from pipeline.stream.order import Ids
from pipeline.stream.shard_reader import UNUSABLE, Bytes, Damage, ShardReader
from pipeline.tools.errors import DataError, UsageError, summarize_error
from pipeline.tools.jsonl import parse_json
from pipeline.tools.tables import refuse_masked
from pipeline.tools.units import cpu_count

Labels = npt.NDArray[Any]
"""float32 or int64, [N] or [N, k]: the label of each sample, by id."""


class SampleMembers(NamedTuple):
    """Members of one sample, by field."""

    fields: dict[str, Any]
    """Parsed content of each of the stream's `fields`."""
    masks: dict[str, Pixels]
    """uint8 [height, width, 1] of each of the stream's `masks`, as large as the stored image."""


@dataclass(frozen=True, eq=False)
class StoredSample:
    """One sample as it is stored: neither cut nor normalized."""

    id: int
    """Place in the stored order of the split."""
    key: str
    """WebDataset key."""
    name: str | None
    """Original file name, where the set has a table of names."""
    label: Any
    """int, the place of its class, -1 without labels; with labels of a user's own its row."""
    pixels: Pixels
    """uint8 [height, width, 3], RGB."""
    fields: dict[str, Any]
    """Parsed content of each of the stream's `fields`."""
    masks: dict[str, Pixels]
    """uint8 [height, width] of each of the stream's `masks`."""


class MemberReader:
    """Reads, checks and parses the members of samples that a config asks for."""

    def __init__(self, reader: ShardReader | MixedReader, config: StreamConfig) -> None:
        """Args: a reader that was opened with the fields and masks of the config; the config."""
        self._reader, self._config = reader, config
        # Pillow unpacks without the interpreter's lock.
        self._pool = ThreadPoolExecutor(config.threads or cpu_count()) if config.masks else None

    def read(
        self, ids: Ids, images: Sequence[Bytes]
    ) -> tuple[list[SampleMembers], dict[int, Damage]]:
        """Return the members of samples `ids` (int64 [b]), and the damage by place in `ids`.

        `images` are the stored bytes of the samples, whose EXIF data may turn the masks.

        Raises:
            DuetError: a whole shard cannot be read or fetched.
        """
        found = [SampleMembers({}, {}) for _ in ids]
        faults: dict[int, str] = {}
        for name in self._config.fields:
            contents, broken = self._reader.read_members(name, ids)
            parsed: Iterable[Any] = map(partial(_attempt, find_parser(name)), contents)
            _collect(name, parsed, broken, [one.fields for one in found], faults)
        for name in self._config.masks:
            contents, broken = self._reader.read_members(name, ids)
            sizes = zip(*(sides.tolist() for sides in self._reader.read_sizes(ids)), strict=True)
            turns = self._reader.read_orientations(ids, images)
            apply: Callable[..., Iterable[Any]] = map if self._pool is None else self._pool.map
            decoded = apply(partial(_attempt, decode_mask), contents, sizes, turns)
            _collect(name, decoded, broken, [one.masks for one in found], faults)
        return found, {
            place: self._reader.make_damage(int(ids[place]), fault)
            for place, fault in faults.items()
        }

    def read_sample(self, key: str | int, labels: Labels | None) -> StoredSample:
        """Read, check and decode one sample.

        Args:
            key: its WebDataset key, original file name or id.
            labels: of a user's own.

        Raises:
            KeyError: there is no such sample, or several; the message is one line.
            DataError: it is damaged.
            DuetError: its shard cannot be read or fetched.
        """
        reader = self._reader
        try:
            sample = reader.find_sample(key) if isinstance(key, str) else operator.index(key)
        except TypeError as error:
            raise KeyError(f"{key!r:.60} is no key, file name or id of a sample") from error
        if not 0 <= sample < len(reader):
            raise KeyError(f"split {reader.split} has samples 0 to {len(reader) - 1}, no {sample}")
        ids = np.array([sample])
        images, _ = reader.read(ids)
        (pixels,), ((fields, masks),), damaged = reader.decode([sample]), *self.read(ids, images)
        for damage in (pixels, damaged.get(0)):
            if isinstance(damage, Damage):
                raise DataError(f"{damage}; {damage.remedy}")
        names = reader.read_names(ids)
        return StoredSample(
            id=sample,
            key=reader.read_keys(ids)[0],
            name=None if names is None else names[0],
            label=int(reader.read_labels(ids)[0]) if labels is None else labels[sample],
            pixels=np.array(pixels),
            fields=fields,
            masks={name: mask[:, :, 0] for name, mask in masks.items()},
        )

    def close(self) -> None:
        """End the threads that decode masks."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _attempt(parse: Callable[..., Any], *given: Any) -> tuple[Any, str | None]:
    """Return the parsed content of a member, and what is wrong with it."""
    try:
        return parse(*given), None
    except Exception as error:  # parsers raise many kinds of exception on damaged input
        return None, f"{UNUSABLE} ({summarize_error(error)})"


def _collect(
    name: str,
    parsed: Iterable[tuple[Any, str | None]],
    broken: Mapping[int, str],
    found: Sequence[dict[str, Any]],
    faults: dict[int, str],
) -> None:
    """Put the parsed members of a field where they belong, and their faults by place."""
    for place, (value, fault) in enumerate(parsed):
        found[place][name] = value
        if fault := broken.get(place, fault):
            faults.setdefault(place, f"its .{name}: {fault}")


def find_parser(field: str) -> Callable[[bytes], Any]:
    """Return what makes the value of a field of its bytes, by the last part of its ending."""
    return _PARSERS.get(field.rpartition(".")[2], bytes)


def _parse_class(content: bytes) -> int | str:
    text = content.decode().strip()
    return int(text) if text.removeprefix("-").isdecimal() else text


def _parse_array(content: bytes) -> npt.NDArray[Any]:
    """Return the array of a NumPy file.

    `np.load` parses a header as Python, and CPython 3.11 fails if two threads do so at a time:
    whoever loads an array beside a stream would make its samples look damaged.
    """
    wide = content[6:7] != b"\1"  # versions 2 and 3 of the format
    start = 12 if wide else 10
    end = start + int.from_bytes(content[8:start], "little")
    found = _NPY_HEADER.fullmatch(content[start:end].decode("latin-1"))
    if not content.startswith(b"\x93NUMPY") or found is None or end > len(content):
        raise ValueError("no .npy with an array of numbers")
    shape = [int(one) for one in found[3].split(",") if one.strip()]
    flat = np.frombuffer(content, np.dtype(found[1]), math.prod(shape), end)
    return flat.reshape(shape, order="F" if found[2] == "True" else "C").copy(order="K")


_NPY_HEADER = re.compile(
    r"\{'descr': '([<>|=][biufcSU][0-9]+)', 'fortran_order': (True|False), "
    r"'shape': \(([0-9, ]*)\), *\} *\n?"
)
_PARSERS: dict[str, Callable[[bytes], Any]] = {
    "json": parse_json,
    "txt": bytes.decode,
    "cls": _parse_class,
    "npy": _parse_array,
}


def load_labels(given: Any, count: int) -> Labels | None:
    """Return labels of a user's own; None where they are the classes.

    Args:
        given: `StreamConfig.labels`.
        count: number of samples of the split, N.

    Raises:
        UsageError: of another type or number; or a file that cannot be read.
    """
    if isinstance(given, str) and given == "class":
        return None
    if given is None:
        return np.broadcast_to(np.int64(-1), (count,))
    what = "labels"
    if isinstance(given, str | os.PathLike):
        what = f"labels {os.fspath(given)}"
        try:
            given = np.load(given, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy raises many kinds for a damaged header
            raise UsageError(
                f"{what} cannot be read ({summarize_error(error)}); name a .npy file"
            ) from error
    refuse_masked(what, given)
    given = given.detach().cpu() if hasattr(given, "detach") else given  # a tensor
    try:
        labels = given if isinstance(given, np.memmap) else np.asarray(given).copy()
    except (TypeError, ValueError) as error:  # bfloat16, rows of unequal lengths
        raise UsageError(f"{what} are no array ({summarize_error(error)})") from error
    if labels.dtype not in (np.float32, np.int64):
        raise UsageError(
            f"{what} are {labels.dtype}; give float32 or int64, as by .astype('float32')"
        )
    if labels.ndim not in (1, 2) or len(labels) != count:
        raise UsageError(
            f"{what} have the shape {list(labels.shape)}; the split has {count:,} samples, and "
            f"takes [{count}] or [{count}, k], by sample id"
        )
    return labels
