"""Scalars that TensorBoard, W&B and MLflow read of a run, also after it was cut."""

from __future__ import annotations

import json
import resource
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Event
from types import ModuleType

import pytest
import torch
import torch.multiprocessing as mp

from cluster.mesh import ProcessMesh
from cluster.run.events import Finished, Warned
from cluster.run.folder import Mark, write_run_config
from cluster.run.metrics import MetricsLog
from cluster.run.trackers import (
    SCALARS,
    TRACKERS,
    BackgroundTracker,
    TensorBoardTracker,
    TrackedRun,
    _publish,
)
from cluster.train import main
from model.schedule import Rates
from pipeline.tools.errors import SetupError
from tests.helpers.training_runs import CONFIG, STEPS, alone, cut_at, rows

BOARD = replace(CONFIG, tensorboard=True)


def test_a_run_that_was_cut_shows_every_step_once(tiny_data, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr("cluster.run.metrics.PUBLISH_EVERY", 0.0)
    alone(BOARD, tiny_data, tmp_path / "whole")
    run = cut_at(3, tmp_path / "whole", tmp_path / "run")
    board: Path = run / "tensorboard"
    board.mkdir()
    for path in (tmp_path / "whole" / "tensorboard").iterdir():
        (board / path.name).write_bytes(path.read_bytes())  # steps 4 to 6 were made, and are lost
    alone(BOARD, tiny_data, run)
    events = accumulator.EventAccumulator(str(board))
    events.Reload()
    wanted = {row["step"]: row["loss"] for row in rows(run)}
    found = events.Scalars("train/loss")
    assert {event.step: pytest.approx(event.value, rel=1e-6) for event in found} == wanted
    assert len(found) == len(wanted)
    assert [event.step for event in events.Scalars("validation/top1_error")] == [3, 6]


@pytest.mark.parametrize("name", list(TRACKERS))
def test_without_the_package_it_is_a_line_before_anything_starts(
    name, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.tools.packages.find_spec", lambda name: None)
    argv = ["demo", "--data", str(tiny_data), "--run", str(tmp_path / "run"), f"--{name}"]
    with pytest.raises(SetupError, match=rf"--{name} needs .*pip install .*\[{name}\]'"):
        main(argv, trainer=lambda *_: pytest.fail("it has started"))


def on_a_small_disk(run: Path) -> None:
    """Numbers under a limit on the size of files, which the kernel enforces."""
    told: list[str] = []
    rates = Rates(0.1, 0.2)
    board = TensorBoardTracker(TrackedRun(folder=run, name="a", step=0, settings={}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    tell = lambda event: told.append(event.text) if isinstance(event, Warned) else None  # noqa: E731
    publish = [partial(_publish, board)]
    with (
        closing(board),
        MetricsLog(run, ProcessMesh(), tell, samples=40, step=0, publish=publish) as log,
    ):
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
        TensorBoardTracker(TrackedRun(folder=tmp_path, name="a", step=0, settings={}))


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """W&B that sends nothing and knows no account."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    module = pytest.importorskip("wandb")
    yield module
    module.teardown()


def split_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a file of W&B: LevelDB's log format, after a header of seven bytes."""
    assert data[:4] == b":W&B"
    at, parts = 7, []
    while at + 7 <= len(data):
        if (left := -at % 32768) and left < 7:  # no room for a header in this block
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def read_wandb(file: Path) -> tuple[set[str], dict[str, list[tuple[int, float]]]]:
    """Return the ids and the scalars, (step, value) by name, of a file of W&B."""
    record = import_module("wandb.proto.wandb_internal_pb2").Record()
    ids, scalars = set(), defaultdict(list)
    for data in split_records(file.read_bytes()):
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            ids.add(record.run.run_id)
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if not name.startswith("_"):
                scalars[name].append((record.history.step.num, json.loads(item.value_json)))
    return ids, scalars


def test_a_resumed_run_goes_on_at_wandb_and_mlflow(wandb, tiny_data, tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking")
    monkeypatch.setattr("cluster.run.metrics.PUBLISH_EVERY", 0.0)
    store = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = replace(CONFIG, wandb=True, mlflow=True)
    whole, run = tmp_path / "whole", tmp_path / "run"
    whole.mkdir()
    write_run_config(whole, config, "", 48, 0, "duet-12")
    told = alone(config, tiny_data, whole)
    cut_at(3, whole, run)
    write_run_config(run, config, "", 48, 0, "duet-12")
    told += alone(config, tiny_data, run)
    assert [event.text for event in told if isinstance(event, Warned)] == []

    wanted = {row["step"]: row["loss"] for row in rows(whole)}
    for folder, first in ((whole, 1), (run, 4)):
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        ids, scalars = read_wandb(file)
        assert ids == {"duet-12"}
        assert scalars["train/loss"] == [(s, wanted[s]) for s in range(first, STEPS + 1)]
        assert scalars.keys() == set(SCALARS.values())
    client = tracking.MlflowClient(store)
    (experiment,) = client.search_experiments(filter_string="name = 'duet'")
    (found,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(found.info.run_id, "train/loss")
    # Steps 4 and 5 were sent before the cut; 6, the last, may have lacked its validation.
    assert [(m.step, m.value) for m in history if m.step < STEPS] == list(wanted.items())[:-1]
    assert found.data.metrics.keys() == set(SCALARS.values())
    assert found.data.params["batch_size"] == "8"
    assert found.info.status == "FINISHED"


def test_a_tracker_that_fails_does_not_end_the_training(wandb, tiny_data, tmp_path, monkeypatch):
    pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setitem(TRACKERS, "wandb", lambda _: Event().wait())  # never answers
    monkeypatch.setattr("cluster.run.trackers.CLOSE_TIMEOUT", 5.0)
    told = alone(replace(CONFIG, wandb=True, mlflow=True), tiny_data, tmp_path / "run")
    assert isinstance(told[-1], Finished)
    lines = sorted(event.text for event in told if isinstance(event, Warned))
    assert [line[:29] for line in lines] == [
        "--mlflow gets no more numbers", "--wandb gets no more numbers ",
    ]  # fmt: skip
    assert "no answer for 5 s" in lines[1]
    assert len(rows(tmp_path / "run")) == STEPS


def test_a_tracker_that_fails_is_closed():
    told, done = [], []

    class Failing:
        def log(self, step, values):
            raise OSError("no route")

        def close(self):
            done.append("closed")

    tracker = BackgroundTracker("wandb", Failing, told.append)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert done == ["closed"]
    assert ["no route" in warning.text for warning in told] == [True]
