"""Output of a run: lines where there is no terminal, and the error that ends a run."""

from __future__ import annotations

import io
import subprocess
import sys
import time

import pytest
from rich.console import Console

from cluster.run.console import RunConsole, format_device, format_duration
from cluster.run.events import (
    Finished,
    Rated,
    Saved,
    Started,
    Stepped,
    Validated,
    Warned,
    Worker,
)
from pipeline.tools.stdio import standard_streams
from pipeline.tools.terminal import Terminal

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
    with RunConsole(Console(file=out, width=60, highlight=False)) as screen:
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
    assert lines[1].endswith("1,234 img/s  waiting for data 4%  epoch 0.50")
    assert lines[2:] == [
        "step     10  validation: loss 1.500  top-1 error 40.0%  top-5 error 12.5%"
        "  (2,000 images, 3.0 s)",
        "step     10  checkpoint (0.5 s)",
        "step     10  done",
    ]


def test_the_time_left_is_counted_from_the_first_step(monkeypatch):
    """The wait of the first step, such as for compilation, does not come again."""
    out, clock = io.StringIO(), [100.0]
    monkeypatch.setattr("cluster.run.console.time.monotonic", lambda: clock[0])
    with RunConsole(Console(file=out, width=60, highlight=False)) as screen:
        for now, event in (
            (100.0, Started(0, 21, "x")),
            (160.0, Stepped({**ROW, "step": 1})),
            (180.0, Stepped({**ROW, "step": 11})),
        ):
            clock[0] = now
            screen.show(event)
    first, second = (line for line in out.getvalue().splitlines() if "img/s" in line)
    assert " left" not in first
    assert f"  {format_duration(20.0)} left  " in second


def test_until_the_run_starts_a_wait_is_told_again_and_again(monkeypatch):
    monkeypatch.setattr("pipeline.tools.progress.TICK", 0.01)
    monkeypatch.setattr("cluster.run.console.WAIT_EVERY", 0.1)
    out = io.StringIO()
    with RunConsole(Console(file=out, width=60, highlight=False)) as screen:
        screen.wait("starting Ray and the workers")
        deadline = time.monotonic() + 20
        while out.getvalue().count("\n") < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        screen.show(Started(0, 10, "x"))
        lines = out.getvalue().splitlines()
        time.sleep(0.3)
        assert out.getvalue().splitlines() == lines
    assert lines[0] == "starting Ray and the workers ..."
    assert lines[1:3] == ["still starting Ray and the workers: 0 s so far"] * 2
    assert lines[-1] == "starting: 10 steps on x"


def test_a_change_of_the_rates_is_a_line():
    assert shown(Rated(500, "lr 0.01 -> 0.001 [plateau]")) == [
        "step    500  from here on: lr 0.01 -> 0.001 [plateau]"
    ]


def test_a_second_start_says_why():
    lines = shown(Started(0, 10, "x"), Warned("checkpoint [a] is damaged"), Started(4, 10, "x"))
    assert lines[1:] == [
        "warning: checkpoint [a] is damaged",
        "restarted, going on from step 4: 6 steps on x",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (65.4, "1:05"), (3723, "1:02:03"), (3 * 86400 + 14706, "3 days 4:05:06")],
)
def test_time_left(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("opening", "interrupts"), [("os.pipe()", 1), ("pty.openpty()", 0)])
def test_a_run_whose_reader_has_gone_is_saved_and_ends(opening, interrupts):
    """A terminal that has gone sends SIGHUP itself; a pipe only refuses what is written."""
    script = f"""
import os, pty, signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored
from cluster.run.console import RunConsole
from cluster.launch.controller import count_interrupts
from pipeline.tools.stdio import standard_streams
reader, writer = {opening}
report = os.dup(1)
os.dup2(writer, 1), os.dup2(writer, 2), os.close(writer)
with standard_streams(), count_interrupts() as count, RunConsole() as screen:
    screen.say("first")
    os.close(reader)
    screen.say("second")
    screen.say("third")
    os.write(report, b"%d interrupts" % count())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert (done.stdout, done.returncode) == (b"%d interrupts" % interrupts, 0)


def test_a_run_goes_on_where_its_output_cannot_be_written(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with standard_streams(), RunConsole() as screen:
            for number in range(3):
                screen.say(f"line {number}")
        monkeypatch.undo()
    told = capsys.readouterr().err
    assert told == "warning: standard output cannot be written (No space left on device)\n"


def test_a_node_of_any_name_is_shown_as_it_is():
    out = io.StringIO()
    with RunConsole(Terminal(out, width=60)) as screen:
        screen.table([Worker(0, 0, "a", "[/x] \x1b[2J:bee:", None)])
        screen.say("see s3://b/x?sig=secret")
    assert "[/x] \\x1b[2J:bee:" in out.getvalue()
    assert "secret" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize(
    ("gpu", "shown"), [(None, "CPU"), (0, "GPU 0"), ("MIG-1/7/0", "MIG-1/7/0")]
)
def test_a_device_is_shown_by_its_number_or_id(gpu, shown):
    assert format_device(gpu) == shown
