"""Format of a ledger: what one rank delivered in one attempt, sample by sample.

    line 1     JSON: everything in `LedgerHeader`, the version of this format
    frames     one a batch: 24 bytes, then 8 bytes a sample (12 for sets beyond 2**32 samples)

A frame, little-endian: CRC-32 of all that follows in it (u4), bytes of the frame (u4), position of
its first sample (u8), samples b (u4), replaced samples r (u4); then b ids that were due (u4), b
checksums of pixels (u4), and for the replaced ones their places 0..b-1 (u4) and what was delivered
instead (u4). A writer that was killed leaves at most one incomplete frame, the last.
"""

from __future__ import annotations

import json
import mmap
import struct
from array import array
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from pipeline.dataset.images import Encoding
from pipeline.dataset.segments import Segment, Segments, parse_segments
from pipeline.stream.config import MAX_POSITION, StreamConfig, split_batch
from pipeline.stream.order import Ids
from pipeline.stream.selection.record import Selection
from pipeline.tools.jsonl import parse_json

VERSION = 3
"""Newest version, of runs over several versions of their data set; those that wrote 1 would take
all checksums of a CPU for `crc32`, and those that wrote 2 know no segments."""
ENDING = ".ledger"
FRAME = struct.Struct("<IIQII")
_AFTER_CRC = 4
CHECKSUMS = "crc32", "crop-crc32", "stored-crc32", "weighted-sum"
_HEADER_LIMIT = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LedgerHeader:
    """First line of a ledger: what one rank is to deliver in one attempt."""

    data_sha256: str
    """`manifest.identity` of the dataset."""
    split: str
    samples: int
    """Number of samples in the split, N; of a mixture, in the splits of all datasets; of segments,
    in those of all."""
    selection: str = ""
    """`Selection.digest`; the file beside the ledger has its name. Empty: all samples of a split,
    each once an epoch. Older files lack it."""
    segments: Segments = ()
    """Versions that were read one after the other; ids count on from one to the next. Empty: one.
    Only then `data_sha256` is not that of all, but of the first."""
    seed: int
    """Seed of order and augmentation."""
    shuffle: str
    """Name of the order with its settings: `full`, `block 16`."""
    crop: str
    """Part of an image: `random`, `resized`, `center`, `whole`. Older files call it `view`."""
    colour: float | tuple[tuple[int, float], ...]
    """Standard deviation of the colour draws, or pairs (first epoch, deviation)."""
    colour_divide: bool = False
    """True if pixels were divided by 1 + colour. Older files lack it."""
    mean: str | tuple[float, ...] | None = "channel"
    """Mean that was subtracted: of each `channel`, the mean `image`, three numbers, or none. Older
    files lack it."""
    pixels: str = ""
    """Other settings that change pixels, `StreamConfig.pixels`. Older files lack it."""
    position: int
    """Samples that the whole job had consumed when the attempt began."""
    batch_size: int
    """Samples in a batch of the whole job."""
    rank: int
    world_size: int
    device: str
    """`cpu`, or another name, such as `gpu`."""
    checksum: str = ""
    """Kind of the checksums of pixels, as `writer` has it, one of `CHECKSUMS`. Empty: `crc32`
    on a CPU, else `weighted-sum`."""

    def __post_init__(self) -> None:
        if not self.checksum:
            kind = "crc32" if self.device == "cpu" else "weighted-sum"
            object.__setattr__(self, "checksum", kind)
        if self.checksum not in CHECKSUMS:
            raise ValueError(
                f"its checksums are {self.checksum!r:.40}, not {', '.join(CHECKSUMS)}: "
                "a later release of Duet wrote it"
            )
        split_batch(self.batch_size, self.rank, self.world_size)  # raises if there is no such rank
        if self.samples < 1 or self.position < 0 or self.batch_size < self.world_size:
            raise ValueError(
                f"out of range: samples={self.samples}, position={self.position}, "
                f"batch_size={self.batch_size}, world_size={self.world_size}"
            )

    @classmethod
    def of(cls, config: StreamConfig, selection: Selection, encoding: Encoding) -> LedgerHeader:
        """Return the header of a stream's ledger.

        Args:
            config: settings of the stream.
            selection: samples that take part.
            encoding: of the images.
        """
        facts = {f.name: getattr(config, f.name) for f in fields(cls) if hasattr(config, f.name)}
        facts["shuffle"] = config.order_name
        facts["split"] = config.stored_split
        facts["colour"] = config.color_plan.given
        facts["device"] = "gpu" if config.on_gpu else "cpu"
        facts["checksum"] = choose_checksum(config, encoding)
        facts["segments"] = selection.segments
        return cls(
            data_sha256=selection.identity,
            samples=selection.stored,
            selection=selection.digest,
            **facts,
        )

    @property
    def id_type(self) -> np.dtype[Any]:
        """Data type of stored ids."""
        return np.dtype("<u4" if self.samples <= 1 << 32 else "<u8")

    def to_line(self) -> bytes:
        """Return the first line of a file."""
        facts = {"ledger": 1 if self.checksum == "crc32" else 2, **asdict(self)}
        if not self.segments:
            del facts["segments"]
        else:
            facts["ledger"] = VERSION
        return (json.dumps(facts) + "\n").encode()

    @classmethod
    def parse(cls, line: bytes) -> LedgerHeader:
        """Read the first line of a file.

        Raises:
            ValueError: the line is not a header; the message says why.
        """
        facts = parse_json(line)
        if not isinstance(facts, dict) or facts.get("ledger") not in range(1, VERSION + 1):
            raise ValueError(f"its first line is not that of a ledger of version 1 to {VERSION}")
        facts = {f.name: f.default for f in fields(cls) if f.default is not MISSING} | facts
        if "view" in facts:  # as it was called, in the words it had
            facts["crop"] = {"centre": "center"}.get(facts["view"], facts["view"])
        if facts["mean"] == "picture":
            facts["mean"] = "image"
        if facts["segments"]:
            facts["segments"] = parse_segments(facts["segments"])
        if isinstance(facts["mean"], list):
            facts["mean"] = tuple(facts["mean"])
        if isinstance(facts["colour"], list):
            facts["colour"] = tuple((start, value) for start, value in facts["colour"])
        try:
            return cls(**{field.name: facts[field.name] for field in fields(cls)})
        except (KeyError, TypeError) as error:
            raise ValueError(f"its first line does not say all: {error}") from error


def choose_checksum(config: StreamConfig, encoding: Encoding) -> str:
    """Return the kind of checksum that costs the least for what a stream delivers.

    Where nothing of the user's changes them, pixels follow from crops that the graph makes anyway,
    or, of raw images, from stored bytes that were checked.
    """
    if config.on_gpu:
        return "weighted-sum"
    if config.augment is not None:
        return "crc32"
    if encoding == "raw" and config.crop != "resized":
        return "stored-crc32"
    return "crc32" if config.pixel_dtype == "uint8" else "crop-crc32"


def encode_frame(
    id_type: np.dtype[Any],
    position: int,
    due: Ids,
    delivered: Ids,
    checksums: npt.NDArray[np.integer[Any]],
) -> bytes:
    """Return one frame; the three arrays are [b], in order of position."""
    (places,) = np.nonzero(due != delivered)
    body = b"".join(
        (
            due.astype(id_type).tobytes(),
            checksums.astype("<u4").tobytes(),
            places.astype("<u4").tobytes(),
            delivered[places].astype(id_type).tobytes(),
        )
    )
    head = FRAME.pack(0, FRAME.size + len(body), position, len(due), len(places))[_AFTER_CRC:]
    crc = isal_zlib.crc32(body, isal_zlib.crc32(head))
    return struct.pack("<I", crc) + head + body


class Deliveries(NamedTuple):
    """Deliveries recorded in a ledger, one entry a sample, all [n]."""

    positions: Ids
    """Position of each, int64."""
    due: Ids
    """Ids that were due there by the order, int64."""
    delivered: Ids
    """Ids of the samples that were delivered, int64."""
    checksums: npt.NDArray[np.uint32]
    """Checksum of the pixels of each."""


@dataclass(frozen=True, eq=False)
class LedgerFile:
    """An open ledger: its frames are located and checked, but not in memory."""

    path: Path
    header: LedgerHeader
    frames: npt.NDArray[np.int64]
    """[frames, 4]: byte offset, position, samples and replaced samples of each, as written."""
    torn: bool
    """True if the last frame is incomplete; it is ignored."""
    damage: str
    """Reason why the rest of the file could not be read; empty if all of it was."""
    limit: int = MAX_POSITION
    """Position from which on a later attempt has read another version; what was delivered there
    does not count."""

    @property
    def start(self) -> int:
        """Lowest delivered position; if there is none, the position of the header."""
        return int(self.frames[:, 1].min()) if len(self.frames) else self.header.position

    @property
    def end(self) -> int:
        """Position after the last delivery; if there is none, the position of the header."""
        if not len(self.frames):
            return self.header.position
        return min(self.limit, int((self.frames[:, 1] + self.frames[:, 2]).max()))

    @property
    def segments(self) -> Segments:
        """Segments of the attempt: those in the header, or the one version."""
        return self.header.segments or (Segment(self.header.data_sha256, self.header.samples),)

    @property
    def superseded(self) -> int:
        """Number of samples in all frames that do not count."""
        ends = self.frames[:, 1] + self.frames[:, 2]
        return int((ends - self.frames[:, 1].clip(min=self.limit)).clip(min=0).sum())

    @property
    def deliveries(self) -> int:
        """Number of samples in all frames."""
        return int(self.frames[:, 2].sum())

    def read(self, first: int, last: int) -> Deliveries:
        """Return the deliveries at positions [first, last) that count."""
        last = min(last, self.limit)
        touching = (self.frames[:, 1] < last) & (self.frames[:, 1] + self.frames[:, 2] > first)
        frames = self.frames[touching]
        parts = []
        if len(frames):
            samples = frames[:, 2] + frames[:, 3]
            ends = frames[:, 0] + FRAME.size + samples * _sample_bytes(self.header)
            start, stop = int(frames[:, 0].min()), int(ends.max())
            with self.path.open("rb") as file:
                file.seek(start)
                content = np.frombuffer(file.read(stop - start), np.uint8)
            for count in np.unique(frames[:, 2]):
                same = frames[frames[:, 2] == count]
                parts.append(self._decode_frames(content, same - [start, 0, 0, 0], int(count)))
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        found = Deliveries(*columns) if columns else Deliveries(*np.zeros((4, 0), np.int64))
        inside = (found.positions >= first) & (found.positions < last)
        return found if inside.all() else Deliveries(*[column[inside] for column in columns])

    def _decode_frames(
        self, content: npt.NDArray[np.uint8], frames: npt.NDArray[np.int64], count: int
    ) -> Deliveries:
        """Decode frames of `count` samples each, which start in `content` at their byte offsets."""
        ids = self.header.id_type
        row = np.dtype([("head", "V", FRAME.size), ("due", ids, count), ("sum", "<u4", count)])
        windows = np.lib.stride_tricks.sliding_window_view(content, row.itemsize)
        rows = windows[frames[:, 0]].view(row)[:, 0]
        due = rows["due"].astype(np.int64)
        delivered = due.copy()
        for k in np.flatnonzero(frames[:, 3]):
            at, replaced = int(frames[k, 0]) + row.itemsize, int(frames[k, 3])
            places = np.frombuffer(content, "<u4", replaced, at)
            delivered[k, places] = np.frombuffer(content, ids, replaced, at + 4 * replaced)
        positions = frames[:, 1:2] + np.arange(count)
        sums = rows["sum"].astype(np.uint32)
        return Deliveries(positions.ravel(), due.ravel(), delivered.ravel(), sums.ravel())


def scan_ledger(path: Path) -> LedgerFile | None:
    """Locate and check all frames of a file; None if its writer was killed in the first line.

    Raises:
        ValueError: the first line is not the header of a ledger; the message says why.
    """
    with path.open("rb") as file:
        line = file.readline(_HEADER_LIMIT)
        if not line.endswith(b"\n") and len(line) < _HEADER_LIMIT:
            return None
        header = LedgerHeader.parse(line)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            with memoryview(content) as view:
                frames, at = _find_frames(view, len(line), _sample_bytes(header))
                torn = _is_torn(view[at:], header)
            damage = "" if torn or at == len(content) else f"damaged at byte {at:,}"
    table = np.frombuffer(frames, np.int64).reshape(-1, 4)
    return LedgerFile(path, header, table, torn, damage)


def _sample_bytes(header: LedgerHeader) -> int:
    """Return the number of bytes of a sample, and of a replacement, in a frame."""
    return header.id_type.itemsize + 4


def _find_frames(view: memoryview, at: int, width: int) -> tuple[array[int], int]:
    """Return the sound frames from byte `at` on, four numbers each, and the byte where they end."""
    frames = array("q")
    size = len(view)
    while at + FRAME.size <= size:
        crc, length, position, count, replaced = FRAME.unpack_from(view, at)
        fits = length == FRAME.size + (count + replaced) * width and at + length <= size
        if not fits or isal_zlib.crc32(view[at + _AFTER_CRC : at + length]) != crc:
            break
        frames.extend((at, position, count, replaced))
        at += length
    return frames, at


def _is_torn(rest: memoryview, header: LedgerHeader) -> bool:
    """Return whether the bytes after the sound frames are an incomplete frame and nothing else."""
    if not rest or not bytes(rest).strip(b"\0"):
        return len(rest) > 0  # a machine that lost its power may keep the length, not the bytes
    if len(rest) < FRAME.size:
        return True
    first, last = split_batch(header.batch_size, header.rank, header.world_size)
    longest = FRAME.size + 2 * (last - first) * _sample_bytes(header)
    length: int = FRAME.unpack_from(rest)[1]
    return len(rest) < length <= longest
