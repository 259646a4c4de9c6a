"""Progress lines of long work where there is no terminal."""

from __future__ import annotations

import io
import sys
import time

import pytest

from pipeline.tools import progress
from pipeline.tools.progress import Progress, announce


def test_a_plain_line_every_half_minute(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("packing", total=20_000, unit="img", already=2_000) as bar:
        for second in (10, 29, 30, 45, 61):
            now = 100.0 + second
            bar.note("3 skipped")
            bar.advance(1_000)
    assert sys.stderr.getvalue().splitlines() == [
        "packing: 5,000 of 20,000 img, 100 img/s, 0:02:30 left, 3 skipped",
        "packing: 7,000 of 20,000 img, 82 img/s, 0:02:39 left, 3 skipped",
    ]


def test_what_is_skipped_tells_no_rate(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("study", total=20_000, unit="img") as bar:
        bar.skip(9_000)
        now = 131.0
        bar.advance(3_100)
    assert sys.stderr.getvalue() == "study: 12,100 of 20,000 img, 100 img/s, 0:01:19 left\n"


def hurry(patch: pytest.MonkeyPatch) -> None:
    """Let lines come a hundred times as fast, on a stderr that is no terminal."""
    for name, seconds in {"TICK": 0.01, "FIRST": 0.05, "EVERY": 0.3}.items():
        patch.setattr(progress, name, seconds)
    patch.setattr(sys, "stderr", io.StringIO())


def wait_for_lines(count: int) -> list[str]:
    deadline = time.monotonic() + 20
    while len(lines := sys.stderr.getvalue().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return lines


def test_a_line_comes_soon_and_then_even_if_nothing_advances(monkeypatch):
    hurry(monkeypatch)
    with Progress("packing", total=20_000, unit="img") as bar:
        assert wait_for_lines(2)[:2] == ["packing: 0 of 20,000 img"] * 2
        bar.note("3 skipped")
        assert wait_for_lines(3)[2] == "packing: 0 of 20,000 img, 3 skipped"


def test_work_without_an_amount_is_named_with_its_time(monkeypatch):
    hurry(monkeypatch)
    with announce("listing the images of [x]"):
        lines = wait_for_lines(3)
    assert {line.partition(": ")[0] for line in lines} == {"listing the images of [x]"}
    assert all(line.endswith(" s so far") for line in lines)
    time.sleep(0.4)
    assert sys.stderr.getvalue().splitlines() == lines  # it ends with its block


def test_short_work_and_a_closed_stderr_are_silent(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with announce("x"), Progress("x", total=1, unit="img") as bar:
        bar.advance(1)
    assert sys.stderr.getvalue() == ""
    sys.stderr.close()
    progress.write_line("nobody reads it")
