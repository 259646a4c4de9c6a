"""What the user sees: lines where there is no terminal, and the error that ends a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from cluster.console import Screen, clock
from cluster.events import Failed, Finished, Rated, Saved, Started, Stepped, Validated, Warned
from cluster.train import explain

ROW = {
    "step": 5,
    "epoch": 0.5,
    "loss": 2.25,
    "top1_error": 0.75,
    "img_s": 1234.0,
    "data_wait": 0.04,
}
VALIDATED = {
    "step": 10, "loss": 1.5, "top1_error": 0.4, "top5_error": 0.125, "samples": 2000,
    "seconds": 3.0,
}  # fmt: skip


def shown(*events: object) -> list[str]:
    out = io.StringIO()
    with Screen(Console(file=out, width=60, highlight=False)) as screen:
        for event in events:
            screen.show(event)
    return out.getvalue().splitlines()


def test_without_a_terminal_every_event_is_one_line_and_steps_are_rare():
    steps = [Stepped({**ROW, "step": step}) for step in range(5, 10)]
    lines = shown(
        Started(0, 10, "2 workers"), *steps, Validated(VALIDATED), Saved(10, 0.5), Finished(10)
    )
    assert lines[0] == "starting: 10 steps on 2 workers"
    assert lines[1].startswith("step      5  loss 2.250  top-1 error 75.0%  1,234 img/s  ")
    assert lines[1].endswith("left  waiting for data 4%  epoch 0.50")
    assert lines[2:] == [
        "step     10  validation: loss 1.500  top-1 error 40.0%  top-5 error 12.5%"
        "  (2,000 pictures, 3.0 s)",
        "step     10  checkpoint (0.5 s)",
        "step     10  done",
    ]


def test_a_change_of_the_rates_is_a_line():
    assert shown(Rated(500, "lr 0.01 -> 0.001 [plateau]")) == [
        "step    500  from here on: lr 0.01 -> 0.001 [plateau]"
    ]


def test_a_second_start_says_why():
    lines = shown(Started(0, 10, "x"), Warned("checkpoint [a] is damaged"), Started(4, 10, "x"))
    assert lines[1:] == [
        "warning: checkpoint [a] is damaged",
        "restarted after a lost worker, going on from step 4: 6 steps on x",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (65.4, "1:05"), (3723, "1:02:03"), (3 * 86400 + 14706, "3 days 4:05:06")],
)
def test_time_left(seconds, text):
    assert clock(seconds) == text


class WorkerHealthCheckFailedError(Exception):
    """Named like Ray Train's."""


class Failure(Exception):
    """Like Ray Train's WorkerGroupError."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        gone, torn = WorkerHealthCheckFailedError("gone"), RuntimeError("reset by peer")
        self.worker_failures = {0: gone, 1: torn}


def failed(text: str, final: bool, code: int = 1) -> Failed:
    return Failed(text, "Traceback of " + text, "replica 0, column b", code, final)


def test_the_cause_is_told_not_what_it_led_to(tmp_path: Path):
    told = explain(
        failed("RuntimeError: reset by peer", final=False), Failure("both"), tmp_path, ""
    )
    assert str(told).startswith(
        "the worker of rank 0 died: killed, or out of memory (traceback in "
    )
    assert told.exit_code == 1
    log = (tmp_path / "error.log").read_text()
    assert "Traceback of RuntimeError: reset by peer" in log
    assert "both" in log


def test_an_error_of_ours_keeps_its_exit_code(tmp_path: Path):
    told = explain(failed("shard x is damaged", final=True, code=4), None, tmp_path, "")
    assert str(told).startswith("replica 0, column b: shard x is damaged (traceback in ")
    assert told.exit_code == 4


def test_a_failure_of_ray_itself_is_one_line(tmp_path: Path):
    told = explain(None, RuntimeError("no room\nsecond line"), tmp_path, "said aside")
    assert str(told).startswith("no room (traceback in ")
    assert "said aside" in (tmp_path / "error.log").read_text()
