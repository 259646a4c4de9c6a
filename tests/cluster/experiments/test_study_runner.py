"""Runs side by side: ended when they have shown enough, and what happens when one fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.experiments.study import runner
from cluster.experiments.study.runner import Slot, StudyRun, run_side_by_side
from pipeline.tools.errors import DuetError
from pipeline.tools.progress import Progress
from tests.helpers.training_runs import rows

CORES = tuple(sorted(os.sched_getaffinity(0)))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(runner, "POLL", 0.05)


def runs(folder: Path, data: Path, *names: str) -> list[StudyRun]:
    config = Config(batch_size=8, steps=1000)
    return [StudyRun(name=name, config=config, data=str(data), out=folder) for name in names]


def make(runs: list[StudyRun], is_enough=lambda run: run.position > 80) -> None:
    slots = [Slot(CORES[:1]), Slot(CORES[-1:])]
    with Progress("pretending", total=sum(run.total for run in runs), unit="img") as progress:
        run_side_by_side(runs, slots, "tests.helpers.fake_run", progress, is_enough)


def test_each_has_its_cores_and_ends_when_it_has_shown_enough(tmp_path, tiny_data):
    some = runs(tmp_path, tiny_data, "a-0", "b-0", "c-0")
    make(some)
    for run in some:
        assert (run.folder / "saved").is_file()
        assert 80 < run.position < 4000
        assert len(json.loads((run.folder / "cores").read_text())) == 1
        assert "steps = 1000" in (tmp_path / f"{run.name}.toml").read_text()
    assert len(rows(some[0].folder)) > 10


def test_a_run_that_diverges_is_no_failure(tmp_path, tiny_data):
    some = runs(tmp_path, tiny_data, "diverges-0", "a-0")
    make(some)
    assert [run.has_diverged for run in some] == [True, False]
    assert (some[1].folder / "saved").is_file()


def test_when_one_fails_the_others_save_and_the_reason_is_told(tmp_path, tiny_data):
    some = runs(tmp_path, tiny_data, "a-0", "fails-0", "never-0")
    with pytest.raises(DuetError) as error:
        make(some, is_enough=lambda run: False)
    assert str(error.value) == (
        f"run fails-0 failed: the disk is full; make room; see {tmp_path}/fails-0.log"
    )
    assert (some[0].folder / "saved").is_file()
    assert not some[2].folder.exists()
