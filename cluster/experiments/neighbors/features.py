"""fc7 of every image of a split, in a file that any numpy maps, and what it is of.

    RUN/neighbours/features-val.npy        float16 or float32 [N, units], rows in stored order
    RUN/neighbours/features-val.rows.npy   label int32 [N], sound uint8 [N] (0: a damaged image)
    RUN/neighbours/features-val.json       `About`, and a CRC-32 of every block; written last

A feature is what fc8 reads in evaluation: fc7 after ReLU, halved as the dropout of the paper does
(section 4.2), column a before column b: 4096 units at width 1. Rows of damaged images are zeros.

A run, its checkpoint and a data set of the same classes.

A features file while it is being written: every worker puts its blocks where they belong.

    features-val.growing        the .npy to be
    features-val.state          uint32 CRC-32 of each block, then uint8 for each row:
                                0 missing, 1 sound, 2 damaged
    features-val.plan.json      `About` of what is being written

No order of writes is relied upon: after a kill, or a loss of power, a block counts if all its rows
are there and its bytes have the CRC-32 that was noted; any other is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from cluster.checkpoint.format import Checkpoint, choose_checkpoint, read_table
from cluster.checkpoint.storage import open_storage
from cluster.config import Config, read_run_config
from cluster.run.events import Event, Warned
from cluster.run.folder import CONFIG, QUARANTINE
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.dataset import fetch_metadata
from pipeline.tools.errors import DataError, SetupError, UsageError
from pipeline.tools.files import atomic_write, sha256, sync_folder

FOLDER = "neighbours"
"""Of RUN, for all that is written here."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What features are made from."""

    run: Path
    config: Config
    found: Checkpoint
    checkpoint_sha256: str
    """As `fingerprint` has it."""
    data: str
    manifest: Manifest
    metadata: Path
    """Local folder of the manifest."""
    data_sha256: str
    """`pipeline.dataset.manifest.identity`."""
    quarantine: Path
    """Where damaged images are listed."""


def opened(run: Path, data: str, step: int | None = None) -> Trained:
    """Find the checkpoint of a run and make sure that the data are of its classes.

    Args:
        run: folder of the run.
        data: data set, a folder or an address.
        step: of the checkpoint; None: the newest sound one.

    Raises:
        UsageError: no run, no (such) checkpoint, no data set, or one of other classes.
        DataError: all checkpoints or the manifest are damaged.
        StoreError: a store does not answer.
    """
    config, trained_on = settings(run)
    found = choose_checkpoint(run, config.store, _tell, step)
    folder = fetch_metadata(data, **config.cached)
    manifest = Manifest.load(folder)
    if manifest.classes != found.classes:
        raise UsageError(
            f"data set {data} has {len(manifest.classes)} classes, not the {len(found.classes)} "
            f"of the run in {run} or not in that order; name a data set of the run's classes"
        )
    data_sha256 = identity(folder)
    quarantine = run / QUARANTINE
    if data_sha256 != trained_on:
        _warn(f"{data} is not the data set of the training; its own mean is subtracted")
        # The run's list names images by their places in another set.
        quarantine = run / FOLDER / f"quarantine-{data_sha256[:12]}.jsonl"
    return Trained(
        run=run,
        config=config,
        found=found,
        checkpoint_sha256=fingerprint(run, config, found.name),
        data=data,
        manifest=manifest,
        metadata=folder,
        data_sha256=data_sha256,
        quarantine=quarantine,
    )


def settings(run: Path) -> tuple[Config, str]:
    """Read the settings of a run, and the identity of its data set.

    Raises:
        UsageError: it is no run folder.
    """
    if not (run / CONFIG).is_file():
        raise UsageError(
            f"{run} is no run folder (it has no {CONFIG}); name one that cluster.train made"
        )
    return read_run_config(run / CONFIG)


def fingerprint(run: Path, config: Config, name: str) -> str:
    """One SHA-256 for all files of a checkpoint: of their names and hashes.

    Raises:
        ValueError, KeyError, TypeError, OSError, DuetError: it is damaged, or not there.
    """
    files: dict[str, Any] = read_table(open_storage(run, config.store), name)["files"]
    lines = [f"{file} {files[file]['sha256']}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _warn(text: str) -> None:
    sys.stderr.write(f"warning: {text}\n")


def _tell(event: Event) -> None:
    if isinstance(event, Warned):
        _warn(event.text)


VERSION = 1
BLOCK = 512
"""Rows that are written, and later checked, together."""
ROWS = np.dtype([("label", "<i4"), ("sound", "u1")])

Rows = npt.NDArray[Any]
"""Floats [n, units]."""
Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class About:
    """What features are of: two files with the same are the same, but for rounding."""

    split: str
    samples: int
    """N."""
    units: int
    dtype: str
    """float16 or float32."""
    classes: tuple[str, ...]
    data_sha256: str
    """`pipeline.dataset.manifest.identity` of the data set."""
    step: int
    checkpoint: str
    """Name of the checkpoint."""
    checkpoint_sha256: str
    """`trained.fingerprint` of the checkpoint."""

    @property
    def blocks(self) -> int:
        """How many blocks there are; the last one may be short."""
        return -(-self.samples // BLOCK)

    def rows(self, block: int) -> range:
        """The rows of a block."""
        return range(block * BLOCK, min((block + 1) * BLOCK, self.samples))

    def table(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {"version": VERSION, **asdict(self), "classes": list(self.classes)}

    @classmethod
    def of(cls, table: dict[str, Any]) -> About:
        """Read what `table` made.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else.
        """
        if table.get("version") != VERSION:
            raise ValueError(f"version {table.get('version')}, this program reads {VERSION}")
        known = {field.name: table[field.name] for field in fields(cls)}
        return cls(**known | {"classes": tuple(known["classes"])})

    def differs(self, other: About) -> str:
        """In words, in what features of `other` are not the same; "" if they are."""
        if self.data_sha256 != other.data_sha256:
            return f"data set (manifest {self.data_sha256[:12]}, not {other.data_sha256[:12]})"
        if self.checkpoint_sha256 != other.checkpoint_sha256:
            one, two = self.checkpoint_sha256[:12], other.checkpoint_sha256[:12]
            return f"run or step (checkpoint {self.checkpoint} {one}, not {other.checkpoint} {two})"
        return "split" if self.split != other.split else ""


def stem(folder: Path, split: str) -> Path:
    """Path of the files of a split, less their endings."""
    return folder / f"features-{split}"


def part(base: Path, ending: str) -> Path:
    """Path of one of them."""
    return base.with_name(f"{base.name}.{ending}")


class Features:
    """Features that are complete, mapped into memory; see the head of this file."""

    def __init__(self, base: Path) -> None:
        """Open them; `base` is their path, less the endings.

        Raises:
            UsageError: there are none.
            DataError: they are damaged.
        """
        self.path = path = part(base, "json")
        try:
            table = json.loads(path.read_bytes())
            self.about = About.of(table)
            self._crc: list[int] = table["crc32"]
            if sha256(part(base, "rows.npy")) != table["rows_sha256"]:
                raise ValueError(f"{base.name}.rows.npy is not the one it was sealed with")
            rows = np.load(part(base, "rows.npy"))
            self.values: Rows = np.load(part(base, "npy"), mmap_mode="r")
            shape = (self.about.samples, self.about.units)
            if self.values.shape != shape or self.values.dtype != self.about.dtype:
                raise ValueError(f"{base.name}.npy is {self.values.dtype} {self.values.shape}")
        except FileNotFoundError as error:
            if not path.exists():
                raise UsageError(f"there are no features {path}; {MAKE}") from error
            raise DataError(f"features {error.filename} are gone; {ANEW}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise DataError(f"features {path} cannot be read ({reason}); {ANEW}") from error
        self.labels: Ids = rows["label"].astype(np.int64)
        """[N]: places in `about.classes`."""
        self.sound: Flags = rows["sound"] > 0
        """[N]: False where the image is damaged and the row zeros."""

    def verify(self) -> None:
        """Compare every block with its CRC-32.

        Raises:
            DataError: one differs; names its rows.
        """
        for block, crc in enumerate(self._crc):
            rows = self.about.rows(block)
            if crc32(self.values[rows.start : rows.stop]) != crc:
                raise DataError(
                    f"features {self.path}: rows {rows.start} to "
                    f"{rows.stop - 1} are not those that were written; {ANEW}"
                )


def seal(base: Path, about: About, labels: Ids, sound: Flags, crc: list[int]) -> None:
    """Write what is beside the .npy; with the .json the features exist."""
    rows = np.zeros(about.samples, ROWS)
    rows["label"], rows["sound"] = labels, sound
    with atomic_write(part(base, "rows.npy")) as file:
        np.save(file, rows)
    table = about.table() | {
        "sha256_of": "labels and sound flags; the features themselves have a CRC-32 per block",
        "rows_sha256": sha256(part(base, "rows.npy")),
        "block": BLOCK,
        "crc32": crc,
        "damaged": int((~sound).sum()),
    }
    with atomic_write(part(base, "json")) as file:
        file.write((json.dumps(table) + "\n").encode())


def crc32(rows: Rows) -> int:
    """CRC-32 of rows as they lie in the file."""
    return int(isal_zlib.crc32(np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data))


MAKE = "make them with python -m cluster.experiments.neighbors RUN --data DATA"
ANEW = "make them again with python -m cluster.experiments.neighbors RUN --data DATA --anew"


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
            damaged: places in `values` of damaged images.

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
        with atomic_write(state) as file:
            file.write(bytes(_state_size(about)))
        with atomic_write(plan) as file:
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
