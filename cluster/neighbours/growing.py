"""A features file while it is being written: every worker puts its blocks where they belong.

    features-val.growing        the .npy to be
    features-val.state          uint32 CRC-32 of each block, then uint8 for each row:
                                0 missing, 1 sound, 2 damaged
    features-val.plan.json      `About` of what is being written

No order of writes is relied upon: after a kill, or a loss of power, a block counts if all its rows
are there and its bytes have the CRC-32 that was noted; any other is made again.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from cluster.experiments.neighbors.features import About, Ids, Rows, crc32, part, seal
from pipeline.tools.errors import SetupError
from pipeline.tools.files import sealed, sync_folder

MISSING, SOUND, DAMAGED = 0, 1, 2
CRC = np.dtype("<u4")


class Growing:
    """The file of a split, opened by the driver and by each worker."""

    def __init__(self, base: Path, about: About) -> None:
        """Open what `begin` made.

        Args:
            base: path of the files, less their endings.
            about: what is to be in them.
        """
        self.about = about
        self._base = base
        self._values = np.lib.format.open_memmap(part(base, "growing"), mode="r+")
        self._offset = int(self._values.offset)
        self._file = os.open(part(base, "growing"), os.O_RDWR)
        self._state = os.open(part(base, "state"), os.O_RDWR)

    def put(self, block: int, values: Rows, damaged: Ids) -> None:
        """Write all rows of a block.

        Args:
            block: its number.
            values: [rows, units] of the file's dtype.
            damaged: places in `values` of damaged pictures.

        Raises:
            ValueError: not all rows, or others.
            OSError: the disk does not take them.
        """
        rows = self.about.rows(block)
        if values.shape != (len(rows), self.about.units) or values.dtype != self.about.dtype:
            raise ValueError(f"block {block} is {values.dtype} {values.shape}")
        flags = np.full(len(rows), SOUND, np.uint8)
        flags[damaged] = DAMAGED
        _write(self._file, values.tobytes(), self._offset + rows.start * values[0].nbytes)
        _write(self._state, np.array(crc32(values), CRC).tobytes(), block * CRC.itemsize)
        _write(self._state, flags.tobytes(), self.about.blocks * CRC.itemsize + rows.start)

    def done(self) -> int:
        """Rows that are there (their bytes not looked at)."""
        return int((self._flags() != MISSING).sum())

    def missing(self) -> list[int]:
        """Blocks that are not there, their bytes compared with the noted checksums."""
        flags, crc = self._flags(), self._crc()
        return [block for block in range(self.about.blocks) if not self._whole(block, flags, crc)]

    def forget(self, blocks: list[int]) -> None:
        """Take the rows of blocks for missing."""
        for block in blocks:
            rows = self.about.rows(block)
            start = self.about.blocks * CRC.itemsize + rows.start
            _write(self._state, bytes(len(rows)), start)

    def finish(self, labels: Ids) -> None:
        """Put it on the disk under its name; the features exist after that.

        Raises:
            ValueError: a row is missing.
        """
        flags = self._flags()
        if not flags.all():
            raise ValueError(f"{int((flags == MISSING).sum())} rows are missing")
        os.fsync(self._file)
        part(self._base, "growing").replace(part(self._base, "npy"))
        sync_folder(self._base.parent)
        seal(self._base, self.about, labels, flags == SOUND, self._crc().tolist())
        for name in ("state", "plan.json"):
            part(self._base, name).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the files."""
        os.close(self._file)
        os.close(self._state)
        del self._values

    def _whole(self, block: int, flags: Rows, crc: Rows) -> bool:
        rows = self.about.rows(block)
        if not flags[rows.start : rows.stop].all():
            return False
        return crc32(self._values[rows.start : rows.stop]) == int(crc[block])

    def _crc(self) -> Rows:
        size = self.about.blocks * CRC.itemsize
        return np.frombuffer(os.pread(self._state, size, 0), CRC)

    def _flags(self) -> Rows:
        start = self.about.blocks * CRC.itemsize
        return np.frombuffer(os.pread(self._state, self.about.samples, start), np.uint8)


def begin(base: Path, about: About) -> None:
    """Make the files, unless those of an earlier call that did not end are there.

    Raises:
        SetupError: the disk has no room.
    """
    growing, state, plan = (part(base, name) for name in ("growing", "state", "plan.json"))
    with suppress(FileNotFoundError):
        if _planned(plan) == about.table() and state.stat().st_size == _state_size(about):
            if not part(base, "json").exists() and not growing.exists():
                part(base, "npy").replace(growing)  # killed between the two last renames
            if growing.stat().st_size > about.samples * about.units:
                return
    discard(base)
    try:
        made = np.lib.format.open_memmap(
            growing, mode="w+", dtype=about.dtype, shape=(about.samples, about.units)
        )
        del made
        with growing.open("r+b") as file:  # a full disk shows now
            os.posix_fallocate(file.fileno(), 0, growing.stat().st_size)
        with sealed(state) as file:
            file.write(bytes(_state_size(about)))
        with sealed(plan) as file:
            file.write(json.dumps(about.table()).encode())
    except OSError as error:
        discard(base)
        size = about.samples * about.units * np.dtype(about.dtype).itemsize
        raise SetupError(
            f"{growing} of {size:,} bytes cannot be written ({error.strerror}); make room, or "
            "name another folder with --features"
        ) from error


def discard(base: Path) -> None:
    """Remove features, complete or not."""
    for name in ("json", "npy", "rows.npy", "growing", "state", "plan.json"):
        part(base, name).unlink(missing_ok=True)


def _planned(plan: Path) -> object:
    try:
        return json.loads(plan.read_bytes())
    except ValueError:
        return None


def _state_size(about: About) -> int:
    return about.blocks * CRC.itemsize + about.samples


def _write(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count
