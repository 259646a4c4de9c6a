"""Sizes in bytes, and one line for an exception."""

from __future__ import annotations

import pytest

from pipeline.tools.errors import DataError, summarize_error
from pipeline.tools.text import human_bytes
from pipeline.tools.units import parse_size


def test_a_printed_size_is_read_back():
    for text in ("500 MB", "12.3 kB", "255 GB"):
        assert human_bytes(parse_size(text)) == text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/data/x"), "No space left on device"),
        (OSError("connection reset\nby peer"), "connection reset"),
        (KeyError("files"), "no 'files'"),
        (DataError("x is damaged; build it again"), "x is damaged; build it again"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_exception_is_one_line(error, line):
    assert summarize_error(error) == line
