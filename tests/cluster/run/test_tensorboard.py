"""Scalars that TensorBoard reads of a run, also after it was cut."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from cluster.mesh import ProcessMesh
from cluster.run.events import Warned
from cluster.run.exporters import TensorBoardWriter
from cluster.run.folder import Mark
from cluster.run.metrics import MetricsLog
from model.schedule import Rates
from pipeline.tools.errors import SetupError
from tests.helpers.training_runs import CONFIG, alone, cut_at, rows

CONFIG = replace(CONFIG, tensorboard=True)


def test_a_run_that_was_cut_shows_every_step_once(tiny_data, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr("cluster.run.metrics.PUBLISH_EVERY", 0.0)
    alone(CONFIG, tiny_data, tmp_path / "whole")
    run = cut_at(3, tmp_path / "whole", tmp_path / "run")
    board: Path = run / "tensorboard"
    board.mkdir()
    for path in (tmp_path / "whole" / "tensorboard").iterdir():
        (board / path.name).write_bytes(path.read_bytes())  # steps 4 to 6 were made, and are lost
    alone(CONFIG, tiny_data, run)
    events = accumulator.EventAccumulator(str(board))
    events.Reload()
    wanted = {row["step"]: row["loss"] for row in rows(run)}
    found = events.Scalars("train/loss")
    assert {event.step: pytest.approx(event.value, rel=1e-6) for event in found} == wanted
    assert len(found) == len(wanted)
    assert [event.step for event in events.Scalars("validation/top1_error")] == [3, 6]


def test_without_the_package_it_is_a_line(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.run.exporters.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install -e '.\[tensorboard\]'"):
        alone(CONFIG, tiny_data, tmp_path / "run")


def on_a_small_disk(run: Path) -> None:
    """Numbers under a limit on the size of files, which the kernel enforces."""
    told: list[str] = []
    rates = Rates(0.1, 0.2)
    board = TensorBoardWriter(run, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    tell = lambda event: told.append(event.text) if isinstance(event, Warned) else None  # noqa: E731
    with board, MetricsLog(run, ProcessMesh(), tell, samples=40, step=0, publish=[board]) as log:
        for step in range(1, 31):
            mark = Mark(step=step, position=8 * step)
            log.validation(mark, lambda: {"loss": 1.0, "top1_error": 0.5, "top5_error": 0.5})
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        log.step(Mark(step=31, position=248), CONFIG, rates, torch.zeros(3))
    (run / "told").write_text("\n".join(told))


def test_a_disk_that_takes_no_more_ends_the_board_and_not_the_training(tmp_path):
    pytest.importorskip("tensorboard")
    process = mp.get_context("spawn").Process(target=on_a_small_disk, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    told = (tmp_path / "told").read_text().splitlines()
    assert [line for line in told if "numbers are published no more" in line]
    assert len((tmp_path / "validation.jsonl").read_text().splitlines()) == 30


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file\n")
    with pytest.raises(SetupError, match="train with --no-tensorboard"):
        TensorBoardWriter(tmp_path, 0)
