"""Published results that a run is compared with: where they are passed, and what is far off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config.milestones import find_shortfalls, parse_milestones
from cluster.mesh import ProcessMesh
from cluster.run.events import Event, Warned
from cluster.run.folder import Mark
from cluster.run.metrics import MetricsLog
from cluster.training import components
from tests.helpers.training_runs import CONFIG

DEXP = parse_milestones(["95 top1 42.34", "0.48 loss 5.31", "95 top5 19.58", "0.48 top1 93.9"])


def row(epoch: float, loss: float, top1: float, top5: float) -> dict[str, float]:
    return {"epoch": epoch, "loss": loss, "top1_error": top1, "top5_error": top5}


def test_a_result_as_good_as_published_or_nearly_is_no_shortfall() -> None:
    assert [one.epoch for one in DEXP] == [0.48, 0.48, 95, 95]
    for good in (row(0.5, 5.4, 0.96, 0.9), row(1.0, 3.0, 0.6, 0.4)):
        assert find_shortfalls(DEXP, 0.0, good) == []
    assert find_shortfalls(DEXP, 94.0, row(95.0, 1.84, 0.45, 0.22)) == []


@pytest.mark.parametrize(
    ("before", "found", "words"),
    [
        (0.0, row(1.0, 6.9, 0.999, 0.995), ["loss 6.9 in epoch 1, and 5.31 in epoch 0.48",
                                           "top1 99.9 % in epoch 1, and 93.9 % in epoch 0.48"]),
        (94.0, row(95.0, 2.0, 0.46, 0.2), ["top1 46 % in epoch 95, and 42.34 %"]),
        (94.0, row(95.0, 2.0, float("nan"), 0.23), ["top1 nan %", "top5 23 %"]),
        (1.0, row(2.0, 6.9, 0.999, 0.995), []),  # said once
        (0.0, row(0.4, 6.9, 0.999, 0.995), []),  # not there yet
    ],
)  # fmt: skip
def test_what_is_far_off_is_said_once_with_both_numbers(
    before: float, found: dict[str, float], words: list[str]
) -> None:
    said = find_shortfalls(DEXP, before, found)
    assert len(said) == len(words)
    for line, word in zip(said, words, strict=True):
        assert word in line
        assert "\n" not in line


def test_the_log_warns_at_the_validation_that_passes_a_milestone(tmp_path: Path) -> None:
    told: list[Event] = []
    results = {"loss": 6.9, "top1_error": 0.999, "top5_error": 0.99, "samples": 5, "seconds": 1.0}
    with MetricsLog(tmp_path, ProcessMesh(), told.append, 100, 0) as log:
        log.expect(["0.5 top1 93.9", "2 top1 80"], 0)
        for step in (1, 2):
            log.validation(Mark(step=step, position=75 * step), lambda: results)
    (warning,) = [event.text for event in told if isinstance(event, Warned)]
    assert "top1 99.9 % in epoch 0.75" in warning
    told.clear()
    with MetricsLog(tmp_path, ProcessMesh(), told.append, 100, 1) as log:
        log.expect(["0.5 top1 93.9", "2 top1 80"], 75)  # a run that is resumed has been told
        log.validation(Mark(step=2, position=150), lambda: results)
        assert not [event for event in told if isinstance(event, Warned)]
        log.validation(Mark(step=3, position=225), lambda: results)
    (warning,) = [event.text for event in told if isinstance(event, Warned)]
    assert "80 % in epoch 2" in warning


def test_only_a_run_on_the_classes_of_the_published_one_is_compared(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, milestones=("0.5 top1 10",))
    classes = (3, 4, 5, 1000)
    for count in classes:
        monkeypatch.setattr(components, "CLASSES", count)
        run = tmp_path / str(count)
        run.mkdir()
        mesh = ProcessMesh()
        with components.prepare_training(config, str(tiny_data), run, mesh, print, ()) as training:
            is_compared = training.net.classes == count
            assert len(training.log.milestones) == is_compared
    assert training.net.classes in classes[:-1]
