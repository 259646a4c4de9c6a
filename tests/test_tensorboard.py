"""What TensorBoard reads of a run, also after it was cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import SetupError
from tests.loops import CONFIG, alone, cut_at, rows

CONFIG = replace(CONFIG, tensorboard=True)


def test_a_run_that_was_cut_shows_every_step_once(tiny_data, tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr("cluster.log.PUBLISH_EVERY", 0.0)
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
    monkeypatch.setattr("cluster.tensorboard.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install 'duet\[tensorboard\]'"):
        alone(CONFIG, tiny_data, tmp_path / "run")
