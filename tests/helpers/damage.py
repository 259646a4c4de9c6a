"""Damage done to single samples of a data set, and what a stream makes of it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from isal import isal_zlib

from pipeline.batches import Stream
from pipeline.dataset.index import save_index
from pipeline.dataset.manifest import Manifest
from tests.helpers.images import rows_of

SAMPLES = 48  # in shards of 10
FLIPPED, ZEROED, CUT, UNDECODABLE = 13, 27, (45, 46, 47), 31
BATCHES = 6  # of 24: three epochs


def change(data: Path, sample: int, edit) -> None:
    """Let `edit` change the stored bytes of a sample in place."""
    row = rows_of(data, "train")[sample]
    start, size = int(row["offset"]), int(row["size"])
    shard = data / f"train-{row['shard']:06d}.tar"
    content = bytearray(shard.read_bytes())
    jpeg = content[start : start + size]
    edit(jpeg)
    content[start : start + size] = jpeg
    shard.write_bytes(content)


def flip(jpeg: bytearray) -> None:
    jpeg[700] ^= 1


def zero(jpeg: bytearray) -> None:
    jpeg[800:1000] = bytes(200)


def spoil(jpeg: bytearray) -> None:
    jpeg[:] = b"not a JPEG".ljust(len(jpeg))


def undecodable(data: Path, *samples: int, edit=spoil) -> None:
    """Put bytes into the set that were never a JPEG, index and manifest in agreement with them."""
    rows = rows_of(data, "train").copy()
    for sample in samples:
        change(data, sample, edit)
        content = (data / f"train-{rows[sample]['shard']:06d}.tar").read_bytes()
        start, size = int(rows[sample]["offset"]), int(rows[sample]["size"])
        rows[sample]["crc"] = isal_zlib.crc32(content[start : start + size])
    manifest = Manifest.load(data)
    split = replace(manifest.splits["train"], index_sha256=save_index(data, "train", rows))
    replace(manifest, splits=manifest.splits | {"train": split}).save(data)


@pytest.fixture(name="damaged")
def six_damaged(data) -> Path:
    """Six of 48 samples are damaged, in each of the ways there are."""
    undecodable(data, UNDECODABLE)
    change(data, FLIPPED, flip)
    change(data, ZEROED, zero)
    cut = int(rows_of(data, "train")[CUT[0]]["offset"]) + 100
    os.truncate(data / "train-000004.tar", cut)
    return data


BAD = {FLIPPED, ZEROED, *CUT, UNDECODABLE}


def taken(stream: Stream, batches: int) -> list:
    return [next(stream) for _ in range(batches)]
