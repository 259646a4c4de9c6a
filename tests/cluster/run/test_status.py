"""The state of a run, read from its files."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.config import Config
from cluster.report.records import read_records
from cluster.report.tables import list_saved_checkpoints
from cluster.run.folder import format_toml
from cluster.run.state import read_state
from cluster.run.sync import DRIVER_FILES, RunMirror
from cluster.status import draw_sparkline, main, render
from pipeline.tools.errors import UsageError
from tests.helpers.training_processes import REPOSITORY

NOW = time.time()
WORKERS = [
    {"rank": rank, "replica": rank // 2, "column": "ab"[rank % 2], "node": "n1", "gpu": rank}
    for rank in range(4)
]


class Run:
    """A run folder put together by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "config.toml").write_text(format_toml(Config(steps=1000), "abc"))

    def rows(self, count: int, age: float = 1.0, **more: Any) -> None:
        path = self.folder / "metrics.jsonl"
        path.write_text(
            "".join(
                json.dumps(
                    {"position": 128 * step, "epoch": step / 10, "step": step,
                     "loss": 7 - step / 100, "top1_error": 0.9, "lr": 0.01,
                     "lr_bias": 0.02, "img_s": 640.0,
                     "data_wait": 0.02, "stall": 0.03, "exchange": 0.02, "saving": 0.0,
                     "seconds": 0.2, "replicas": 2} | more
                ) + "\n" for step in range(1, count + 1)
            )
        )  # fmt: skip
        os.utime(path, (NOW - age, NOW - age))

    def attempts(self, *events: dict[str, Any]) -> None:
        with (self.folder / "attempts.jsonl").open("w") as file:
            for event in events:
                file.write(json.dumps({"time": NOW - 50, "workers": WORKERS} | event) + "\n")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


START = {"event": "start", "attempt": 1, "step": 0}
DIED = {"event": "end", "attempt": 1, "step": 90, "why": "the worker of replica 0 died", "code": 1}


@pytest.mark.parametrize(
    ("events", "age", "error", "state", "why"),
    [
        ([], 1, None, "not started", ""),
        ([START], 1, None, "running", ""),
        ([START | {"time": NOW - 900}], 600, None, "stalled", "no row for 600 s"),
        ([START | {"time": NOW - 900}, DIED, START], 600, None, "running", ""),
        ([START, DIED], 20, None, "running", "starting again: the worker of replica 0 died"),
        ([START, DIED], 20, "no room at all", "failed", "no room at all"),
        ([START, DIED | {"why": "stopped"}], 20, None, "stopped", "the same command resumes"),
        ([START, DIED | {"why": "finished", "code": 0}], 9999, None, "finished", ""),
    ],
)
def test_the_state_follows_from_starts_ends_and_the_last_row(run, events, age, error, state, why):
    run.rows(100, age=age)
    run.attempts(*events)
    if error:
        (run.folder / "error.log").write_text(f"2026-11-26 10:00:00\n{error}\nTraceback\n")
    found = read_state(run.folder, NOW)
    assert found.state == state
    assert why in found.why
    assert (found.step, found.total) == (100, 1000)


def on_this_machine(run: Run, age: float) -> None:
    run.rows(100, age=age)
    workers = [worker | {"node": platform.node()} for worker in WORKERS]
    run.attempts(START | {"time": NOW - 900, "workers": workers})


def test_a_leader_that_is_gone_is_noticed_at_once_and_surely(run):
    leader = run.folder / ".leader"
    leader.touch()
    on_this_machine(run, age=15)
    hold = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(leader)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = read_state(run.folder, NOW)
        assert (found.state, found.why) == ("running", "")
        assert found.evidence == "sure: a worker on this machine holds RUN/.leader"
        process.kill()
    found = read_state(run.folder, NOW)
    assert found.state == "stalled"
    assert "its leading worker is gone" in found.why
    assert found.evidence.startswith("sure")


def test_a_leader_elsewhere_leaves_doubt(run):
    (run.folder / ".leader").touch()
    run.rows(100, age=15)
    run.attempts(START)
    found = read_state(run.folder, NOW)
    assert found.state == "running"
    assert found.evidence == "likely: by the age of the last row or start, 15 s"


def test_a_long_validation_is_no_standstill(run):
    run.rows(100, age=150)
    run.attempts(START | {"time": NOW - 900})
    row = {"step": 50, "loss": 6.0, "top1_error": 0.7, "top5_error": 0.5, "seconds": 120.0}
    (run.folder / "validation.jsonl").write_text(json.dumps(row) + "\n")
    assert read_state(run.folder, NOW).state == "running"
    assert read_state(run.folder, NOW + 300).state == "stalled"


@pytest.mark.parametrize(
    ("settings", "epoch", "start", "total"),
    [
        ({"steps": 700}, 0.5, {}, 700),
        ({"epochs": 2}, 0.5, {}, 400),  # half an epoch in 100 steps
        ({"epochs": 2}, 0.001, {}, None),  # too coarse
        ({"epochs": 2}, 0.001, {"total": 399}, 399),
    ],
)
def test_the_steps_of_the_whole_run(tmp_path, settings, epoch, start, total):
    run = Run(tmp_path)
    (tmp_path / "config.toml").write_text(format_toml(Config.from_settings(settings), "abc"))
    run.rows(100, epoch=epoch)
    run.attempts(START | start)
    assert read_state(tmp_path, NOW).total == total


def test_an_error_of_long_ago_says_nothing_of_this_end(run):
    run.rows(100)
    run.attempts(START, DIED)
    (run.folder / "error.log").write_text("then\nold\n")
    os.utime(run.folder / "error.log", (NOW - 5000, NOW - 5000))
    assert read_state(run.folder, NOW).state == "running"


def full(run: Run) -> None:
    run.rows(100)
    run.attempts(START, DIED, START | {"attempt": 2})
    (run.folder / "validation.jsonl").write_text(
        "".join(
            json.dumps({"step": step, "loss": 6.0, "top1_error": error, "top5_error": 0.5}) + "\n"
            for step, error in ((50, 0.7), (80, 0.6), (100, 0.65))
        ) + '{"step": 1'
    )  # fmt: skip
    checkpoint = run.folder / "checkpoints" / "step-00000090"
    checkpoint.mkdir(parents=True)
    (checkpoint / "column-a.safetensors").write_bytes(bytes(1000))
    (run.folder / "quarantine.jsonl").write_text('{"sample": 3}\n{"sample": 9}\n')


def test_the_numbers_are_those_of_the_last_rows(run):
    full(run)
    found = read_state(run.folder, NOW)
    assert found.last["loss"] == pytest.approx(7 - sum(range(51, 101)) / 50 / 100)
    assert found.left_s == pytest.approx(900 * 0.2)
    assert (found.validation["step"], found.best["step"]) == (100, 80)
    assert (found.checkpoint["step"], found.checkpoint["bytes"]) == (90, 1000)
    assert (found.replaced, found.starts) == (2, 2)
    assert found.workers == WORKERS
    json.dumps(asdict(found))


def test_checkpoints_of_another_run_in_the_same_store_are_not_its_own(run, tmp_path):
    store = tmp_path / "store"
    text = format_toml(Config(steps=1000, store=str(store)), "abc", "mine-01")
    (run.folder / "config.toml").write_text(text)
    for step, name in ((30, "mine-01"), (60, "other-02")):
        checkpoint = store / f"checkpoints/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").write_text(json.dumps({"run": name}))
    assert read_state(run.folder, NOW).checkpoint["step"] == 30
    assert [step for step, *_ in list_saved_checkpoints(read_records(run.folder))] == ["30"]
    shutil.rmtree(store / "checkpoints/step-00000030")
    wanted = {"where": f"none; {store} has those of run other-02"}
    assert read_state(run.folder, NOW).checkpoint == wanted
    assert list_saved_checkpoints(read_records(run.folder)) == []


def test_a_start_that_was_cut_before_its_first_step_counts(run):
    run.rows(3)
    cut = DIED | {"why": "killed while it started"}
    run.attempts(START | {"attempt": 1}, DIED | {"attempt": 1}, cut | {"attempt": 2},
                 START | {"attempt": 3})  # fmt: skip
    assert read_state(run.folder, NOW).starts == 3


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_screen_shows_them_within_its_width(run, width):
    full(run)
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(read_state(run.folder, NOW), width))
    text = console.export_text()
    words = ["running", "100 of 1,000", "10.0%", "3:00 left", "640 img/s",
             "2.0% of a step for data", "step 90", "best 60.00%", "2 damaged or withdrawn images",
             "the worker of", "GPU 3"]  # fmt: skip
    flat = " ".join(text.split())
    assert [word for word in words if word not in flat] == []
    assert max(map(len, text.splitlines())) <= width


def test_of_a_long_file_only_the_end_is_read(run):
    run.rows(60_000)
    run.attempts(START)
    start = time.perf_counter()
    assert read_state(run.folder, NOW).step == 60_000
    assert time.perf_counter() - start < 0.5


def test_a_long_quarantine_is_counted_not_parsed(run):
    (run.folder / "quarantine.jsonl").write_bytes(b'{"sample": 3}\n' * 1_000_000)
    start = time.perf_counter()
    assert read_state(run.folder, NOW).replaced == 1_000_000
    assert time.perf_counter() - start < 0.5


def test_nothing_heavy_is_imported_to_look():
    script = "import sys, cluster.status; print({'torch', 'ray', 'nvidia'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True)
    assert found.stdout.strip() == b"set()"


def test_half_a_row_and_no_rows_are_no_trouble(run):
    assert read_state(run.folder, NOW).state == "not started"
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "lo')
    (run.folder / "attempts.jsonl").write_text("[1]\n{")
    assert read_state(run.folder, NOW).step == 0


def test_what_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match=r"holds no run \(config.toml is missing\)"):
        main([str(tmp_path)])


def test_the_rows_in_a_store_show_a_run_without_its_folder(run, s3_bucket, capsys):
    full(run)
    bucket = f"{s3_bucket}/runs/paper"
    mirror = RunMirror(run.folder, bucket)
    mirror.push()
    mirror.push_whole(DRIVER_FILES)
    assert main([bucket, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["step"], found["starts"]) == (bucket, 100, 2)
    assert found["evidence"].startswith("not sure: the store has its rows up to the last save")
    assert found["age_s"] is None
    with pytest.raises(UsageError, match="without --watch"):
        main([bucket, "--watch"])
    with pytest.raises(UsageError, match="/empty holds no run"):
        main([bucket + "/empty"])


def test_json_is_one_object(run, monkeypatch, capsys):
    monkeypatch.setattr("cluster.status.time.time", lambda: NOW)
    full(run)
    assert main([str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "running"


def test_watching_ends_with_the_run(run, monkeypatch, capsys):
    full(run)

    def finish(seconds: float) -> None:
        run.attempts(START, DIED | {"why": "finished"})

    monkeypatch.setattr("cluster.status.time.sleep", finish)
    assert main([str(run.folder), "--watch"]) == 0
    assert "finished" in capsys.readouterr().out


def test_bars_rise_with_the_values():
    assert draw_sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert draw_sparkline([5.0] * 100, 10) == "▁" * 10
    assert draw_sparkline([1.0], 10) == ""
