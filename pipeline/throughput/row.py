"""What was measured of one stage, or of the whole stream: plain values, beside a limit."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.throughput.clock import Rate


@dataclass(frozen=True, kw_only=True)
class Row:
    """A stage alone, or the whole."""

    name: str
    img_s: float
    spread: float
    """Half of what the middle half of the windows spans, over the median."""
    error: float
    """Standard error of the median, over the median."""
    steady: bool
    cores: float
    """Cores kept busy."""
    others: float
    """Share of the machine that others kept busy, 0..1."""
    bytes_s: float
    limit_img_s: float | None = None
    share: float | None = None
    """Of the limit, 0..1."""
    against: str = ""
    note: str = ""


def row(
    name: str, rate: Rate, size: float, *, limit: float | None = None, against: str = "",
    note: str = "",
) -> Row:  # fmt: skip
    """A rate as a row; `size` is in bytes a picture."""
    return Row(
        name=name, img_s=rate.median, spread=rate.spread, error=rate.error, steady=rate.steady,
        cores=rate.cpu, others=rate.others, bytes_s=rate.median * size, limit_img_s=limit,
        share=rate.median / limit if limit else None, against=against, note=note,
    )  # fmt: skip
