"""The joining of two half batches in shared memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.checkpoint.writer import CheckpointManager
from cluster.mesh import create_mesh
from cluster.training.pair_batches import PairBatches
from pipeline.batches import Stream
from pipeline.stream.ledger.writer import Ledger
from tests.helpers.processes import run_ranks
from tests.helpers.training_runs import CONFIG, alone


def run_rank(rank: int, folder: Path, data: Path) -> None:
    """Column a runs ahead of column b as far as it can; b's batch must stay what it was."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = create_mesh([(0, 1)], torch.device("cpu"), cores=1)
    with (
        Stream(data, batch_size=8, seed=3, threads=1) as whole_stream,
        Stream(data, batch_size=8, seed=3, rank=rank, world_size=2, threads=1) as stream,
        PairBatches(stream, mesh) as feed,
    ):
        batch, expected = next(feed), next(whole_stream)
        if rank == 0:
            next(feed)  # the second; the third is on its way now
        dist.barrier()
        if rank == 1:
            assert torch.equal(batch.images, expected.images)
            assert torch.equal(batch.labels, expected.labels)
            assert batch.position == 8
            next(feed)
    dist.destroy_process_group()


def test_the_ledger_is_written_before_a_checkpoint_is_begun(tiny_data, tmp_path, monkeypatch):
    """A GPU's last frames may be pending; a checkpoint names their position."""
    order = []

    def note(kind, name):
        real = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda self, *given: (order.append(name), real(self, *given))[1]
        )

    note(Ledger, "flush")
    note(CheckpointManager, "begin")
    config = replace(CONFIG, steps=4, checkpoint_every=2, validate_every=0, ledger=True)
    alone(config, tiny_data, tmp_path / "run")
    assert order == ["flush", "begin", "flush", "begin", "flush"]  # the last closes it


def test_a_batch_stays_while_the_other_column_runs_ahead(tiny_data, tmp_path):
    run_ranks(run_rank, (tmp_path, tiny_data), 2)
