"""The search for settings, on streams whose rates are made up."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from pipeline.throughput import tune as tuning
from pipeline.throughput.stages import Setting


class Fake:
    """A stream whose rate follows from its setting."""

    def __init__(self, rate: float) -> None:
        self._rate = rate

    def measure_window(self, seconds: float, batches: int = 1) -> float:
        return self._rate


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({"threads": {3: 1.3}, "prefetch": {4: 1.2}}, {"threads": 3, "prefetch": 4}),
        ({"threads": {3: 1.01}, "prefetch": {}}, {}),
        ({"threads": {1: 0.5, 3: 0.9}, "prefetch": {3: 1.1}}, {"prefetch": 3}),
    ],
)
def test_the_search_finds_what_is_better_and_keeps_the_default_else(monkeypatch, rates, best):
    @contextmanager
    def open_measured_stream(setting):
        factor = 1.0
        for name, gains in rates.items():
            factor *= gains.get(getattr(setting, name), 1.0)
        yield Fake(1000 * factor)

    monkeypatch.setattr(tuning, "open_measured_stream", open_measured_stream)
    monkeypatch.setattr(tuning, "list_thread_counts", lambda setting: [1, 2, 3])
    tuned = tuning.tune(Setting(data="x", threads=2))
    assert tuned.change == best
    if best:
        assert tuned.gain > 1.02


def test_what_was_better_by_chance_is_not_kept(monkeypatch):
    """Once the default is back, what won against it does not."""
    opened = []

    @contextmanager
    def open_measured_stream(setting):
        opened.append(setting)
        lucky = setting.threads == 3 and len(opened) <= 2
        yield Fake(1300 if lucky else 1000)

    monkeypatch.setattr(tuning, "open_measured_stream", open_measured_stream)
    monkeypatch.setattr(tuning, "list_thread_counts", lambda setting: [2, 3])
    tuned = tuning.tune(Setting(data="x", threads=2))
    assert tuned.trials[0].is_better
    assert (tuned.change, tuned.gain) == ({}, 1.0)
