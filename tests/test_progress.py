"""What long work says of itself where there is no terminal."""

from __future__ import annotations

import io
import sys

from pipeline import progress
from pipeline.progress import Progress


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
