"""`Ledger`: records every delivered sample, so that exactly-once can be proved afterwards.

FOLDER/20261121T003012.123456789Z-r0003of0008-5f0c9a1e.ledger    one rank in one attempt

A 32-bit checksum of each sample's pixels lets deliveries be compared without keeping them. The
header of a file names its kind:

    crop-crc32      CRC-32 of the sample's crop, uint8 [height, width, 3], then of flip (int32),
                    mean (float32 [3]) and, where there is one, divisor (float32), from which DALI
                    makes the delivered numbers: on a CPU, of what no augmentation changes
    stored-crc32    of raw images, which DALI only cuts, flips and normalizes: CRC-32 of the stored
                    bytes' own CRC-32 (uint32), by which they were checked when they were read, of x
                    and y of the crop (float32), flip, mean and divisor; where the position is a
                    multiple of 16, the delivered bytes come before these
    crc32           CRC-32 of the delivered bytes: on a CPU, of all else, as in earlier releases
    weighted-sum    on a GPU, which computes no CRC in parallel: the sum of the bit patterns of the
                    delivered values, each times an odd 64-bit number of its own place, folded to 32
                    bits. Integer sums do not depend on the order in which a GPU makes them, and a
                    change of any one value changes the sum before folding for certain

A crop has a quarter of the bytes of float32 pixels. A checksum is as fast as memory is (8 GB/s of
an EPYC core, whichever it is: CRC-32, xxh3 or a plain sum), so that of the crop costs 18 us of a
core where that of the pixels costs 77 (measured); of raw images those would be a sixth of the
stream's time.
"""

from __future__ import annotations

import os
import secrets
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from isal import isal_zlib

from pipeline.stream.ledger.format import ENDING, LedgerHeader, encode_frame
from pipeline.stream.order import Ids
from pipeline.stream.selection.record import Selection
from pipeline.stream.transfer import to_device
from pipeline.tools.errors import SetupError, UsageError

CHECKED = 16
"""Positions from one to the next whose delivered bytes are in a `stored-crc32`."""
_AT_ONCE = 16
"""Samples summed at a time: their 64-bit products (19 MB at 224 px) stay in the cache of a GPU."""


def compute_crc32s(
    images: torch.Tensor, facts: Sequence[npt.NDArray[Any]] = (), whole: slice = slice(None)
) -> npt.NDArray[np.uint32]:
    """Return the CRC-32 (zlib's) of the bytes of each sample, uint32 [b].

    Args:
        images: [b, ...] on the host, any dtype that NumPy knows; not copied when contiguous.
        facts: [b] or [b, ...] each; their bytes follow those of the sample.
        whole: samples that count; of the others there are only the facts.
    """
    count = len(images)
    rows = _flatten(images.detach()).view(torch.uint8).numpy()
    columns = [one.reshape(count, -1).view(np.uint8) for one in facts]
    tails = np.concatenate(columns, axis=1) if columns else np.empty((count, 0), np.uint8)
    begun = [0] * count
    begun[whole] = [isal_zlib.crc32(row) for row in rows[whole]]
    pairs = zip(tails, begun, strict=True)
    return np.fromiter((isal_zlib.crc32(tail, crc) for tail, crc in pairs), np.uint32, count)


def compute_weighted_sums(images: torch.Tensor) -> torch.Tensor:
    """Return a checksum of each sample, int64 [b] (0..2**32-1), on the device of `images`.

    Nothing here waits for the device.

    Args:
        images: [b, ...], any dtype.
    """
    rows = _flatten(images.detach())
    bits = rows.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[rows.element_size()])
    weights = _weights(bits.shape[1], bits.device)
    parts = [(part * weights).sum(1) for part in torch.split(bits, _AT_ONCE)]
    sums = torch.cat(parts)
    return (sums ^ (sums >> 32)) & 0xFFFFFFFF


def _flatten(images: torch.Tensor) -> torch.Tensor:
    """Return images as [b, values of each]; dense ones are not copied, in either layout."""
    if images.dim() == 4 and images.is_contiguous(memory_format=torch.channels_last):
        images = images.permute(0, 2, 3, 1)
    return images.contiguous().flatten(1)


@lru_cache(maxsize=4)
def _weights(count: int, device: torch.device) -> torch.Tensor:
    """Return `count` fixed odd numbers, int64; PCG64's raw words are the same in every NumPy."""
    words = np.random.PCG64(0).random_raw(count) | np.uint64(1)
    return to_device(torch.from_numpy(words.view(np.int64)), device)


@dataclass(frozen=True)
class _PendingFrame:
    """A batch whose checksums a GPU still computes."""

    position: int
    due: Ids
    delivered: Ids
    sums: torch.Tensor
    ready: torch.cuda.Event

    @property
    def is_ready(self) -> bool:
        return bool(self.ready.query())  # type: ignore[no-untyped-call]


class Ledger:
    """Writes one file: what this rank delivers from now on.

    A frame goes out with one `write` when its batch is recorded: a process that is killed loses
    nothing of what it recorded. On a GPU the frame of a batch is written at the first `record` that
    finds its checksums ready, so that nothing waits for the device; call `flush` before a
    checkpoint is begun.

        with Ledger(RUN / "ledger", header) as ledger:
            ledger.record(position, due, delivered, images)
    """

    def __init__(
        self, folder: Path, header: LedgerHeader, selection: Selection | None = None
    ) -> None:
        """Create `folder` if need be, and a file of its own in it; other files are not touched.

        Args:
            folder: folder for the ledgers of all ranks and attempts of a run.
            header: first line of the file.
            selection: what the header's digest stands for; it is saved beside the file.

        Raises:
            UsageError: the folder cannot be written.
            SetupError: the file cannot (a full disk).
        """
        self.path = folder / _make_name(header)
        """The file."""
        self._header = header
        self.checksum = header.checksum
        """Kind of the checksums."""
        self._pending: deque[_PendingFrame] = deque()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if selection is not None and selection.digest:
                selection.save(folder)
            self._file: int | None = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise UsageError(
                f"ledger folder {folder} cannot be written ({error.strerror}); name another folder"
            ) from error
        self._finalizer = weakref.finalize(self, os.close, self._file)
        self._write(header.to_line())

    def record(
        self,
        position: int,
        due: Ids,
        delivered: Ids,
        images: torch.Tensor,
        facts: Sequence[npt.NDArray[Any]] = (),
    ) -> None:
        """Record a batch of b samples, before anything changes its pixels.

        Args:
            position: position of the first sample of this rank's slice.
            due: ids that are due there by the order, int64 [b].
            delivered: ids that were delivered, other ones where a sample is damaged; int64 [b].
            images: delivered pixels, [b, 3, h, w], on the host or the device; in a file of
                `crop-crc32` the crops, uint8 [b, h, w, 3]. Dense images are not copied.
            facts: in a file of `crop-crc32` or `stored-crc32` what else the pixels follow from, [b]
                or [b, 3] each.

        Raises:
            SetupError: the file cannot be written (a full disk).
            ValueError: the lengths differ, or the ledger is closed.
        """
        if not len(due) == len(delivered) == len(images):
            raise ValueError(f"{len(due)} ids, {len(delivered)} delivered, {len(images)} images")
        if self._file is None:
            raise ValueError(f"ledger {self.path} is closed")
        while self._pending and self._pending[0].is_ready:
            self._write_pending()
        if self.checksum != "weighted-sum":
            is_stored = self.checksum == "stored-crc32"
            whole = slice(-position % CHECKED, None, CHECKED) if is_stored else slice(None)
            self._write_frame(position, due, delivered, compute_crc32s(images, facts, whole))
            return
        sums = compute_weighted_sums(images)
        if not sums.is_cuda:
            self._write_frame(position, due, delivered, sums.numpy())
            return
        host = sums.to("cpu", non_blocking=True)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        ready.record(torch.cuda.current_stream(sums.device))
        self._pending.append(_PendingFrame(position, due.copy(), delivered.copy(), host, ready))

    def flush(self) -> None:
        """Write the batches that are pending; waits for their checksums.

        Raises:
            SetupError: the file cannot be written.
        """
        while self._pending:
            self._pending[0].ready.synchronize()
            self._write_pending()

    def close(self) -> None:
        """Write what is pending and close the file; a second call does nothing."""
        try:
            self.flush()
        finally:
            self._close_file()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_pending(self) -> None:
        frame = self._pending.popleft()
        self._write_frame(frame.position, frame.due, frame.delivered, frame.sums.numpy())

    def _write_frame(
        self, position: int, due: Ids, delivered: Ids, checksums: npt.NDArray[np.integer[Any]]
    ) -> None:
        self._write(encode_frame(self._header.id_type, position, due, delivered, checksums))

    def _write(self, content: bytes) -> None:
        if self._file is None:
            raise ValueError(f"ledger {self.path} is closed")
        try:
            written = os.write(self._file, content)
            if written < len(content):  # a disk that has just become full, or a quota
                os.write(self._file, content[written:])
        except OSError as error:
            self._close_file()  # what would follow a torn frame could not be read
            raise SetupError(
                f"ledger {self.path} cannot be written ({error.strerror}); "
                "make room, or go on without a ledger"
            ) from error

    def _close_file(self) -> None:
        self._pending.clear()  # after an error: nothing may follow a torn frame
        if self._file is not None:
            self._finalizer()
            self._file = None


def _make_name(header: LedgerHeader) -> str:
    """Return a name that no other file has; names sort by time."""
    seconds, nanoseconds = divmod(time.time_ns(), 10**9)
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))
    rank = f"r{header.rank:04d}of{header.world_size:04d}"
    return f"{moment}.{nanoseconds:09d}Z-{rank}-{secrets.token_hex(4)}{ENDING}"
