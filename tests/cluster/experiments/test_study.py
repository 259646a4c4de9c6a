"""A study from its file to its table: the runs are those of the training loop, and made once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import sys
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cluster.config import Config
from cluster.experiments.study import runner
from cluster.experiments.study.__main__ import main
from cluster.run.folder import format_toml
from pipeline.dataset.manifest import identity
from pipeline.tools.errors import UsageError
from tests.helpers.images import packed
from tests.helpers.processes import start_command
from tests.helpers.training_processes import REPOSITORY, marked, processes
from tests.helpers.training_runs import alone, cut_at, learned, rows

STEPS = 6
SETTINGS = {
    "width": 0.125, "batch_size": 8, "steps": STEPS, "checkpoint_every": 3, "validate_every": 3,
    "dtype": "float32", "threads": 1,
}  # fmt: skip
TEXT = f"""
title = "Units"
claim = "ReLUs learn faster"
paper = "6 times"
source = "section 3.1"
base = "base.toml"
seeds = [0, 1]
measure = "error"
plot = "val"
[settings]
{"".join(f"{key} = {json.dumps(value)}{chr(10)}" for key, value in SETTINGS.items())}
[grid]
lr = [0.01, 0.001]
[variants.relu]
[variants.tanh]
activation = "tanh"
"""


def written(folder: Path, text: str = TEXT) -> Path:
    (folder / "base.toml").write_text("momentum = 0.8\n")
    (folder / "units.toml").write_text(text)
    return folder / "units.toml"


def run_here(runs, slots, module, progress, is_enough):
    """`run_side_by_side` in this process, which need not wait for others to start."""
    assert module == "cluster.experiments.study.runner"
    for run in runs:
        file = run.out / f"{run.name}.toml"
        file.write_bytes(run.toml)
        words = [str(file), "--data", run.data, "--run", str(run.folder)]
        assert runner.main(words) == 0


@pytest.fixture(scope="module")
def out(tiny_data, tmp_path_factory):
    """A study that was made."""
    folder = tmp_path_factory.mktemp("study")
    study = written(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cluster.experiments.study.__main__.run_side_by_side", run_here)
        assert main([str(study), "--data", str(tiny_data), "--out", str(folder / "out")]) == 0
    return folder / "out"


def found(out: Path) -> dict:
    return json.loads((out / "study.json").read_text())


def test_runs_are_those_of_the_training_loop(out, tiny_data, tmp_path):
    config = Config.from_settings(
        SETTINGS | {"momentum": 0.8, "activation": "tanh", "lr": 0.001, "seed": 0}
    )
    alone(config, tiny_data, tmp_path / "alone")
    made = out / "tanh-lr0.001-0"
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert learned(made, name) == learned(tmp_path / "alone", name)


def test_of_a_grid_the_rate_with_the_lowest_error_is_used_for_the_other_seeds(out):
    for variant in ("relu", "tanh"):
        last = {
            rate: rows(out / f"{variant}-lr{rate}-0", "validation.jsonl")[-1]["top1_error"]
            for rate in (0.01, 0.001)
        }
        best = min(last, key=lambda rate: last[rate])
        told = [row for row in found(out)["rows"] if row["variant"] == variant]
        assert [(row["seed"], row["lr"]) for row in told] == [(0, best), (1, best)]
        assert {path.name for path in out.glob(f"{variant}-lr*-1")} == {f"{variant}-lr{best}-1"}
        (other,) = [row for row in found(out)["grid"] if row["variant"] == variant]
        assert {other["lr"], best} == {0.01, 0.001}


def test_the_table_has_mean_and_spread_over_seeds(out):
    result = found(out)
    assert {key: result[key] for key in ("study", "claim", "paper", "plot")} == {
        "study": "units", "claim": "ReLUs learn faster", "paper": "6 times", "plot": "study.png",
    }  # fmt: skip
    means = []
    for one in result["variants"]:
        mine = [row for row in result["rows"] if row["variant"] == one["variant"]]
        errors = [rows(out / row["run"], "validation.jsonl")[-1]["top1_error"] for row in mine]
        assert [row["value"] for row in mine] == errors
        assert one["mean"] == pytest.approx(statistics.fmean(errors))
        assert one["sd"] == pytest.approx(statistics.stdev(errors))
        assert {row["pictures"] for row in mine} == {8 * STEPS}
        means.append(one["mean"])
    assert result["variants"][1]["against_first"] == pytest.approx(means[1] - means[0])
    text = (out / "study.md").read_text()
    for mean in means:
        assert f"| {100 * mean:.1f} (" in text
    assert "48 training images of 4 classes, width 0.125, at most 6 steps of 8" in text


def test_the_plot_shows_something(out):
    pixels = np.asarray(Image.open(out / "study.png").convert("RGB"))
    assert pixels.shape[1] > 1000
    # Two curves in two colours, as matplotlib has them.
    for colour in ((31, 119, 180), (255, 127, 14)):
        assert (np.abs(pixels.astype(int) - colour).max(2) < 8).sum() > 60


def test_nothing_is_made_twice_and_a_half_run_goes_on(
    out, tiny_data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("cluster.experiments.study.__main__.run_side_by_side", run_here)
    again = Path(shutil.copytree(out, tmp_path / "again"))
    half = f"relu-lr{found(out)['rows'][0]['lr']}-1"
    shutil.rmtree(again / half)
    (again / half).mkdir()
    shutil.copy(out / half / "config.toml", again / half)
    cut_at(3, out / half, again / half)
    before = {path: path.stat().st_mtime_ns for path in again.rglob("metrics.jsonl")}
    study = str(written(tmp_path))
    capsys.readouterr()
    main([study, "--out", str(again), "--json"])  # the runs know their data set
    told = json.loads(capsys.readouterr().out.splitlines()[-1])  # runs made here talk, too
    changed = {p.parent.name for p, time_ in before.items() if p.stat().st_mtime_ns != time_}
    assert changed == {half}
    assert learned(again / half) == learned(out / half)
    assert [row["value"] for row in told["rows"]] == [row["value"] for row in found(out)["rows"]]


def test_a_new_study_is_told_to_name_its_data(tmp_path):
    with pytest.raises(UsageError, match=r"holds no run that says where .* give --data"):
        main([str(written(tmp_path)), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_runs_made_with_other_settings_are_refused(out, tiny_data, tmp_path):
    study = written(tmp_path, TEXT.replace("width = 0.125", "width = 0.25"))
    with pytest.raises(UsageError) as error:
        main([str(study), "--data", str(tiny_data), "--out", str(out)])
    assert "was made otherwise (width: 0.125 -> 0.25); name another --out" in str(error.value)


def test_a_variant_starts_from_the_run_of_another_on_other_classes(
    tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr("cluster.experiments.study.__main__.run_side_by_side", run_here)
    text = (
        TEXT[: TEXT.index("[grid]")].replace("[0, 1]", "[3]").replace("= 6", "= 4")
        + """
[data.others]
classes = [0, 0.5]
[data.wanted]
classes = [0.5, 1]
[variants.before]
data = "others"
hidden = true
[variants.scratch]
data = "wanted"
[variants.finetuned]
data = "wanted"
after = "before"
"""
    )
    words = [str(written(tmp_path, text)), "--data", str(tiny_data), "--out", str(tmp_path / "out")]
    for _ in range(2):  # the second time nothing is left to do
        assert main(words) == 0
    out = tmp_path / "out"
    assert [row["variant"] for row in found(out)["rows"]] == ["scratch", "finetuned"]
    data = out / "data" / "wanted"
    config = Config.from_settings(SETTINGS | {"steps": 4, "momentum": 0.8, "seed": 3})
    alone(config, data, tmp_path / "scratch")
    before = str(out / "before-3" / "checkpoints" / "step-00000004")
    alone(replace(config, init=before), data, tmp_path / "finetuned")
    for name in ("scratch", "finetuned"):
        assert learned(out / f"{name}-3") == learned(tmp_path / name)
    assert learned(tmp_path / "scratch") != learned(tmp_path / "finetuned")


GOALS = f"""
title = "Units"
claim = "ReLUs learn faster"
paper = "6 times"
source = "section 3.1"
base = "base.toml"
seeds = [0, 1]
measure = "pictures"
goal = [0.6, 0.4, 0.2]
window = 16
plot = "train"
[settings]
net = "four"
columns = 1
norm = "none"
augment = false
validate_every = 0
{"".join(f"{key} = {json.dumps(SETTINGS[key])}{chr(10)}" for key in ("width", "batch_size"))}
steps = 40
[grid]
lr = [0.01, 0.1]
[variants.relu]
[variants.tanh]
activation = "tanh"
"""
# Error of a run is 1 - speed * step down to a floor: lr 0.1 is faster, and stays above 20 %.
SPEEDS = {("relu", 0.01): (0.04, 0.0), ("relu", 0.1): (0.08, 0.3),
          ("tanh", 0.01): (0.02, 0.0), ("tanh", 0.1): (0.025, 0.3)}  # fmt: skip


def pretend_here(most: int):
    """`run_side_by_side` that writes rows of `SPEEDS`, a step of each run in turn; `most` in all.

    After `most` rows it is interrupted, as by Ctrl-C.
    """
    left = [most]

    def run(runs, slots, module, progress, is_enough):
        busy = list(runs)
        while busy:
            for one in list(busy):
                speed, floor = SPEEDS[one.config.design.activation, one.config.lr]
                one.folder.mkdir(exist_ok=True)
                if not (one.folder / "config.toml").exists():
                    (one.folder / "config.toml").write_text(
                        format_toml(one.config, identity(Path(one.data)))
                    )
                step = one.position // 8 + 1
                error = max(floor, 1 - speed * step + one.config.seed / 50)
                row = {"position": 8 * step, "step": step, "img_s": 100.0, "top1_error": error}
                with (one.folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(row) + "\n")
                if is_enough(one) or step == one.steps:
                    busy.remove(one)
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt

    return run


@pytest.fixture(scope="module")
def small_data(image_folder, tmp_path_factory):
    """The images at 32 pixels, which the small networks read as they are."""
    out = tmp_path_factory.mktemp("small") / "data"
    packed(out, train=image_folder / "train", val=image_folder / "val", size=32, encoding="raw")
    return out


def test_goals_have_factors_and_a_killed_study_comes_to_the_same(
    small_data, tmp_path, monkeypatch, capsys
):
    study = str(written(tmp_path, GOALS))
    told = []
    for name, mosts in (("whole", [10**6]), ("killed", [3, 50, 45, 10**6])):
        words = [study, "--data", str(small_data), "--out", str(tmp_path / name), "--json"]
        for most in mosts:
            monkeypatch.setattr(
                "cluster.experiments.study.__main__.run_side_by_side", pretend_here(most)
            )
            if most < 10**6:
                with pytest.raises(KeyboardInterrupt):
                    main(words)
        assert main(words) == 0
        told.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    whole, killed = told
    for key in ("goals", "variants", "spread"):
        assert whole[key] == killed[key], key
    first, second, last = whole["goals"]
    assert [one["at"] for one in first["variants"]] == [0.1, 0.1]
    assert [one["at"] for one in last["variants"]] == [0.01, 0.01]
    # The mean of two steps is at the goal half a step later than a step is; seeds differ by 2 %.
    assert first["variants"][0]["each"] == [8 * 6, 8 * 6]
    assert first["variants"][1]["each"] == [8 * 17, 8 * 18]
    assert second["variants"][1]["each"] == [8 * 25, 8 * 26]
    relu, tanh = last["variants"]
    assert relu["each"] == [8 * 21, 8 * 21]
    assert tanh["each"] == [None, None]
    assert tanh["above"] == pytest.approx(40 / 21)
    lengths = {row["run"]: row["pictures"] for row in whole["rows"] + whole["grid"]}
    assert lengths["relu-lr0.1-0"] == 8 * 21, "it ends when the other is at the last goal"
    assert lengths["tanh-lr0.1-1"] == 8 * 26, "with the last goal that its rate is kept for"
    text = (tmp_path / "whole" / "study.md").read_text()
    for line in ("| 60% | `tanh` | 0.1 (edge of the grid) | 140 (136, 144) | 2.92× (2.83, 3.00) |",
                 "| above 1.9× |", "not within 320 images (21.0% at the end)",
                 "| `relu` | 0.1 | 48 | 64 | – | 168 |"):  # fmt: skip
        assert line in text
    assert np.asarray(Image.open(tmp_path / "whole" / "study.png")).shape[1] > 1000


def test_a_study_of_small_images_resumes_its_own_runs(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr("cluster.experiments.study.__main__.run_side_by_side", run_here)
    text = GOALS[: GOALS.index("[grid]")].replace("= 40", "= 2").replace("[0, 1]", "[0]")
    study = str(written(tmp_path, text + "[variants.relu]\n"))
    words = [study, "--data", str(small_data), "--out", str(tmp_path / "out")]
    for _ in range(2):
        assert main(words) == 0
    assert "image_size = 32\n" in (tmp_path / "out" / "relu-0" / "config.toml").read_text()


def started(folder: Path, data: Path, steps: int) -> tuple[BaseProcess, str, Path]:
    """A study of one run in a process, its mark, and the run, which has made steps."""
    text = TEXT.replace("steps = 6", f"steps = {steps}").replace("[0, 1]", "[0]")
    text = text[: text.index("[grid]")] + "[variants.relu]\n"
    mark, environment = marked()
    said = folder / "said"
    process = start_command(
        [sys.executable, "-m", "cluster.experiments.study", written(folder, text),
         "--data", data, "--out", folder / "out"],
        said, said, cwd=REPOSITORY, env=environment,
    )  # fmt: skip
    run = folder / "out" / "relu-0"
    deadline = time.monotonic() + 90
    while not (run / "checkpoints").is_dir() or not any((run / "checkpoints").glob("step-*")):
        assert process.exitcode is None, said.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process, mark, run


@pytest.mark.slow
def test_a_study_that_is_stopped_saves_and_goes_on(tiny_data, tmp_path, monkeypatch):
    process, mark, run = started(tmp_path, tiny_data, 30)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130, (tmp_path / "said").read_text()
    assert processes(mark) == []
    last = rows(run)[-1]["step"]
    assert 0 < last < 30
    assert (run / "checkpoints" / f"step-{last:08d}").is_dir()
    assert "the same command resumes" in run.with_name("relu-0.log").read_text()
    study = tmp_path / "units.toml"
    monkeypatch.setattr("cluster.experiments.study.__main__.run_side_by_side", run_here)
    assert main([str(study), "--data", str(tiny_data), "--out", str(tmp_path / "out")]) == 0
    alone(
        Config.from_settings(SETTINGS | {"steps": 30, "momentum": 0.8}),
        tiny_data,
        tmp_path / "alone",
    )
    assert learned(run) == learned(tmp_path / "alone")


@pytest.mark.slow
def test_runs_end_with_a_study_that_is_killed(tiny_data, tmp_path):
    process, mark, _ = started(tmp_path, tiny_data, 5000)
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and processes(mark):
        time.sleep(0.2)
    assert processes(mark) == []
