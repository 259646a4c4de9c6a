"""The stream of a job is one: whatever the world, the threads, and where it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pipeline.batches import Batch, Stream
from pipeline.stream.ledger.proof import prove
from tests.helpers.images import rows_of

SAMPLES = 48
SEED = 11
WORLDS = (1, 2, 3, 4, 8)
SHUFFLES = ("full", "block")


class Attempt(NamedTuple):
    """One start of a job."""

    world: int
    batch: int
    batches: int
    """Delivered before it is cut off."""
    kept: int
    """... of which the last checkpoint knows; the others come again."""


# Cuts within epochs 0, 1 and 3, and on two borders (96 and 192); every world, some batches twice.
JOURNEY = (
    Attempt(world=2, batch=20, batches=2, kept=1),  # -> 20
    Attempt(world=8, batch=12, batches=4, kept=3),  # -> 56
    Attempt(world=1, batch=20, batches=2, kept=2),  # -> 96
    Attempt(world=3, batch=16, batches=3, kept=2),  # -> 128
    Attempt(world=4, batch=32, batches=2, kept=2),  # -> 192
    Attempt(world=2, batch=48, batches=1, kept=1),  # -> 240
)
END = 240


def delivered(data: Path, attempt: Attempt, position: int, **options) -> list[list[Batch]]:
    """Run a world, rank after rank, each with threads and prefetch of its own: [rank][step]."""
    found = []
    for rank in range(attempt.world):
        with Stream(
            data,
            seed=SEED,
            window=2,
            batch_size=attempt.batch,
            position=position,
            rank=rank,
            world_size=attempt.world,
            threads=1 + rank % 3,
            prefetch=1 + rank % 2,
            **options,
        ) as stream:
            found.append([next(stream) for _ in range(attempt.batches)])
    return found


def whole(ranks: list[list[Batch]], field: str) -> torch.Tensor:
    """A field of all global batches, one behind the other."""
    steps = zip(*ranks, strict=True)
    return torch.cat([getattr(batch, field) for step in steps for batch in step])


class Reference(NamedTuple):
    """Samples at each position of the stream."""

    ids: torch.Tensor
    labels: torch.Tensor
    images: torch.Tensor


@pytest.fixture(scope="module", params=SHUFFLES)
def shuffle(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def reference(tiny_data, shuffle) -> Reference:
    """One rank, one thread, never cut."""
    ranks = delivered(tiny_data, Attempt(1, 40, END // 40, 0), 0, shuffle=shuffle)
    return Reference(*(whole(ranks, field) for field in Reference._fields))


def test_every_epoch_of_the_uncut_stream_holds_each_sample_once(tiny_data, reference):
    epochs = reference.ids.split(SAMPLES)
    assert [sorted(ids.tolist()) for ids in epochs] == [list(range(SAMPLES))] * 5
    assert len({tuple(ids.tolist()) for ids in epochs}) == 5  # each in an order of its own
    labels = rows_of(tiny_data, "train")["label"]
    assert reference.labels.tolist() == labels[reference.ids.numpy()].tolist()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("cut", [0, 35, SAMPLES])
def test_any_world_gives_the_same_from_any_cut_on(tiny_data, shuffle, reference, world, cut):
    """35 is within an epoch, and the second batch then crosses into the next."""
    attempt = Attempt(world, batch=11, batches=2, kept=2)
    ranks = delivered(tiny_data, attempt, cut, shuffle=shuffle)
    for field, expected in reference._asdict().items():
        assert torch.equal(whole(ranks, field), expected[cut : cut + 22]), field
    for rank in ranks:
        assert [batch.position for batch in rank] == [cut + 11, cut + 22]


@pytest.fixture(scope="module")
def journey(tiny_data, shuffle, reference, tmp_path_factory) -> Path:
    """The ledgers of a job that was cut five times, each time to go on in another world."""
    folder, position = tmp_path_factory.mktemp("journey"), 0
    for attempt in JOURNEY:
        ranks = delivered(tiny_data, attempt, position, shuffle=shuffle, ledger=folder)
        end = position + attempt.batches * attempt.batch
        for field, expected in reference._asdict().items():
            assert torch.equal(whole(ranks, field), expected[position:end]), (attempt, field)
        position = ranks[0][attempt.kept - 1].position
    assert position == END
    return folder


def test_the_ledgers_of_a_job_cut_and_resized_prove_exactly_once(tiny_data, journey):
    proof = prove(tiny_data, [journey])
    assert proof.findings == ()
    assert proof.epochs == (0, 1, 2, 3, 4)
    assert proof.position == END
    assert proof.worlds == tuple(attempt.world for attempt in JOURNEY)
    assert proof.files == sum(proof.worlds)
    # 20, 12 and 16 samples were delivered a second time, and their pixels were the same.
    assert (proof.again, proof.compared, proof.replaced) == (48, 48, 0)
    assert "exactly once" in proof.summary()


@pytest.mark.parametrize("world", [1, 3])
def test_the_ledger_of_an_evaluation_proves_exactly_once(tiny_data, tmp_path, world):
    """Batches of 20: the last one is padded, beyond the end of the epoch."""
    for rank in range(world):
        options = {"crop": "center", "once": True, "ledger": tmp_path, "batch_size": 20}
        with Stream(tiny_data, rank=rank, world_size=world, **options) as stream:
            list(stream)
    proof = prove(tiny_data, [tmp_path])
    assert (proof.findings, proof.epochs, proof.position) == ((), (0,), SAMPLES)


def test_the_proof_fails_without_one_rank(tiny_data, journey, tmp_path):
    """Rank 1 of 4 got 136-143, which others had got before the restart at 128, and 168-175."""
    for path in journey.iterdir():
        if "r0001of0004" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    proof = prove(tiny_data, [tmp_path])
    (finding,) = (finding for finding in proof.findings if finding.kind == "missing")
    assert (finding.position, finding.count, finding.epoch) == (168, 8, 3)
    assert "rank 1 should have, and left no ledger" in finding.reason
    assert proof.epochs == (0, 1, 2, 4)
