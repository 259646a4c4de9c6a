"""A run on more and fewer replicas is one run; and one that is asked to end loses nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.mesh import ProcessMesh
from cluster.run.events import Ended, Finished, Saved
from cluster.run.folder import RunIdentity
from cluster.training.loop import train
from pipeline.dataset.manifest import Manifest, identity
from pipeline.stream.ledger.proof import prove
from pipeline.tools.errors import DataError
from tests.helpers.training_runs import (
    CONFIG,
    STEPS,
    Call,
    alone,
    cut_at,
    learned,
    resume_at,
    rows,
    together,
    weights,
)

# Their gradients are small and their updates smaller; a batch of 12 goes to 1, 2, 3 and 6 replicas.
ELASTIC = replace(CONFIG, batch_size=12, ledger=True, validate_every=0)


@pytest.fixture(scope="module")
def runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in several worlds, and one that changes them at step 3."""
    root = tmp_path_factory.mktemp("elastic")
    alone(ELASTIC, tiny_data, root / "whole")
    alone(replace(ELASTIC, microbatch=5), tiny_data, root / "parts")
    more = replace(ELASTIC, replicas="1:2")
    cut_at(3, root / "whole", root / "grown")
    for path in (root / "whole" / "ledger").iterdir():
        (root / "grown" / "ledger").mkdir(exist_ok=True)
        (root / "grown" / "ledger" / path.name).write_bytes(path.read_bytes())
    together(
        root / "job",
        [Call(more, tiny_data, root / "two"), Call(more, tiny_data, root / "grown")],
        world=4,
    )
    resume_at(3, more, tiny_data, root / "two", root / "shrunk")
    return root


@pytest.mark.parametrize("name", ["parts", "two", "grown", "shrunk"])
def test_losses_and_weights_are_those_of_one_replica(runs, name):
    whole, other = learned(runs / "whole"), learned(runs / name)
    assert [row[:3] for row in other] == [row[:3] for row in whole]
    torch.testing.assert_close(torch.tensor(other), torch.tensor(whole), rtol=2e-4, atol=1e-5)
    before, after = weights(runs / "whole"), weights(runs / name)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-4)


def test_replicas_are_told_in_the_rows(runs):
    assert [row["replicas"] for row in rows(runs / "grown")] == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("name", ["two", "grown"])
def test_ids_and_pixels_are_the_same_in_any_world(runs, tiny_data, name):
    """The ledgers of both together: every sample that both delivered must have the same pixels."""
    proof = prove(tiny_data, [runs / "whole", runs / name])
    assert proof.findings == ()
    assert proof.compared >= 12 * STEPS


class Asked:
    """Wants the run to end after some more steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_run_that_is_asked_to_end_saves_first_and_goes_on_as_if_it_had_not(tiny_data, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    alone(CONFIG, tiny_data, whole)
    run.mkdir()
    told: list = []
    train(CONFIG, str(tiny_data), run, ProcessMesh(), told.append, is_stopping=Asked(1))
    assert told[-2:] == [Saved(2, told[-2].seconds), Ended(2)]
    assert [row["step"] for row in rows(run)] == [1, 2]
    train(CONFIG, str(tiny_data), run, ProcessMesh(), told.append, is_stopping=Asked(100))
    assert told[-1] == Finished(STEPS)
    assert learned(run) == learned(whole)
    before, after = weights(whole), weights(run)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


class Replaces:
    """Puts another data set in the place of the run's after some steps."""

    def __init__(self, data: Path, steps: int) -> None:
        self.data, self.left = data, steps

    def __call__(self) -> bool:
        self.left -= 1
        if self.left == 0:
            replace(Manifest.load(self.data), seed=99).save(self.data)
        return False


def test_a_data_set_that_was_replaced_under_a_run_is_noticed_when_it_is_opened_again(
    data, tmp_path
):
    """The first time is the validation after step 3; the next, a start of the workers."""
    run, first = tmp_path / "run", identity(data)
    run.mkdir()
    words = rf"data set .*data was replaced by another while .*manifest: {first[:12]} -> "
    with pytest.raises(DataError, match=words):
        train(CONFIG, str(data), run, ProcessMesh(), print, is_stopping=Replaces(data, 2))
    assert not (run / "validation.jsonl").read_text()
    with pytest.raises(DataError, match=words):
        train(
            CONFIG, str(data), run, ProcessMesh(), print,
            identity=RunIdentity(run="a-1", data_sha256=first),
        )  # fmt: skip
