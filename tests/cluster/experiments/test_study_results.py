"""Results of runs, and the goals that they reach: against loops over rows written here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from cluster.config import Config
from cluster.experiments.study.config import Study, Variant
from cluster.experiments.study.goals import StopRule, count_images_to, read_curves
from cluster.experiments.study.results import (
    Result,
    compare_variants,
    format_factor,
    pick_best,
    pool_deviations,
    read_result,
)
from cluster.experiments.study.runner import StudyRun, make_slots

BATCH = 8
STUDY = Study(
    name="s", title="t", claim="c", paper="6 times", source="s", base=Path("b"), seeds=(0, 1),
    measure="pictures", plot="train", goals=(0.25,), window=3 * BATCH,
    variants=tuple(Variant(name=name, settings={}, data="") for name in ("relu", "tanh")),
)  # fmt: skip


def made(folder: Path, data: Path, errors: list[float], name: str = "relu-0", **more) -> StudyRun:
    """A run whose steps so far had these errors."""
    config = Config.from_settings({"batch_size": BATCH, "steps": len(errors)} | more)
    run = StudyRun(name=name, config=config, data=str(data), out=folder)
    run.folder.mkdir()
    add_rows(run, errors)
    return run


def add_rows(run: StudyRun, errors: list[float], first: int = 1) -> None:
    with (run.folder / "metrics.jsonl").open("a") as file:
        for step, error in enumerate(errors, first):
            row = {"position": step * BATCH, "step": step, "top1_error": error, "img_s": step}
            file.write(json.dumps(row) + "\n")


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
    assert StopRule(STUDY, [([run], STUDY.goals)]).is_enough(run) == math.isfinite(expected)
    found = read_result(STUDY, "relu", run)
    assert found.value == pytest.approx(expected, nan_ok=True)
    assert found.train_error == pytest.approx(sum(errors[-3:]) / 3)
    assert (found.images, found.img_s) == (40 * BATCH, 20.5)


def test_a_run_is_ended_when_its_last_window_is_down_at_the_goal(tmp_path, tiny_data):
    run = made(tmp_path, tiny_data, [0.9], "down")
    rule = StopRule(STUDY, [([run], STUDY.goals)])
    told = []
    for step, error in enumerate([0.0, 0.3, 0.25, 0.19, 0.9], 2):
        add_rows(run, [error], step)
        told.append(rule.is_enough(run))
    assert told == [False, False, True, True, True], "what was reached stays so"
    short = made(tmp_path, tiny_data, [0.0, 0.0], "short")
    assert not StopRule(STUDY, [([short], STUDY.goals)]).is_enough(short), "no whole window"


def test_what_does_not_come_to_it_is_behind_all_that_do(tmp_path, tiny_data):
    slow = made(tmp_path, tiny_data, [0.9] * 20 + [0.2] * 4, "slow")
    near = made(tmp_path, tiny_data, [0.3] * 6, "near")
    far = made(tmp_path, tiny_data, [0.8] * 6, "far")
    gone = made(tmp_path, tiny_data, [0.3] * 6, "gone")
    gone.log.write_text("step 6\nerror: the loss of step 7 is nan: conv1 is the first\n")
    order = [read_result(STUDY, "relu", run) for run in (gone, far, near, slow)]
    assert [one.run.name for one in sorted(order, key=lambda one: one.rank_at(0))] == [
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


def race(folder: Path, data: Path) -> tuple[Study, dict[str, StudyRun]]:
    """Three rates of a variant, one seed: each error is held for three steps, a window."""
    levels = {
        0.1: [0.9, 0.44, 0.41, 0.41, 0.41, 0.41],  # first at 45 %, and then no further
        0.2: [0.9, 0.80, 0.44, 0.39, 0.39, 0.24],  # first at 40 % and 25 %
        0.3: [0.9, 0.80, 0.60, 0.44, 0.38, 0.30],  # at none
    }
    grid = ("lr", tuple(levels))
    study = replace(
        STUDY, goals=(0.45, 0.40, 0.25), grid=grid,
        variants=(Variant(name="relu", settings={}, data="", values=grid[1]),),
    )  # fmt: skip
    runs = {
        f"relu-lr{rate}-0": made(folder, data, np.repeat(some, 3).tolist(), f"relu-lr{rate}-0",
                                 lr=rate, steps=100)
        for rate, some in levels.items()
    }  # fmt: skip
    return study, runs


def cut(run: StudyRun, steps: int) -> None:
    path = run.folder / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:steps]))


def test_a_run_ends_when_it_can_be_the_best_at_no_goal_any_more(tmp_path, tiny_data):
    study, runs = race(tmp_path, tiny_data)
    slow = runs["relu-lr0.1-0"], runs["relu-lr0.3-0"]
    rows = {run.name: (run.folder / "metrics.jsonl").read_text() for run in slow}
    ended = {}
    for run in slow:  # each beside two that have gone as far as they go
        for steps in range(1, 19):
            cut(run, steps)
            rule = StopRule(study, [(list(runs.values()), study.goals)])
            if rule.is_enough(run):
                ended[run.name] = steps
                break
            (run.folder / "metrics.jsonl").write_text(rows[run.name])
        (run.folder / "metrics.jsonl").write_text(rows[run.name])
    # 0.2 is at 25 % with its 18th step; before that both could have been faster.
    assert ended == {"relu-lr0.1-0": 18, "relu-lr0.3-0": 18}
    cut(runs["relu-lr0.2-0"], 17)
    for run in runs.values():
        assert not StopRule(study, [(list(runs.values()), study.goals)]).is_enough(run)
    before = StopRule(study, [(list(runs.values()), study.goals[:2])])
    assert [before.is_enough(run) for run in runs.values()] == [True] * 3
    alone = StopRule(study, [([runs["relu-lr0.1-0"]], study.goals[:2])])
    assert not alone.is_enough(runs["relu-lr0.1-0"]), "40 % is not decided without its rivals"


def test_ends_change_no_outcome(tmp_path, tiny_data):
    study, runs = race(tmp_path, tiny_data)
    (variant,) = study.variants
    whole = [read_result(study, "relu", run) for run in runs.values()]
    best = [pick_best(study, variant, whole, goal) for goal in range(3)]
    assert [(one.at, one.reached[goal]) for goal, one in enumerate(best)] == [
        (0.1, 6 * BATCH), (0.2, 12 * BATCH), (0.2, 18 * BATCH),
    ]  # fmt: skip
    assert math.isnan(whole[0].value)
    assert whole[0].note == "ended early"
    for order in permutations(runs.values()):  # one step of each in turn, until each may end
        lines = {run.name: (run.folder / "metrics.jsonl").read_text() for run in order}
        for run in order:
            cut(run, 0)
        rule = StopRule(study, [(order, study.goals)])
        busy = list(order)
        for step in range(18):
            for run in list(busy):
                with (run.folder / "metrics.jsonl").open("a") as file:
                    file.write(lines[run.name].splitlines(keepends=True)[step])
                if rule.is_enough(run):
                    busy.remove(run)
        found = [read_result(study, "relu", run) for run in order]
        again = [pick_best(study, variant, found, goal) for goal in range(3)]
        assert [one.reached[:goal + 1] for goal, one in enumerate(again)] == [
            one.reached[:goal + 1] for goal, one in enumerate(best)
        ]  # fmt: skip
        for run in order:
            (run.folder / "metrics.jsonl").write_text(lines[run.name])


def at_goals(variant: str, rate: float, seed: int, *reached: float, images=900) -> Result:
    config = Config(seed=seed, lr=rate)
    return Result(
        variant=variant, run=StudyRun(name="r", config=config, data="", out=Path()),
        value=reached[-1], last_error=0.3, images=images, img_s=1.0, val_error=math.nan,
        train_error=0.3, reached=reached, at=rate, note="not reached",
    )  # fmt: skip


def test_each_goal_has_its_best_value_its_factor_and_what_is_known_without_one():
    nan = math.nan
    values = (0.1, 0.2)
    study = replace(
        STUDY, goals=(0.45, 0.40, 0.25), grid=("lr", values),
        variants=tuple(Variant(name=name, settings={}, data="", values=values)
                       for name in ("relu", "tanh")),
    )  # fmt: skip
    counted = [
        at_goals("relu", 0.1, 0, 100, 150, 300), at_goals("relu", 0.1, 1, 120, 160, 340),
        at_goals("tanh", 0.1, 0, 300, 800, nan), at_goals("tanh", 0.2, 0, 320, 750, nan),
        at_goals("tanh", 0.1, 1, 480, 700, nan), at_goals("tanh", 0.2, 1, 1, nan, nan, images=950),
    ]  # fmt: skip
    others = [at_goals("relu", 0.2, 0, 200, 200, 400)]
    first, second, last = (compare_variants(study, counted, others, goal) for goal in range(3))
    assert [(one["at"], one["each"]) for one in first] == [(0.1, [100, 120]), (0.1, [300, 480])]
    assert first[1]["against_first"] == pytest.approx(390 / 110)
    assert first[1]["factors"] == [3.0, 4.0]
    assert format_factor(first[1]) == "3.55× (3.00, 4.00)"
    assert (second[1]["at"], second[1]["each"], second[1]["mean"]) == (0.2, [750, None], None)
    assert second[1]["above"] == pytest.approx((750 + 950) / 310)
    assert last[1]["above"] == pytest.approx(900 / 320)
    assert format_factor(last[1]) == "above 2.8×"
    assert format_factor(last[0]) == ""
    gone = replace(counted[2], note="diverged")
    (_, tanh) = compare_variants(study, [*counted[:2], gone, *counted[3:]], others, 2)
    assert tanh["above"] is None, "of a run that diverged nothing is known"


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
