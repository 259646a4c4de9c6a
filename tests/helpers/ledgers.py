"""Ledgers of runs that never ran, written as the stream writes them, and what to do to them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.dataset.manifest import Manifest, Shard, Split, identity
from pipeline.stream.ledger.findings import LedgerFinding, Proof
from pipeline.stream.ledger.writer import Ledger, LedgerHeader

HEAD = struct.Struct("<IIQII")  # as the docstring of pipeline.stream.ledger.format has it
N = 60
HASH = "0" * 64


def data_set(folder: Path, samples: int, shard: int = 20) -> Path:
    """Write a manifest and nothing else: more is not read."""
    sizes = [min(shard, samples - first) for first in range(0, samples, shard)]
    shards = tuple(
        Shard(name=f"train-{k:06d}.tar", samples=size, bytes=1, sha256=HASH, idx_sha256=HASH)
        for k, size in enumerate(sizes)
    )
    folder.mkdir(exist_ok=True)
    Manifest(
        splits={"train": Split(shards=shards, index_sha256=HASH)},
        classes=("a", "b"),
        seed=0,
        sources={},
        plan="",
        stats_sha256=HASH,
    ).save(folder)
    return folder


def about(data: Path, position: int, batch: int, rank: int, world: int, **other) -> LedgerHeader:
    samples = Manifest.load(data).splits["train"].samples
    fixed = {"split": "train", "seed": 7, "shuffle": "full", "crop": "random", "colour": 0.1}
    facts = {"data_sha256": identity(data), "samples": samples, "device": "cpu", **fixed, **other}
    return LedgerHeader(position=position, batch_size=batch, rank=rank, world_size=world, **facts)


def order(samples: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and ids at [position, position + count), by any permutation an epoch."""
    epochs, places = np.divmod(np.arange(position, position + count), samples)
    orders = {e: np.random.default_rng(int(e)).permutation(samples) for e in np.unique(epochs)}
    return epochs, np.array([orders[e][p] for e, p in zip(epochs, places, strict=True)], np.int64)


def pixels(epochs: np.ndarray, ids: np.ndarray) -> torch.Tensor:
    values = (epochs * 1000 + ids)[:, None] % 1999 + np.arange(12)
    return torch.from_numpy(values.reshape(-1, 3, 2, 2).astype(np.float32))


def attempt(folder: Path, data: Path, position, batch, world, steps, damaged=(), **other) -> None:
    """Write the ledgers of all ranks of an attempt; `steps` of each, or a list of them by rank."""
    for rank in range(world):
        facts = about(data, position, batch, rank, world, **other)
        first, last = batch * rank // world, batch * (rank + 1) // world
        mine = steps if isinstance(steps, int) else steps[rank]
        with Ledger(folder, facts) as ledger:
            for step in range(mine):
                start = position + step * batch + first
                epochs, due = order(facts.samples, start, last - first)
                delivered = np.where(np.isin(due, damaged), (due + 1) % facts.samples, due)
                images = pixels(epochs, delivered)
                images = images if facts.device == "cpu" else images.half()
                ledger.record(start, due, delivered, images)


@pytest.fixture(name="data")
def sixty(tmp_path: Path) -> Path:
    return data_set(tmp_path / "data", N)


@pytest.fixture(name="run")
def three_attempts(tmp_path: Path, data: Path) -> Path:
    """Positions 0-83 on 2 ranks, 48-167 on 3, 168-257 on 1: four epochs and 18."""
    folder = tmp_path / "run" / "ledger"
    attempt(folder, data, 0, 12, 2, 7, damaged=[5])
    attempt(folder, data, 48, 12, 3, 10, damaged=[5])
    attempt(folder, data, 168, 10, 1, 9, damaged=[5])
    return folder.parent


def ledgers(run: Path) -> list[Path]:
    """Return the ledgers in order of time: 0-1 of attempt 1, 2-4 of attempt 2, 5 of attempt 3."""
    return sorted((run / "ledger").iterdir())


def frames(path: Path) -> list[bytes]:
    """Return the first line and each frame."""
    content = path.read_bytes()
    at = content.index(b"\n") + 1
    parts = [content[:at]]
    while at < len(content):
        length = HEAD.unpack_from(content, at)[1]
        parts.append(content[at : at + length])
        at += length
    return parts


def change(path: Path, frame: int, place: int, add: int) -> None:
    """Add to the 32-bit word number `place` after the head of a frame, and mend the CRC-32."""
    parts = frames(path)
    words = np.frombuffer(parts[frame + 1][HEAD.size :], "<u4").copy()
    words[place : place + 1] += np.uint32(add)
    body = parts[frame + 1][4 : HEAD.size] + words.tobytes()
    parts[frame + 1] = struct.pack("<I", zlib.crc32(body)) + body
    path.write_bytes(b"".join(parts))


def only(proof: Proof, kind: str) -> LedgerFinding:
    found = [finding for finding in proof.findings if finding.kind == kind]
    assert len(found) == 1, proof.findings
    assert "\n" not in found[0].reason
    return found[0]
