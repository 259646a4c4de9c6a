"""Numbers as people read them."""

from __future__ import annotations

import math


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
