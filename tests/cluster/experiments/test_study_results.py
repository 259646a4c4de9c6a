"""Results of runs: against loops over rows that are written here."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cluster.config import Config
from cluster.experiments.study.config import Study, Variant
from cluster.experiments.study.results import (
    Result,
    compare_variants,
    count_images_to,
    has_reached_goal,
    is_at_goal,
    pool_deviations,
    read_curves,
    read_result,
)
from cluster.experiments.study.runner import StudyRun, make_slots

BATCH = 8
STUDY = Study(
    name="s", title="t", claim="c", paper="6 times", source="s", base=Path("b"), seeds=(0, 1),
    measure="pictures", plot="train", goal=0.25, window=3 * BATCH,
    variants=tuple(Variant(name=name, settings={}, data="") for name in ("relu", "tanh")),
)  # fmt: skip


def made(folder: Path, data: Path, errors: list[float], name: str = "relu-0", **more) -> StudyRun:
    """A run whose steps had these errors."""
    config = Config.from_settings({"batch_size": BATCH, "steps": len(errors)} | more)
    run = StudyRun(name=name, config=config, data=str(data), out=folder)
    run.folder.mkdir()
    with (run.folder / "metrics.jsonl").open("w") as file:
        for step, error in enumerate(errors, 1):
            row = {"position": step * BATCH, "step": step, "top1_error": error, "img_s": step}
            file.write(json.dumps(row) + "\n")
    return run


def by_hand(errors: list[float], goal: float, window: int) -> float:
    for step in range(window, len(errors) + 1):
        if sum(errors[step - window : step]) / window <= goal:
            return step * BATCH
    return math.nan


@pytest.mark.parametrize("seed", range(8))
def test_images_to_the_goal_are_those_of_a_loop(seed, tmp_path, tiny_data):
    draws = np.random.default_rng(seed)
    errors = np.clip(np.linspace(0.6, 0.2, 40) + draws.normal(0, 0.08, 40), 0, 1).tolist()
    run = made(tmp_path, tiny_data, errors)
    expected = by_hand(errors, 0.25, 3)
    assert count_images_to(0.25, read_curves(STUDY, run)) == pytest.approx(expected, nan_ok=True)
    assert has_reached_goal(STUDY, run) == math.isfinite(expected)
    found = read_result(STUDY, "relu", run)
    assert found.value == pytest.approx(expected, nan_ok=True)
    assert found.train_error == pytest.approx(sum(errors[-3:]) / 3)
    assert (found.images, found.img_s) == (40 * BATCH, 20.5)


def test_a_run_is_ended_when_its_last_window_is_down_at_the_goal(tmp_path, tiny_data):
    assert is_at_goal(STUDY, made(tmp_path, tiny_data, [0.9, 0.3, 0.25, 0.2], "down"))
    assert not is_at_goal(STUDY, made(tmp_path, tiny_data, [0.0, 0.0], "short"))
    up_again = made(tmp_path, tiny_data, [0.9, 0.2, 0.2, 0.2, 0.9, 0.9], "up")
    assert not is_at_goal(STUDY, up_again)
    assert has_reached_goal(STUDY, up_again)


def test_what_does_not_come_to_it_is_behind_all_that_do(tmp_path, tiny_data):
    slow = made(tmp_path, tiny_data, [0.9] * 20 + [0.2] * 4, "slow")
    near = made(tmp_path, tiny_data, [0.3] * 6, "near")
    far = made(tmp_path, tiny_data, [0.8] * 6, "far")
    gone = made(tmp_path, tiny_data, [0.1] * 6, "gone")
    gone.log.write_text("step 6\nerror: the loss of step 7 is nan: conv1 is the first\n")
    order = [read_result(STUDY, "relu", run) for run in (gone, far, near, slow)]
    assert [one.run.name for one in sorted(order, key=lambda one: one.rank)] == [
        "slow", "near", "far", "gone",
    ]  # fmt: skip
    assert [one.note for one in order] == ["diverged", "not reached", "not reached", ""]


def numbers(variant: str, *values: float) -> list[Result]:
    return [
        Result(variant=variant, run=StudyRun(name="r", config=Config(seed=seed), data="",
               out=Path()), value=value, last_error=0.5, images=1, img_s=2.0,
               val_error=math.nan, train_error=0.5)
        for seed, value in enumerate(values)
    ]  # fmt: skip


def test_a_variant_is_told_with_mean_spread_and_factor():
    relu, tanh = compare_variants(STUDY, numbers("relu", 100, 140) + numbers("tanh", 600, 840), [])
    assert (relu["mean"], relu["against_first"]) == (120, None)
    assert relu["sd"] == pytest.approx(np.std([100, 140], ddof=1))
    assert tanh["against_first"] == pytest.approx(6)
    assert pool_deviations([[100, 140], [600, 840], [1]]) == pytest.approx(
        math.sqrt((np.var([100, 140], ddof=1) + np.var([600, 840], ddof=1)) / 2)
    )


def test_no_mean_is_told_of_a_variant_of_which_a_run_did_not_come_to_it():
    relu, tanh = compare_variants(
        STUDY, numbers("relu", 100, 140) + numbers("tanh", 600, math.nan), []
    )
    assert (tanh["mean"], tanh["against_first"], tanh["came_to_it"], tanh["n"]) == (
        None,
        None,
        1,
        2,
    )
    assert relu["mean"] == 120


def test_cores_and_gpus_are_shared_out(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {4, 5, 6, 7, 8})
    monkeypatch.setattr("cluster.experiments.study.runner.cpu_count", lambda: 5)
    assert [one.cores for one in make_slots(2)] == [(4, 6, 8), (5, 7)]
    assert [one.cores for one in make_slots()] == [(4,), (5,), (6,), (7,), (8,)]
    assert [(one.cores, one.gpu) for one in make_slots(gpus=["2", "5"])] == [
        ((4, 6, 8), "2"), ((5, 7), "5"),
    ]  # fmt: skip
    assert len(make_slots(7)) == 7
    assert all(one.cores for one in make_slots(7))
    monkeypatch.setattr("cluster.experiments.study.runner.cpu_count", lambda: 2)  # a quota
    assert [one.cores for one in make_slots()] == [(4,), (5,)]
