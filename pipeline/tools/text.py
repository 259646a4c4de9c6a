"""Text as people read it: numbers, and messages without secrets and control characters."""

from __future__ import annotations

import math
import re

LONGEST = 500
"""Characters of a foreign message: a server that speaks no HTTP is quoted with all its bytes."""
HIDDEN = "***"
"""Text in place of the credentials of an address."""
_PASSWORD = re.compile(r"://(?:[^/\s?#]*|[^/\s:\[]*:(?!\d+(?:/|$))[^\s?#]*)@")
"""The last `@` of the host ends a password; one with a `/` in it follows a colon."""
_END = r"""(?=[]'")}>,;.:]*(?:\s|$))"""
_QUERIES = (
    re.compile(rf"(https?://[^\s?]*\?)\S+?{_END}", re.IGNORECASE),
    re.compile(rf"([^\s?]\?|\S&)[\w.~%+*-]+=\S*?{_END}"),
)
"""Text behind the `?` of a web address; `?name=value` or `&name=value` in any other text."""


def clean(text: str) -> str:
    """Return a message without credentials of addresses and without control characters."""
    return escape_controls(hide_credentials(text))


def first_line(text: str) -> str:
    """Return the first line of what a library or a server says, `clean` and not endless."""
    return clean(next(iter(text.strip().splitlines()), "")[:LONGEST])


def hide_credentials(text: str) -> str:
    """Return a text with `user:password@` and the query of any address in it replaced by stars."""
    text = _PASSWORD.sub(f"://{HIDDEN}@", text)
    for query in _QUERIES:
        text = query.sub(rf"\1{HIDDEN}", text)
    return text


def escape_controls(text: str, keep: str = "") -> str:
    """Return a text whose characters that do not print, but those of `keep`, are escaped."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else repr(one)[1:-1] for one in text)


def short_number(value: float) -> str:
    """Return a number in few letters: 0, 0.05, 250, 12k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def human_bytes(size: float) -> str:
    """Return a size in bytes, kB, MB or GB (powers of ten)."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= 0.9995 * power:  # 999.6 MB is 1 GB in three digits
            return f"{size / power:,.3g} {unit}" if size < 999.5e9 else f"{size / power:,.0f} GB"
    return f"{size:.0f} bytes"


def human_duration(seconds: float) -> tuple[str, str]:
    """Return seconds as a number and its unit: days, h, min or s."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g}", unit
    return f"{seconds:.0f}", "s"


def percent(share: float | None) -> str:
    """Return a share 0..1 in per cent with one decimal; a dash when it is not known."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f}"
