"""Numbers in few letters."""

from __future__ import annotations

import pytest

from pipeline.tools.text import human_bytes, human_duration, percent, short_number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.05, "0.05"),
        (250, "250"),
        (12_000, "12k"),
        (1_281_167, "1.28M"),
        (3e9, "3G"),
        (999, "999"),
    ],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


def test_numbers_as_a_person_writes_them() -> None:
    assert [percent(share) for share in (0.407, 0.0, 1.0, None, float("nan"))] == [
        "40.7",
        "0.0",
        "100.0",
        "–",
        "–",
    ]
    assert [human_bytes(size) for size in (999, 17_472, 243_860_896, 2.5e9)] == [
        "999 bytes",
        "17.5 kB",
        "244 MB",
        "2.5 GB",
    ]
    assert [human_duration(seconds) for seconds in (59.4, 150, 9000, 500_000)] == [
        ("59", "s"),
        ("2.5", "min"),
        ("2.5", "h"),
        ("5.79", "days"),
    ]
    assert [human_bytes(size) for size in (999.4e6, 999.6e6, 999.6e9, 2e12)] == [
        "999 MB", "1 GB", "1,000 GB", "2,000 GB",
    ]  # fmt: skip
