"""What the numbers mean, in a paragraph."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.throughput.clock import OTHERS
from pipeline.throughput.model import Bound
from pipeline.throughput.remedies import WORTH, Remedy
from pipeline.throughput.row import Row

ENOUGH = 1.1
"""Headroom over the trainer with which a stream is quick enough (AU of 90 % and more)."""

MEANING = {
    "the reading thread": "one Python thread that reads, checks and feeds",
    "the pixels": "DALI's threads, which decode and normalise",
    "the processors": "processor time: reading and pixels together want more cores than there are",
    "the store": "the store, which does not deliver pictures any faster",
}


def verdict(
    *, state: str, img_s: float, bounds: Sequence[Bound], stages: Sequence[Row],
    remedies: Sequence[Remedy], needed: float | None,
) -> str:  # fmt: skip
    """Say what bounds the stream, by how much, what comes next, and what would help most."""
    first, second = bounds[0], bounds[1]
    text = [
        f"{state} this stream gives {img_s:,.0f} img/s. It is bound by "
        f"{MEANING[first.name]} ({first.img_s:,.0f} img/s: {first.detail or 'measured'})"
        + _largest(first, stages)
        + ".",
        f"The next bound is {MEANING[second.name]} at {second.img_s:,.0f} img/s, "
        f"{second.img_s / first.img_s:.2f} times the first: more than that, lifting the first "
        "alone cannot gain.",
    ]
    if needed:
        share = img_s / needed
        text.append(
            f"A trainer that takes {needed:,.0f} img/s gets {share:.2f} times that, "
            + ("enough." if share >= ENOUGH else "just enough." if share >= 1 else
               f"and would stand still {1 - share:.0%} of the time.")
        )  # fmt: skip
    best = next((one for one in remedies if (one.gain or 0) >= WORTH), None)
    if best:
        text.append(
            f"What helps most: {best.name}, {best.change}: predicted {best.img_s:,.0f} img/s, "
            f"{best.gain:.2f} times as much."
        )
    else:
        text.append("None of the settings would change that by more than 3 %; more cores would.")
    return " ".join(text)


def _largest(bound: Bound, stages: Sequence[Row]) -> str:
    if bound.name in ("the pixels", "the processors"):
        decode = next((row for row in stages if row.name == "decode" and row.share), None)
        if decode and decode.share:
            return (f"; decoding alone reaches {decode.share:.0%} of what the bare decoder does "
                    "on this machine")  # fmt: skip
    if bound.parts:
        name, seconds = max(bound.parts.items(), key=lambda part: part[1])
        return f"; most of it is {name}, {seconds / sum(bound.parts.values()):.0%}"
    return ""


def warnings(rows: Sequence[Row]) -> list[str]:
    """What makes the figures doubtful."""
    found = []
    if unsteady := [row for row in rows if not row.steady]:
        names = ", ".join(f"{row.name} (±{row.spread:.0%})" for row in unsteady)
        found.append(f"not steady: {names}")
    if busy := [row for row in rows if row.others > OTHERS]:
        most = max(row.others for row in busy)
        found.append(
            f"other programs used up to {most:.0%} of this machine while "
            f"{', '.join(row.name for row in busy)} {'was' if len(busy) == 1 else 'were'} measured"
        )
    return found
