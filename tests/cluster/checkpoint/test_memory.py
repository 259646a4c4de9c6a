"""The state in the memory of workers that outlive another: chosen, handed over, or passed over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from cluster.checkpoint.memory import Memory, Offer, choose_offer
from cluster.checkpoint.writer import CheckpointManager
from cluster.launch.rendezvous import leave_process_group
from cluster.mesh import create_mesh
from cluster.run.events import Event, Started, Stepped, Warned
from cluster.run.folder import LAYERS, METRICS, Mark
from cluster.training import loop
from cluster.training.learning_rate import RateControl
from cluster.training.loop import train
from pipeline.stream.ledger.proof import prove
from tests.helpers.processes import run_ranks
from tests.helpers.training_runs import CONFIG, Call, learned, rows, together, weights

BOTH = Offer(Mark(step=7, position=56), {0: 1, 1: 2}, {METRICS: {"step": 7}}, is_ended=True)


def test_the_newest_state_whose_columns_are_all_there_is_chosen():
    a, b = replace(BOTH, hashes={0: 1}), replace(BOTH, hashes={1: 2})
    ahead = replace(a, mark=Mark(step=8, position=64))
    assert choose_offer([a, b, None, ahead], (0, 1), 7, 5) == (a, "")
    assert choose_offer([None, BOTH], (0, 1), 7, 5) == (BOTH, "")
    assert choose_offer([None, a], (0, 1), 7, 5) == (None, "")  # the other column is lost
    assert choose_offer([None, None], (0, 1), 7, 5) == (None, "")


def test_what_one_process_knows_of_a_step_counts_for_all():
    early = replace(BOTH, rows={LAYERS: {"step": 7}}, is_ended=False)
    both = {METRICS: {"step": 7}, LAYERS: {"step": 7}}
    assert choose_offer([early, BOTH], (0, 1), 6, 5) == (replace(BOTH, rows=both), "")
    assert choose_offer([early], (0, 1), 7, 5) == (early, "")
    assert choose_offer([early], (0, 1), 7, 7) == (replace(early, is_ended=True), "")  # saved


@pytest.mark.parametrize(
    ("offers", "written", "saved", "why"),
    [
        ([BOTH], 7, 8, "that of step 7 is older"),
        ([BOTH, replace(BOTH, hashes={0: 3, 1: 2})], 7, 5, "workers differ in that of step 7"),
        ([replace(BOTH, rows={})], 6, 5, "the row of step 7 is missing"),
        ([BOTH], 5, 5, "the row of step 6 is missing"),
    ],
)
def test_a_state_that_is_stale_or_damaged_is_passed_over_with_the_reason(
    offers, written, saved, why
):
    assert choose_offer(offers, (0, 1), written, saved) == (None, why)


class Lost(Exception):
    """A worker is lost."""


def lose_at(step: int) -> Callable[[], bool]:
    """Return a function that loses this process when it is called for the nth time."""
    steps = itertools.count(1)

    def lose() -> bool:
        if next(steps) == step:
            raise Lost
        return False

    return lose


def never() -> bool:
    return False


INSIDE = {
    "validation": (loop, "validate", 5),
    "review of rates": (RateControl, "review", 5),
    "checkpoint": (CheckpointManager, "begin", 1),
}
"""Work of step 5 after its update, and the number of the call."""


@contextmanager
def lose_inside(owner: Any, name: str, call: int) -> Iterator[None]:
    """Lose this process in the call of that number of a function."""
    lose, function = lose_at(call), getattr(owner, name)
    with mock.patch.object(owner, name, lambda *args, **more: lose() or function(*args, **more)):
        yield


def be_lost(
    rank: int, world: int, size: int, folder: Path, call: Call, lost: int, how: str
) -> None:
    """Train until rank `lost` loses its process's state in the middle; then train to the end.

    The others notice as they do in a job: their next collective call fails.
    """
    memory, told = Memory(), list[Event]()
    seats = [tuple(range(start, start + size)) for start in range(0, world, size)]
    for attempt in range(2):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/meet{attempt}", rank=rank, world_size=world,
            timeout=timedelta(seconds=30),
        )  # fmt: skip
        mesh = create_mesh(seats, torch.device("cpu"), cores=1)
        is_lost, is_inside = attempt == 0 and rank == lost, how in INSIDE
        try:
            with lose_inside(*INSIDE[how]) if is_lost and is_inside else nullcontext():
                train(call.config, call.data, call.run, mesh, told.append, memory=memory,
                      is_stopping=never if is_inside or not is_lost else lose_at(6))  # fmt: skip
        except Lost:
            memory = Memory()
        except RuntimeError:
            if how == "damaged" and rank == 0:
                next(iter(memory.collect().values())).add_(1)
        del mesh
        leave_process_group()
    if rank == 0:
        starts = [event for event in told if isinstance(event, Started)]
        (folder / "start").write_text(str(starts[-1].step))
        said = [event.text for event in told if isinstance(event, Warned)]
        (folder / "said").write_text("\n".join(said))
        assert any(isinstance(event, Stepped) for event in told)


CASES = {
    "the leader, of two": (2, 1, 0, "", 5),
    "the other, of two": (2, 1, 1, "", 5),
    "a column, of two pairs": (4, 2, 3, "", 5),
    "a column, of one pair": (2, 2, 1, "", 3),
    "one of three, and another's memory is damaged": (3, 1, 2, "damaged", 3),
}


@pytest.mark.parametrize(("world", "size", "lost", "how", "start"), CASES.values(), ids=CASES)
def test_a_lost_worker_costs_no_step_while_a_replica_lives_and_changes_no_bit(
    world, size, lost, how, start, tiny_data, tmp_path
):
    config = replace(CONFIG, batch_size=12, validate_every=0, statistics_every=0, ledger=True)
    whole, run = tmp_path / "whole", tmp_path / "run"
    together(tmp_path / "undisturbed", [Call(config, tiny_data, whole)], world, size)
    run.mkdir()
    run_ranks(be_lost, (world, size, tmp_path, Call(config, tiny_data, run), lost, how), world)
    assert int((tmp_path / "start").read_text()) in (start, 0 if start == 3 else start)
    assert ("workers differ in that of step 5" in (tmp_path / "said").read_text()) == bool(how)
    assert learned(run) == learned(whole)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    ours, theirs = weights(run), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert prove(tiny_data, [run]).findings == ()


@pytest.mark.parametrize("how", INSIDE)
def test_a_leader_lost_after_an_update_costs_nothing_of_its_step(how, tiny_data, tmp_path):
    config = replace(
        CONFIG, checkpoint_every=5, validate_every=1, statistics_every=1,
        schedule="plateau", patience=1, plateau_threshold=0.5,
    )  # fmt: skip
    whole, run = tmp_path / "whole", tmp_path / "run"
    together(tmp_path / "undisturbed", [Call(config, tiny_data, whole)], 2, 1)
    run.mkdir()
    run_ranks(be_lost, (2, 1, tmp_path, Call(config, tiny_data, run), 0, how), 2)
    assert (tmp_path / "start").read_text() == "5"
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert learned(run, name) == learned(whole, name)
    for name in ("layers.jsonl", "kernels.jsonl", "rates.jsonl"):
        assert rows(run, name) == rows(whole, name)
    assert rows(run, "rates.jsonl")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-00000005", "step-00000006",
    ]  # fmt: skip
    for step in (5, 6):
        ours, theirs = weights(run, step), weights(whole, step)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
