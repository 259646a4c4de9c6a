"""Progress lines of long work where there is no terminal."""

from __future__ import annotations

import io
import sys

from pipeline.tools import progress
from pipeline.tools.progress import Progress


def test_a_plain_line_every_half_minute(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("packing", total=20_000, unit="img", already=2_000) as bar:
        for second in (10, 29, 30, 45, 61):
            now = 100.0 + second
            bar.note("3 left out")
            bar.advance(1_000)
    assert sys.stderr.getvalue().splitlines() == [
        "packing: 5,000 of 20,000 img, 100 img/s, 0:02:30 left, 3 left out",
        "packing: 7,000 of 20,000 img, 82 img/s, 0:02:39 left, 3 left out",
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
