"""Rows on disk: cut at a checkpoint, timed without what is no training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config
from cluster.log import METRICS, Log, cut
from cluster.place import Place
from cluster.run_folder import Mark
from model.schedule import Rates


def write(path: Path, steps: range, tail: str = "") -> Path:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)
    return path


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@given(st.integers(0, 20), st.integers(0, 25), st.sampled_from(["", "{", '{"step": 2', "\0\0"]))
def test_no_row_after_the_step_and_no_half_row_stays(tmp_path_factory, count, step, tail):
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", range(1, count + 1), tail)
    cut(path, step)
    assert steps_in(path) == list(range(1, min(count, step) + 1))


def test_a_missing_file_stays_missing(tmp_path):
    cut(tmp_path / "rows.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_garbled_whole_row_ends_what_is_kept(tmp_path):
    path = write(tmp_path / "rows.jsonl", range(1, 3), "garbage\n" + json.dumps({"step": 3}) + "\n")
    cut(path, 10)
    assert steps_in(path) == [1, 2]


def slow_validation() -> dict[str, float]:
    time.sleep(0.3)
    return {"loss": 1.0, "top1_error": 0.25}


def test_time_for_validation_and_checkpoints_is_not_time_of_a_step(tmp_path):
    with Log(tmp_path, Place(), lambda event: None, samples=40, step=0) as log:
        for step in (1, 2):
            with log.waiting():
                time.sleep(0.02)
            time.sleep(0.02)
            log.step(
                Mark(step=step, position=8 * step),
                Config(),
                Rates(0.1, 0.2),
                torch.tensor([1.5, 0.25, 0.0]),
            )
            with log.paused():
                time.sleep(0.3)
            log.validation(Mark(step=step, position=8 * step), slow_validation)
    first, second = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    for row in (first, second):
        assert 0.04 <= row["seconds"] < 0.3
        assert 0.1 < row["data_wait"] < 0.9
    assert (second["loss"], second["top1_error"], second["epoch"]) == (1.5, 0.25, 0.4)
    assert (second["lr"], second["lr_bias"], second["position"]) == (0.1, 0.2, 16)


def test_only_the_leader_writes(tmp_path):
    place = Place(replica=1, replicas=2)
    with Log(tmp_path, place, pytest.fail, samples=40, step=0) as log:
        log.step(
            Mark(step=1, position=8), Config(), Rates(0.1, 0.2), torch.tensor([1.5, 0.25, 0.0])
        )
        assert log.validation(Mark(step=1, position=8), slow_validation) == 0.25
    assert list(tmp_path.iterdir()) == []
