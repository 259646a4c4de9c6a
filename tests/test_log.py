"""Rows on disk: cut at a checkpoint, timed without what is no training."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config
from cluster.log import METRICS, Log
from cluster.place import Place
from cluster.rows import Rows, cut
from cluster.run_folder import Mark
from model.exchange import Traffic
from model.schedule import Rates
from pipeline.errors import SetupError


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


MARK = Mark(step=1, position=8)
RATES = Rates(0.1, 0.2)
VALUES = torch.tensor([1.5, 0.25, 0.0])


def slow_validation() -> dict[str, float]:
    time.sleep(0.3)
    return {"loss": 1.0, "top1_error": 0.25, "top5_error": 0.0}


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


def test_a_step_says_what_training_stood_still_for(tmp_path):
    traffic = {"conv3": Traffic(waited=0.5), "fc6": Traffic(waited=0.25)}
    link: Any = SimpleNamespace(traffic=traffic)
    with Log(tmp_path, Place(), lambda event: None, samples=40, step=0) as log:
        for _ in range(2):
            with log.waiting():
                time.sleep(0.05)
            time.sleep(0.05)
            log.step(MARK, Config(), RATES, VALUES, link)
            traffic["fc6"].waited += 1.0
            with log.saving():
                time.sleep(0.1)
    first, second = map(json.loads, (tmp_path / METRICS).read_text().splitlines())
    assert (first["exchange"], second["exchange"]) == (0.75, 1.0)
    assert first["saving"] == 0
    assert second["saving"] >= 0.1
    assert 0.3 < first["stall"] < 0.8
    stood = second["data_wait"] * second["seconds"] + second["saving"]
    assert second["stall"] == pytest.approx(
        stood / (second["seconds"] + second["saving"]), abs=0.01
    )


def test_numbers_are_published_until_somebody_cannot_take_them(tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.log.PUBLISH_EVERY", 0.0)
    told: list = []
    got: list = []

    def broken(step: int, numbers: object) -> None:
        raise ConnectionError("nobody there")

    place = Place(replica=1, replicas=2)  # every process publishes its own
    publish = (broken, lambda step, numbers: got.append((step, dict(numbers))))
    with Log(tmp_path, place, told.append, samples=40, step=0, publish=publish) as log:
        for step in (1, 2):
            log.step(Mark(step=step, position=8 * step), Config(), RATES, VALUES)
    assert [step for step, _ in got] == [1, 2]
    assert got[0][1]["loss"] == 1.5
    assert [event.text for event in told] == [
        "numbers are published no more (ConnectionError: nobody there)"
    ]


def rows_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


def on_a_small_disk(folder: Path) -> None:
    """Rows under a limit on the size of files, which the kernel enforces."""
    told: list[str] = []
    rows = Rows(folder / "rows.jsonl", 0, told.append)
    rows.add({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))  # in the second row
    for step in (2, 3):
        rows.add({"step": step})
        assert rows_of(folder / "rows.jsonl") == [1]  # no half row
    with pytest.raises(SetupError, match=r"rows.jsonl lacks 2 rows \(File too large\)"):
        rows.sync()
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    rows.add({"step": 4})
    rows.sync()
    rows.close()
    (folder / "told").write_text("\n".join(told))


def test_rows_outlive_a_full_disk_in_their_order(tmp_path):
    process = mp.get_context("spawn").Process(target=on_a_small_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert rows_of(tmp_path / "rows.jsonl") == [1, 2, 3, 4]
    first, second = (tmp_path / "told").read_text().splitlines()
    assert "cannot be written (File too large)" in first
    assert "no row is lost" in second


def test_rows_follow_a_folder_that_is_away_for_a_while(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = Rows(folder / "rows.jsonl", 0, pytest.fail)
    rows.add({"step": 1})
    folder.rename(tmp_path / "away")
    rows.add({"step": 2})
    (tmp_path / "away").rename(folder)
    rows.add({"step": 3})
    rows.close()
    assert rows_of(folder / "rows.jsonl") == [1, 2, 3]
