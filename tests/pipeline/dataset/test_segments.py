"""Segments of a run over versions of its data set: borders, epochs, and what a restart appends."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.segments import (
    Segment,
    Segments,
    append_version,
    count_epochs,
    find_divergence,
    find_position,
    find_segment,
    parse_segments,
)
from tests.helpers.versions import make_identity


@st.composite
def histories(draw: st.DrawFn) -> Segments:
    """Segments of a run that was stopped at some positions, each time with a newer version."""
    position, segments = 0, ()
    for number in range(draw(st.integers(1, 4))):
        position += draw(st.integers(0, 90))
        identity = make_identity(number)
        segments = append_version(segments, position, identity, draw(st.integers(1, 25)))
    return segments


def test_a_newer_version_begins_at_the_next_border():
    one, two = make_identity(1), make_identity(2)
    first = append_version((), 0, one, 10)
    assert first == (Segment(one, 10, 0, 0),)
    for position, border, epoch in ((1, 10, 1), (10, 10, 1), (11, 20, 2), (99, 100, 10)):
        expected = (*first, Segment(two, 12, border, epoch))
        assert append_version(first, position, two, 12) == expected
    assert append_version(first, 0, two, 12) == (Segment(two, 12),)  # nothing was read yet
    assert append_version(first, 55, one, 10) is first


def test_a_version_that_was_never_begun_gives_way_to_a_newer_one():
    one, two, three = map(make_identity, (1, 2, 3))
    waiting = append_version(append_version((), 0, one, 10), 15, two, 12)
    assert append_version(waiting, 17, two, 12) is waiting
    assert append_version(waiting, 17, three, 5) == (waiting[0], Segment(three, 5, 20, 2))
    begun = append_version(waiting, 21, three, 5)
    assert begun == (*waiting, Segment(three, 5, 32, 3))


@given(histories())
def test_segments_meet_at_borders_and_survive_a_file(segments):
    for one, following in pairwise(segments):
        epochs = following.epoch - one.epoch
        assert epochs >= 1
        assert following.position == one.position + epochs * one.samples
    assert parse_segments([list(segment) for segment in segments]) == segments


@given(histories(), st.integers(0, 400), st.integers(1, 25))
def test_what_was_read_before_a_restart_stays_what_it_was(segments, position, samples):
    later = append_version(segments, position, make_identity(9), samples)
    divergence = find_divergence(segments, later)
    assert divergence is not None
    assert divergence >= position or divergence == position == 0
    assert find_divergence(later, segments) == divergence
    assert later[-1].version == make_identity(9)
    border = later[-1].position
    # It is the next border: no whole epoch lies between.
    before = later[-2] if len(later) > 1 else None
    assert border == 0 or border - max(position, before.position) <= before.samples
    for at in range(divergence):
        assert segments[find_segment(segments, at)] == later[find_segment(later, at)]
    assert segments[find_segment(segments, divergence)] != later[find_segment(later, divergence)]


@given(histories())
def test_equal_histories_do_not_diverge(segments):
    assert find_divergence(segments, segments) is None


@given(histories(), st.integers(0, 500))
def test_epochs_and_positions_are_counted_alike(segments, position):
    epochs = count_epochs(segments, position)
    assert find_position(segments, epochs) == position
    # One by one: the epochs that were read whole, and the part of the last.
    at, whole = 0, 0
    while True:
        samples = segments[find_segment(segments, at)].samples
        if at + samples > position:
            break
        at, whole = at + samples, whole + 1
    assert epochs == whole + Fraction(position - at, samples)


@given(st.floats(0.01, 1000), st.integers(1, 10**7))
def test_a_run_of_one_version_counts_as_it_always_did(epochs, samples):
    assert find_position((Segment(make_identity(0), samples),), epochs) == epochs * samples
    assert math.isclose(count_epochs((Segment("", samples),), 3 * samples + 1), 3 + 1 / samples)


@pytest.mark.parametrize(
    "rows",
    [
        None, [], "abc", 5, [5], [["a" * 64]], [["a" * 63, 10, 0, 0]], [["a" * 64, 10, 0, -1]],
        [["a" * 64, 10, 1, 0]], [["a" * 64, 0, 0, 0]], [["a" * 64, 10, 0, 0], ["b" * 64, 9, 15, 1]],
        [["a" * 64, 10, 0, 0], ["b" * 64, 9, 20, 1]], [["a" * 64, 10, 0, 0], ["b" * 64, 9, 0, 0]],
        [["a" * 64, 10.0, 0, 0]], [["a" * 64, True, 0, 0]], [["a" * 64, 10, 0, 0, 0]],
    ],
)  # fmt: skip
def test_what_are_no_segments_is_refused_in_a_line(rows):
    with pytest.raises(ValueError, match="segment") as caught:
        parse_segments(rows)
    assert "\n" not in str(caught.value)
