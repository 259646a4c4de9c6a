"""fc7 features of every image of a split, in files that NumPy maps.

    RUN/neighbours/features-val.npy        float16 or float32 [N, units], rows in stored order
    RUN/neighbours/features-val.rows.npy   label int32 [N], sound uint8 [N] (0: a damaged image)
    RUN/neighbours/features-val.json       `FeatureInfo`, and a CRC-32 of every block; written last

A feature is an input of fc8 in evaluation: fc7 after ReLU, halved as the dropout of the paper does
(section 4.2), column a before column b: 4096 units at width 1. Rows of damaged images are zeros.

While the features are computed there are instead

    features-val.growing        the .npy to be
    features-val.state          uint32 CRC-32 of each block, then uint8 for each row:
                                0 missing, 1 sound, 2 damaged
    features-val.plan.json      `FeatureInfo` of what is being written

The order of writes does not matter: after a kill, or a loss of power, a block counts if all its
rows are marked and its bytes have the recorded CRC-32; any other block is computed again.
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
from cluster.run.console import print_warning
from cluster.run.folder import CONFIG, QUARANTINE
from pipeline.dataset.manifest import Manifest, identity
from pipeline.remote.dataset import locate_dataset
from pipeline.tools.errors import DataError, SetupError, UsageError, summarize_error
from pipeline.tools.files import atomic_write, sha256, sync_path
from pipeline.tools.jsonl import parse_json

FOLDER = "neighbours"
"""Folder in RUN for all files of both commands."""
VERSION = 1
BLOCK_ROWS = 512
"""Rows that are written, and later verified, together."""
ROWS = np.dtype([("label", "<i4"), ("sound", "u1")])
MISSING, SOUND, DAMAGED = 0, 1, 2
ENDINGS = ("json", "npy", "rows.npy", "growing", "state", "plan.json")
COMMAND = "duet neighbors RUN"
MAKE = f"make them with {COMMAND}"
REMAKE = f"make them again with {COMMAND} --anew"

Rows = npt.NDArray[Any]
"""Floats [n, units]."""
Ids = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """A run, its checkpoint, and the data set that features are computed of."""

    run: Path
    config: Config
    checkpoint: Checkpoint
    checkpoint_sha256: str
    """Hash of all its files, see `hash_checkpoint`."""
    data: str
    manifest: Manifest
    metadata: Path
    """Local folder of the manifest."""
    data_sha256: str
    """`pipeline.dataset.manifest.identity` of the data set."""
    quarantine: Path
    """File that lists damaged images."""


def open_source(
    run: Path, data: str, named: str | None = None, best: bool = False
) -> FeatureSource:
    """Choose the checkpoint of a run and check that the data set has the run's classes.

    Args:
        run: folder of the run.
        data: data set, a folder or an address; "": that of the run.
        named: step or folder of the checkpoint; None: the newest sound one.
        best: choose the one with the lowest validation error instead.

    Raises:
        UsageError: no run, no (such) checkpoint, no data set, or one of other classes.
        DataError: all checkpoints or the manifest are damaged.
        StoreError: a store does not answer.
    """
    config, trained_on = read_run_config(run / CONFIG)
    checkpoint = choose_checkpoint(run, config.store, print_warning, named, best)
    data, folder = locate_dataset(run, data, **config.cached)
    manifest = Manifest.load(folder)
    if manifest.classes != checkpoint.classes:
        raise UsageError(
            f"data set {data} has {len(manifest.classes)} classes, not the "
            f"{len(checkpoint.classes)} of the run in {run} or not in that order; name a data set "
            "of the run's classes"
        )
    data_sha256 = identity(folder)
    quarantine = run / QUARANTINE
    if data_sha256 != trained_on:
        text = f"{data} is not the data set of the training; its own mean is subtracted"
        sys.stderr.write(f"warning: {text}\n")
        # The run's list names images by their positions in another data set.
        quarantine = run / FOLDER / f"quarantine-{data_sha256[:12]}.jsonl"
    return FeatureSource(
        run=run,
        config=config,
        checkpoint=checkpoint,
        checkpoint_sha256=hash_checkpoint(run, config, checkpoint.name),
        data=data,
        manifest=manifest,
        metadata=folder,
        data_sha256=data_sha256,
        quarantine=quarantine,
    )


def hash_checkpoint(run: Path, config: Config, name: str) -> str:
    """Return one SHA-256 over the names and hashes of all files of a checkpoint.

    Raises:
        ValueError, KeyError, TypeError, OSError, DuetError: it is damaged, or does not exist.
    """
    files: dict[str, Any] = read_table(open_storage(run, config.store), name)["files"]
    lines = [f"{file} {files[file]['sha256']}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class FeatureInfo:
    """Origin of features: two files of the same origin are equal, except for rounding."""

    split: str
    samples: int
    """Number of images, N."""
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
    """`hash_checkpoint` of the checkpoint."""

    @property
    def blocks(self) -> int:
        """Number of blocks; the last one may be short."""
        return -(-self.samples // BLOCK_ROWS)

    def rows(self, block: int) -> range:
        """Return the rows of a block."""
        return range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self.samples))

    def to_table(self) -> dict[str, Any]:
        """Return the JSON object that `from_table` reads."""
        return {"version": VERSION, **asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> FeatureInfo:
        """Read a JSON object of `to_table`.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: it is something else.
        """
        if table.get("version") != VERSION:
            raise ValueError(f"version {table.get('version')}, this program reads {VERSION}")
        known = {field.name: table[field.name] for field in fields(cls)}
        return cls(**known | {"classes": tuple(known["classes"])})

    def describe_difference(self, other: FeatureInfo) -> str:
        """Say what makes features of `other` differ from these; "" if nothing does."""
        if self.data_sha256 != other.data_sha256:
            return f"data set (manifest {self.data_sha256[:12]}, not {other.data_sha256[:12]})"
        if self.checkpoint_sha256 != other.checkpoint_sha256:
            one, two = self.checkpoint_sha256[:12], other.checkpoint_sha256[:12]
            return f"run or step (checkpoint {self.checkpoint} {one}, not {other.checkpoint} {two})"
        return "split" if self.split != other.split else ""


def locate_features(folder: Path, split: str, ending: str) -> Path:
    """Return the path of a file of a split's features; `ending` without its dot."""
    return folder / f"features-{split}.{ending}"


class Features:
    """Complete features of a split, mapped into memory."""

    def __init__(self, folder: Path, split: str) -> None:
        """Open the files.

        Raises:
            UsageError: there are none.
            DataError: they are damaged.
        """
        self.path = locate_features(folder, split, "json")
        npy, rows_npy = (locate_features(folder, split, ending) for ending in ("npy", "rows.npy"))
        try:
            table = parse_json(self.path.read_bytes())
            self.about = FeatureInfo.from_table(table)
            self._crc: list[int] = table["crc32"]
            if sha256(rows_npy) != table["rows_sha256"]:
                raise ValueError(f"{rows_npy.name} is not the one it was sealed with")
            rows = np.load(rows_npy)
            self.values: Rows = np.load(npy, mmap_mode="r")
            shape = (self.about.samples, self.about.units)
            if self.values.shape != shape or self.values.dtype != self.about.dtype:
                raise ValueError(f"{npy.name} is {self.values.dtype} {self.values.shape}")
        except FileNotFoundError as error:
            if not self.path.exists():
                raise UsageError(f"there are no features {self.path}; {MAKE}") from error
            raise DataError(f"features {error.filename} are gone; {REMAKE}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            reason = summarize_error(error)
            raise DataError(f"features {self.path} cannot be read ({reason}); {REMAKE}") from error
        self.labels: Ids = rows["label"].astype(np.int64)
        """[N]: indices into `about.classes`."""
        self.sound: Flags = rows["sound"] > 0
        """[N]: False where the image is damaged and the row zeros."""

    def verify(self) -> None:
        """Compare every block with its CRC-32.

        Raises:
            DataError: one differs; names its rows.
        """
        for block, crc in enumerate(self._crc):
            rows = self.about.rows(block)
            if compute_crc32(self.values[rows.start : rows.stop]) != crc:
                raise DataError(
                    f"features {self.path}: rows {rows.start} to {rows.stop - 1} are not those "
                    f"that were written; {REMAKE}"
                )


def seal_features(
    folder: Path, info: FeatureInfo, labels: Ids, sound: Flags, crc: list[int]
) -> None:
    """Write the files beside the .npy; the features exist as soon as the .json does."""
    rows = np.zeros(info.samples, ROWS)
    rows["label"], rows["sound"] = labels, sound
    path = locate_features(folder, info.split, "rows.npy")
    with atomic_write(path) as file:
        np.save(file, rows)
    table = info.to_table() | {
        "sha256_of": "labels and sound flags; the features themselves have a CRC-32 per block",
        "rows_sha256": sha256(path),
        "block": BLOCK_ROWS,
        "crc32": crc,
        "damaged": int((~sound).sum()),
    }
    with atomic_write(locate_features(folder, info.split, "json")) as file:
        file.write((json.dumps(table) + "\n").encode())


def compute_crc32(rows: Rows) -> int:
    """Return the CRC-32 of rows as they lie in the file."""
    return int(isal_zlib.crc32(np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data))


class FeatureWriter:
    """Unfinished features of a split, opened by the driver and by each worker."""

    def __init__(self, folder: Path, info: FeatureInfo) -> None:
        """Open the files that `begin_features` made."""
        self.about, self._folder = info, folder
        self._path = locate_features(folder, info.split, "growing")
        self._values: np.memmap[Any, np.dtype[Any]] = np.lib.format.open_memmap(
            self._path, mode="r"
        )
        state = locate_features(folder, info.split, "state")
        self._crc: Rows = np.memmap(state, "<u4", "r+", shape=info.blocks)
        self._flags: Rows = np.memmap(state, "u1", "r+", self._crc.nbytes, info.samples)

    def put(self, block: int, values: Rows, damaged: Ids) -> None:
        """Write all rows of a block.

        Args:
            block: its number.
            values: [rows, units] of the file's dtype.
            damaged: indices into `values` of damaged images.

        Raises:
            ValueError: rows are missing, or are of another size or dtype.
            OSError: the disk does not take them.
        """
        rows = self.about.rows(block)
        if values.shape != (len(rows), self.about.units) or values.dtype != self.about.dtype:
            raise ValueError(f"block {block} is {values.dtype} {values.shape}")
        # Not by the map: on a file system that is full a write raises, a map ends the process.
        with self._path.open("r+b") as file:
            file.seek(self._values.offset + rows.start * values[0].nbytes)
            file.write(np.ascontiguousarray(values).data)
        self._crc[block] = compute_crc32(values)
        flags = np.full(len(rows), SOUND, np.uint8)
        flags[damaged] = DAMAGED
        self._flags[rows.start : rows.stop] = flags

    def count_rows(self) -> int:
        """Count the rows that are marked as written; their bytes are not compared."""
        return int((self._flags != MISSING).sum())

    def reset_incomplete(self) -> list[int]:
        """Mark the rows of incomplete blocks as missing, and return these blocks, ascending.

        In an incomplete block rows are missing, or the bytes differ from their CRC-32.
        """
        incomplete = []
        for block in range(self.about.blocks):
            rows = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
            if not self._flags[rows].all() or compute_crc32(self._values[rows]) != self._crc[block]:
                self._flags[rows] = MISSING
                incomplete.append(block)
        return incomplete

    def finish(self, labels: Ids) -> None:
        """Put the file on the disk under its name and seal it; the features exist after that.

        Raises:
            ValueError: a row is missing.
        """
        flags, crc = np.array(self._flags), self._crc.tolist()
        if not flags.all():
            raise ValueError(f"{int((flags == MISSING).sum())} rows are missing")
        with self._path.open("r+b") as file:
            os.fsync(file.fileno())
        self._path.replace(locate_features(self._folder, self.about.split, "npy"))
        sync_path(self._folder)
        seal_features(self._folder, self.about, labels, flags == SOUND, crc)
        for ending in ("state", "plan.json"):
            locate_features(self._folder, self.about.split, ending).unlink(missing_ok=True)


def begin_features(folder: Path, info: FeatureInfo) -> None:
    """Make the files of unfinished features, unless a call that was killed left them.

    Raises:
        SetupError: the disk has no room.
    """
    growing, state, plan = (
        locate_features(folder, info.split, ending) for ending in ("growing", "state", "plan.json")
    )
    state_size = info.blocks * np.dtype("<u4").itemsize + info.samples
    is_same = False
    with suppress(FileNotFoundError):
        with suppress(ValueError):
            is_same = parse_json(plan.read_bytes()) == info.to_table()
        if is_same and state.stat().st_size == state_size:
            if not locate_features(folder, info.split, "json").exists() and not growing.exists():
                # Killed between the last two renames.
                locate_features(folder, info.split, "npy").replace(growing)
            if growing.stat().st_size > info.samples * info.units:
                return
    remove_features(folder, info.split)
    try:
        shape = (info.samples, info.units)
        values = np.lib.format.open_memmap(growing, mode="w+", dtype=info.dtype, shape=shape)
        with growing.open("r+b") as file:  # a full disk is found now
            os.posix_fallocate(file.fileno(), 0, values.offset + values.nbytes)
        with atomic_write(state) as file:
            file.write(bytes(state_size))
        with atomic_write(plan) as file:
            file.write(json.dumps(info.to_table()).encode())
    except OSError as error:
        remove_features(folder, info.split)
        size = info.samples * info.units * np.dtype(info.dtype).itemsize
        raise SetupError(
            f"{growing} of {size:,} bytes cannot be written ({error.strerror}); make room, or "
            "name another folder with --features"
        ) from error


def remove_features(folder: Path, split: str) -> None:
    """Remove features, complete or not."""
    for ending in ENDINGS:
        locate_features(folder, split, ending).unlink(missing_ok=True)
