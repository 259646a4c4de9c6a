"""fc7 of every picture of a split, in a file that any numpy maps, and what it is of.

    RUN/neighbours/features-val.npy        float16 or float32 [N, units], rows in stored order
    RUN/neighbours/features-val.rows.npy   label int32 [N], sound uint8 [N] (0: a damaged picture)
    RUN/neighbours/features-val.json       `About`, and a CRC-32 of every block; written last

A feature is what fc8 reads in evaluation: fc7 after ReLU, halved as the dropout of the paper does
(section 4.2), column a before column b: 4096 units at width 1. Rows of damaged pictures are zeros.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.files import sealed, sha256

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
        """[N]: False where the picture is damaged and the row zeros."""

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
    with sealed(part(base, "rows.npy")) as file:
        np.save(file, rows)
    table = about.table() | {
        "sha256_of": "labels and sound flags; the features themselves have a CRC-32 per block",
        "rows_sha256": sha256(part(base, "rows.npy")),
        "block": BLOCK,
        "crc32": crc,
        "damaged": int((~sound).sum()),
    }
    with sealed(part(base, "json")) as file:
        file.write((json.dumps(table) + "\n").encode())


def crc32(rows: Rows) -> int:
    """CRC-32 of rows as they lie in the file."""
    return int(isal_zlib.crc32(np.ascontiguousarray(rows).view(np.uint8).reshape(-1).data))


MAKE = "make them with python -m cluster.experiments.neighbors RUN --data DATA"
ANEW = "make them again with python -m cluster.experiments.neighbors RUN --data DATA --anew"
