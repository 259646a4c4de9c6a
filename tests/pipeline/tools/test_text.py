"""Numbers in few letters; messages without secrets and control characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tools.text import (
    escape_controls,
    hide_credentials,
    human_bytes,
    human_duration,
    percent,
    short_number,
)


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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("url='http://h:1/cdn/a.tar?X-Amz-Signature=0secret'", "url='http://h:1/cdn/a.tar?***'"),
        ("URL('https://h/a?secret') failed; see more", "URL('https://h/a?***') failed; see more"),
        ("https://u:se@cret@h/b?secret=1#x, then", "https://***@h/b?***, then"),
        ("s3://AKIA:se/cret@bucket/key", "s3://***@bucket/key"),
        ("az://c/x?sv=1&sig=secret", "az://c/x?***"),
        ("url: /path?X-Amz-Signature=se''cret (Caused by)", "url: /path?*** (Caused by)"),
        ("https://h/q?name=a b&Signature=secret", "https://h/q?*** b&***"),
        ('{"url": "http://h/x?a=secret", "b": 2}', '{"url": "http://h/x?***", "b": 2}'),
        ("http://[::1]:80/a@b.jpg and http://h:8080/img@2x.png", None),
        ("s3://b/train-0?.tar or /data/train-?.tar", None),
        ("s3://b/key:1 of me@host; what? a=b", None),
    ],
)
def test_secrets_of_an_address_are_not_shown(text: str, shown: str | None) -> None:
    assert hide_credentials(text) == (shown or text)
    assert hide_credentials(hide_credentials(text)) == (shown or text)


@given(st.text())
def test_what_controls_a_terminal_is_escaped_and_the_rest_left(text: str) -> None:
    shown = escape_controls(text, keep="\n")
    assert all(one.isprintable() or one == "\n" for one in shown)
    assert text.isprintable() <= (shown == text)
    assert escape_controls(shown, keep="\n") == shown
