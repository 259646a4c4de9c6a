"""`ShardReader`: reads stored bytes and labels of samples by id, and checks every byte."""

from __future__ import annotations

import errno
import os
import re
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import RLock
from time import perf_counter
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from pipeline.dataset.images import Pixels, Undecodable, decode_image, read_orientation
from pipeline.dataset.index import BLOCK, load_index, sample_key
from pipeline.dataset.manifest import Manifest, tables_folder
from pipeline.dataset.members import (
    Members,
    TextKind,
    TextTable,
    choose_sample,
    field_table,
    find_member_faults,
    list_fields,
    map_members,
    text_files,
)
from pipeline.dataset.samples import group_samples
from pipeline.dataset.tar import read_members
from pipeline.dataset.versions import find_withdrawn
from pipeline.remote.local import Dataset, LocalDataset
from pipeline.stream.order import Ids
from pipeline.stream.timing import Spent
from pipeline.tools.errors import (
    MEDIUM_ERRORS,
    REBUILD,
    DamagedFile,
    DataError,
    DuetError,
    SetupError,
    UsageError,
)
from pipeline.tools.files import is_network_mount
from pipeline.tools.watchdog import FileAccess

Bytes = npt.NDArray[np.uint8]
Flags = npt.NDArray[np.bool_]
N = TypeVar("N", int, Ids)

_OUR_KEY = re.compile("([0-9]{6,})_([0-9]{5,})", re.ASCII)
"""Number and place in a key that `sample_key` gives."""
OPEN_FILES = 256
"""Largest number of shards kept open; the least recently read one is closed beyond it."""


UNUSABLE = "it cannot be used"
"""Beginning of the fault of a member whose bytes are as packed, and that cannot be parsed."""
WITHDRAWN = "withdrawn"
"""Reason for which a sample of an older version is delivered no more, whatever its bytes are."""


class Damage(NamedTuple):
    """A damaged sample: where it is, and why it cannot be used."""

    split: str
    sample: int
    """Sample id: index in the stored order of the split."""
    shard: str
    """File name of the shard."""
    key: str
    """WebDataset key of the sample in its shard."""
    reason: str

    @property
    def remedy(self) -> str:
        """Way out, in a few words."""
        if self.reason == WITHDRAWN:
            return "the newest version of the set is without it"
        if UNUSABLE in self.reason:
            return "its bytes are as they were packed; mend it at its source"
        return "duet verify lists all damage"

    def __str__(self) -> str:
        return f"{self.split} sample {self.sample} ({self.shard}, key {self.key}): {self.reason}"


class ShardReader:
    """Random access to the samples of one split.

    Reads use pread, so a truncated shard or a bad sector damages samples instead of raising SIGBUS.
    Raw images are memory-mapped from their second read on: they are eight times as large as JPEGs,
    and copying them cost 25 % of the throughput of a CPU (measured). Those on a network mount are
    not: a thread that waits for a page of one cannot be left behind where it is DALI's.
    """

    def __init__(
        self, dataset: Dataset, split: str, *, maps: bool = True, fields: Iterable[str] = ()
    ) -> None:
        """Open the index of `split`.

        Args:
            dataset: the shards.
            split: name of the split.
            maps: whether raw images may be mapped. A GPU takes its copies from page-locked memory,
                which a map is not: then every image is read into the caller's buffer.
            fields: members besides the image that will be read.

        Raises:
            UsageError: no such split, or no table of a field.
            DataError: the index is damaged, or a shard of a local set is missing.
        """
        self.manifest = manifest = Manifest.load(dataset.folder)
        """Manifest of the dataset."""
        found = manifest.split(split, dataset.folder)
        if isinstance(dataset, LocalDataset):  # a store's missing shards show when they are fetched
            for shard in found.shards:
                dataset.fetch_shard(shard)
        self.split, self.shards = split, found.shards
        self.encoding = manifest.encoding
        """Encoding of the samples: JPEG, or raw pixels, uint8 [side, side, 3]."""
        self.side = manifest.side
        """Height and width of every image in pixels; None where they differ."""
        self._dataset = dataset
        self._index = load_index(dataset.folder, split, manifest)
        gone = find_withdrawn(dataset.list_withdrawn(), [s.name for s in found.shards], self._index)
        self._withdrawn = frozenset(gone.tolist())
        self._starts = np.cumsum([0, *(shard.samples for shard in found.shards)])
        self._tables = found.tables
        self._texts: dict[TextKind, TextTable] = {}
        self._old_keys: dict[int, dict[int, str]] = {}
        self._members = {field: self._open_members(field) for field in fields}
        self._lock = RLock()  # of the files: `Stream[key]` reads beside the stream's thread
        self._files: OrderedDict[int, _ShardFile] = OrderedDict()
        self._finalizer = weakref.finalize(self, _close_all, self._files)
        self.maps = maps and self.encoding == "raw" and not is_network_mount(dataset.folder)
        """True if images are mapped from their second read on."""
        self._opening = self._reading = self._checking = 0.0
        self._read_before = np.zeros(len(self._index) if self.maps else 0, bool)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def parts(self) -> tuple[ShardReader, ...]:
        """Reader of each dataset: itself; `MixedReader` has several."""
        return (self,)

    def read_labels(self, ids: Ids) -> Ids:
        """Return the labels of samples `ids`, both int64 [b]."""
        return self._index["label"][ids].astype(np.int64)

    def read_crcs(self, ids: Ids) -> Ids:
        """Return the CRC-32 that the stored images of samples `ids` must have, both int64 [b]."""
        return self._index["crc"][ids].astype(np.int64)

    def read_sizes(self, ids: Ids) -> tuple[Ids, Ids]:
        """Return heights and widths in pixels of samples `ids`, all int64 [b]."""
        if self.side is not None:
            sides = np.full(len(ids), self.side, np.int64)
            return sides, sides
        rows = self._index[ids]
        return rows["height"].astype(np.int64), rows["width"].astype(np.int64)

    def find_smaller(self, height: int, width: int, kept: Flags | None = None) -> int | None:
        """Return the first sample that is less high or wide than this in pixels; None: none is.

        Of samples that are not `kept` (bool [N]; None: all are) the size does not matter, unless
        all have the same.
        """
        if self.side is not None:
            return None if height <= self.side >= width else 0
        for start in range(0, len(self._index), BLOCK):
            rows = self._index[start : start + BLOCK]
            smaller = (rows["height"] < height) | (rows["width"] < width)
            if kept is not None:
                smaller &= kept[start : start + BLOCK]
            if smaller.any():
                return start + int(smaller.argmax())
        return None

    def buffer_size(self, ids: Ids) -> int:
        """Return the bytes of the buffer that `read` takes for samples `ids` (int64 [b])."""
        if self.maps:
            ids = ids[~self._read_before[ids]]
        return int(_align(self._index["size"][ids].astype(np.int64)).sum())

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Start to fetch the shards that will be read soon, in this order; returns at once."""
        self._dataset.prefetch([self.shards[number] for number in numbers])

    def advise(self, ids: Ids) -> None:
        """Tell the kernel to read samples `ids` (int64 [b]) from the disk; does not wait."""
        rows = self._index[ids]
        columns = (rows[name].tolist() for name in ("shard", "offset", "size"))
        with self._lock, FileAccess(self._dataset.folder):
            for shard, offset, size in zip(*columns, strict=True):
                # A shard that is not open may have to be fetched first, which takes long.
                if (file := self._files.get(shard)) is not None:
                    os.posix_fadvise(file.number, offset, size, os.POSIX_FADV_WILLNEED)

    def read(self, ids: Ids, buffer: Bytes | None = None) -> tuple[list[Bytes], dict[int, Damage]]:
        """Read and check samples.

        Args:
            ids: the samples, int64 [b].
            buffer: memory to copy to, uint8 [`buffer_size(ids)` or more]; None allocates it.

        Returns:
            The samples, uint8 [size] each, as views of the buffer or of their mapped shards, and
            the damage at each place of `ids` whose bytes are not those that were packed, or whose
            sample was withdrawn.

        Raises:
            DuetError: a whole shard cannot be read or fetched.
        """
        with self._lock:
            return self._read(ids, buffer)

    def _read(self, ids: Ids, buffer: Bytes | None) -> tuple[list[Bytes], dict[int, Damage]]:
        if buffer is None:
            buffer = np.empty(self.buffer_size(ids), np.uint8)
        rows = self._index[ids]
        views, damaged, start = [], {}, 0
        columns = (rows[name].tolist() for name in ("shard", "offset", "size", "crc"))
        for place, (shard, offset, size, crc) in enumerate(zip(*columns, strict=True)):
            if self._withdrawn and (sample := int(ids[place])) in self._withdrawn:
                damaged[place] = self.make_damage(sample, WITHDRAWN)
                views.append(np.zeros(size, np.uint8))
                continue
            if self.maps and self._read_before[ids[place]]:
                file = self._file(shard)
                # Touching what was cut off since the shard was mapped would raise SIGBUS.
                with FileAccess(file.path):
                    whole = os.fstat(file.number).st_size >= offset + size
                    if whole and self._crc(view := file.mapped[offset : offset + size]) == crc:
                        views.append(view)
                        continue
                view = np.empty(size, np.uint8)
            else:
                view = buffer[start : start + size]
                start += _align(size)
            reason = self._fill(view.data, shard, offset, crc)
            if reason and self._recheck(shard):
                reason = self._fill(view.data, shard, offset, crc)
            if reason:
                damaged[place] = self.make_damage(int(ids[place]), reason)
            views.append(view)
        if self.maps:
            self._read_before[ids] = True
        return views, damaged

    def read_members(self, field: str, ids: Ids) -> tuple[list[bytes], dict[int, str]]:
        """Read and check a member of samples.

        Args:
            field: one of those that the reader was opened with.
            ids: the samples, int64 [b].

        Returns:
            Their bytes, and what is wrong with them by place in `ids`.

        Raises:
            DuetError: a whole shard cannot be read or fetched.
        """
        contents, faults = [], {}
        rows, shards = self._members[field][ids], self._index["shard"][ids].tolist()
        with self._lock:
            for place, (shard, row) in enumerate(zip(shards, rows.tolist(), strict=True)):
                offset, size, crc = row
                content = bytearray(size)
                reason = self._fill(memoryview(content), shard, offset, crc)
                if reason and self._recheck(shard):
                    reason = self._fill(memoryview(content), shard, offset, crc)
                if reason:
                    faults[place] = reason
                contents.append(bytes(content))
        return contents, faults

    def read_orientations(self, ids: Ids, images: Sequence[Bytes]) -> list[int]:
        """Return the EXIF orientations 1..8 by which images (uint8 [size]) turn their masks, too.

        Masks that we packed are upright: theirs is 1.
        """
        if not self.manifest.foreign:
            return [1] * len(ids)
        return [read_orientation(image.tobytes()) for image in images]

    def decode(self, ids: Sequence[int]) -> list[Pixels | Damage]:
        """Read, check and decode samples: the pixels of each, or its damage.

        Raises:
            DataError, DuetError: a whole shard cannot be read.
        """
        places = np.array(ids, np.int64)
        views, damages = self.read(places)
        sizes = list(zip(*(sides.tolist() for sides in self.read_sizes(places)), strict=True))
        found: list[Pixels | Damage] = []
        for place, view in enumerate(views):
            try:
                found.append(
                    damages.get(place) or decode_image(view.data, self.encoding, sizes[place])
                )
            except Undecodable as error:
                found.append(self.make_damage(int(ids[place]), str(error)))
        return found

    def take_spent(self) -> Spent:
        """Return the seconds spent in `read` since the last call; `feed` is 0."""
        spent = Spent(self._opening, self._reading, self._checking)
        self._opening = self._reading = self._checking = 0.0
        return spent

    def make_damage(self, sample: int, reason: str) -> Damage:
        """Return where a sample is and why it cannot be used."""
        number = int(self._index["shard"][sample])
        try:
            (key,) = self.read_keys(np.array([sample]))
        except (DuetError, OSError, KeyError):  # of a shard that is damaged, too
            key = "unknown"
        return Damage(self.split, sample, self.shards[number].name, key, reason)

    def read_keys(self, ids: Ids) -> list[str]:
        """Return the WebDataset keys of samples `ids` (int64 [b]).

        They cost next to nothing, but in shards of another tool that were indexed before there was
        a table of keys: then the headers of a shard are read at its first key, and kept.

        Raises:
            DuetError: the table is damaged, or such a shard.
        """
        if (table := self._open_texts("keys")) is not None:
            return table.read(ids)
        numbers = np.searchsorted(self._starts, ids, side="right") - 1
        if self.manifest.foreign:
            offsets = self._index["offset"][ids].tolist()
            places = zip(numbers.tolist(), offsets, strict=True)
            return [self._list_keys(number)[offset] for number, offset in places]
        places = zip(numbers.tolist(), (ids - self._starts[numbers]).tolist(), strict=True)
        return [sample_key(*place) for place in places]

    def read_names(self, ids: Ids) -> list[str] | None:
        """Return the original file names of samples `ids` (int64 [b]), relative to their source.

        None: the set was packed before there was a table of names, or another tool packed it.
        """
        table = self._open_texts("names")
        return None if table is None else table.read(ids)

    def find_sample(self, key: str) -> int:
        """Return the id of the sample with a WebDataset key, or with an original file name.

        Raises:
            KeyError: there is none, or several; the message is one line.
        """
        return choose_sample(key, self.find_samples(key), self.split)

    def find_samples(self, key: str) -> list[int]:
        """Return the ids of the samples with a key, else with a file name; at most two."""
        found = list(islice(self._find_keys(key), 2))
        if not found and (names := self._open_texts("names")) is not None:
            found = list(islice(names.find(key), 2))
        return found

    def _find_keys(self, key: str) -> Iterator[int]:
        """Yield the samples with a key."""
        if (table := self._open_texts("keys")) is not None:
            yield from table.find(key)
        elif self.manifest.foreign:
            for number, start in enumerate(self._starts[:-1].tolist()):
                keys = self._list_keys(number)
                offsets = self._index["offset"][start : self._starts[number + 1]].tolist()
                yield from (start + n for n, one in enumerate(offsets) if keys[one] == key)
        elif found := _OUR_KEY.fullmatch(key):
            number, place = map(int, found.groups())
            if sample_key(number, place) != key:  # 0000001_00000
                return
            if number < len(self.shards) and place < self.shards[number].samples:
                yield int(self._starts[number]) + place

    def _open_texts(self, kind: TextKind) -> TextTable | None:
        """Map a table of texts at its first use; None if the split has none."""
        if kind not in self._texts:
            if text_files(kind)[0] not in self._tables:
                return None
            folder = tables_folder(self._dataset.folder, self.manifest)
            files = [folder / f"{self.split}.{name}" for name in text_files(kind)]
            is_remote = not isinstance(self._dataset, LocalDataset)
            if is_remote and not self._finalizer.alive and not all(map(Path.is_file, files)):
                raise UsageError(
                    f"{kind} of a set in a store are looked up while its stream is open; ask for "
                    f"batch.{kind} before it is closed"
                )
            for name in text_files(kind):
                self._dataset.fetch_table(f"{self.split}.{name}", self._tables[name])
            self._texts[kind] = TextTable(folder, self.split, kind, len(self))
        return self._texts[kind]

    def _open_members(self, field: str) -> Members:
        """Map the table of a field, and check every row."""
        name = field_table(field)
        folder, count = tables_folder(self._dataset.folder, self.manifest), len(self._index)
        if name not in self._tables:
            there = ", ".join(list_fields(self._tables)) or "none"
            how = "index-shards on it" if self.manifest.foreign else "build-shards"
            way = f"run duet {how} anew with --fields {field}"
            if field.endswith("png") and not self.manifest.foreign:
                way += f", or --masks {field} if it is a mask"
            raise UsageError(
                f"split {self.split} of {self._dataset.folder} has no field {field!r} (it has "
                f"{there}); {way}"
            )
        self._dataset.fetch_table(f"{self.split}.{name}", self._tables[name])
        rows = map_members(folder, self.split, field, count, self._tables[name])
        sizes = np.array([shard.bytes for shard in self.shards], np.uint64)
        for start in range(0, count, BLOCK):
            shards = self._index["shard"][start : start + BLOCK]
            if faults := find_member_faults(rows[start : start + BLOCK], sizes[shards]):
                reason = f"sample {start + faults[0]}: the shard ends before it does"
                raise DamagedFile(folder / f"{self.split}.{name}", reason)
        return rows

    def _list_keys(self, number: int) -> dict[int, str]:
        """Return the keys of a shard of another tool, by the offset of each member."""
        if number not in self._old_keys:
            with self._lock, self._dataset.open(self.shards[number]) as file:
                samples = list(group_samples(read_members(file, self.shards[number].name)))
            self._old_keys[number] = {
                part.offset: sample.key for sample in samples for part in sample.parts
            }
        return self._old_keys[number]

    def close(self) -> None:
        """Close all files."""
        self._finalizer()

    def _fill(self, view: memoryview, shard: int, offset: int, crc: int) -> str | None:
        """Read and check one sample; return what is wrong with it, or None."""
        try:
            file = self._file(shard)  # a download may take long, and is watched by itself
            with FileAccess(file.path):
                start = perf_counter()
                count = os.preadv(file.number, [view], offset)
                self._reading += perf_counter() - start
        except OSError as error:
            what = f"cannot be read ({error.strerror})"
            if error.errno in MEDIUM_ERRORS:
                return what
            path = self._dataset.locate_shard(self.shards[shard])
            if error.errno in (errno.EMFILE, errno.ENFILE):
                why = f"cannot be opened ({error.strerror}); raise `ulimit -n`"
                raise SetupError(f"shard {path} {why}") from error
            raise DataError(f"shard {path} {what}; restore it, or {REBUILD}") from error
        if count < len(view):
            return "the shard ends before it does"
        return None if self._crc(view) == crc else "CRC-32 differs"

    def _crc(self, view: memoryview | Bytes) -> int:
        start = perf_counter()
        crc: int = isal_zlib.crc32(view)
        self._checking += perf_counter() - start
        return crc

    def _recheck(self, number: int) -> bool:
        """Return whether a better copy of a shard is there now; the old one is closed then."""
        if better := self._dataset.recheck(self.shards[number]):
            self._files.pop(number).close()
        return better

    def _file(self, number: int) -> _ShardFile:
        file = self._files.get(number)
        if file is None:
            if len(self._files) >= OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            start = perf_counter()
            with self._dataset.open(self.shards[number]) as opened:
                file = self._files[number] = _ShardFile(os.dup(opened.fileno()), opened.name)
            self._opening += perf_counter() - start
        else:
            self._files.move_to_end(number)
        return file


def _align(size: N) -> N:
    """Return sizes in whole cache lines: into the middle of one the kernel copies more slowly."""
    return -(-size // 64) * 64


class _ShardFile:
    """An open shard: the number of its file descriptor, and its path."""

    def __init__(self, number: int, path: str | Path) -> None:
        self.number, self.path = number, path

    @cached_property
    def mapped(self) -> Bytes:
        """Memory-mapped bytes of the shard, uint8 [size]; they live as long as a reference."""
        import torch  # here: commands that only read indices start faster without it

        # `mmap` would hold a file descriptor for each map, for as long as a sample refers to it.
        name, size = f"/proc/self/fd/{self.number}", os.fstat(self.number).st_size
        mapped: Bytes = torch.from_file(name, shared=False, size=size, dtype=torch.uint8).numpy()
        return mapped

    def close(self) -> None:
        os.close(self.number)


def _close_all(files: OrderedDict[int, _ShardFile]) -> None:
    while files:
        files.popitem()[1].close()
