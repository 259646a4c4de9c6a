"""What the stream would give if it were set otherwise, from its stages measured alone.

Three things can hold it back, and the lowest does:

    the reading thread   storage, checksum and feed, one after the other
    DALI's threads       decoding and normalising, as fast as they are alone with so many threads
    the processors       what all of that, and the taker, needs of them together

to which come a store (its bytes a second) and queues that are too short for what varies from batch
to batch: `jitter` replays measured batches through queues of another length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.stream.timing import Spent
from pipeline.throughput.clock import Rate
from pipeline.throughput.machine import in_cores, in_threads


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a picture costs at each stage, alone."""

    reader: Spent
    """Seconds of the reading thread."""
    pixels: Mapping[int, Rate]
    """By the number of threads: pictures a second, with the cores that it keeps busy."""
    hand_over: float
    """Seconds of the taker."""
    cores: int
    """That this process may use."""
    store: float = 0.0
    """Pictures a second that a store gives; 0: not from a store, or all in the cache."""
    fetch_cpu: float = 0.0
    """Seconds of a core to fetch and check one."""
    reader_cpu: float = 1.0
    """Share of its seconds for which the reading thread keeps a core busy."""
    threads: int = 1
    """Of DALI."""

    def but(self, **changes: object) -> Costs:
        """The same with some of it changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bound:
    """Something that holds the stream back, and at how many pictures a second."""

    name: str
    img_s: float
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds a picture of what it consists of."""


def bounds(costs: Costs) -> list[Bound]:
    """All that could hold the stream back, the lowest first."""
    pixels = pixels_at(costs, costs.threads)
    work = {
        "reading": costs.reader.total * costs.reader_cpu,
        "pixels": pixels.cpu / pixels.median,
        "hand-over": costs.hand_over,
        "fetching": costs.fetch_cpu if costs.store else 0.0,
    }
    found = [
        Bound("the reading thread", 1 / max(1e-12, costs.reader.total),
              f"one thread, {costs.reader.total * 1e6:.0f} µs a picture", costs.reader._asdict()),
        Bound("the pixels", pixels.median, f"DALI with {in_threads(costs.threads)}"),
        Bound("the processors", costs.cores / max(1e-12, sum(work.values())),
              f"{sum(work.values()) * 1e6:.0f} µs of a core a picture, {in_cores(costs.cores)}",
              work),
    ]  # fmt: skip
    if costs.store:
        found.append(Bound("the store", costs.store))
    return sorted(found, key=lambda bound: bound.img_s)


def predicted(costs: Costs) -> float:
    """Pictures a second."""
    return bounds(costs)[0].img_s


def pixels_at(costs: Costs, threads: int) -> Rate:
    """What DALI gives with some number of threads, between measured ones on a straight line."""
    known = sorted(costs.pixels)
    if threads in costs.pixels:
        return costs.pixels[threads]
    rates = [costs.pixels[number].median for number in known]
    busy = [costs.pixels[number].cpu for number in known]
    return Rate((float(np.interp(threads, known, rates)),), float(np.interp(threads, known, busy)),
                0.0)  # fmt: skip


def jitter(read: Sequence[float], pixels: Sequence[float], depth: int) -> float:
    """Return the batches a second that come through a queue of `depth`.

    Batch k is read once batch k-1 is, and there is room for it; it is decoded once it is read and
    batch k-1 is decoded. Its taker is always waiting: behind DALI nothing has to be evened out.

    Args:
        read: seconds that reading a batch takes, batch by batch.
        pixels: seconds that DALI takes for it.
        depth: batches that may lie read.
    """
    count = len(read)
    out, decoded = np.zeros(count), np.zeros(count)
    for k in range(count):
        room = decoded[k - depth - 1] if k > depth else 0.0  # one more is in the making
        out[k] = max(out[k - 1] if k else 0.0, room) + read[k]
        decoded[k] = max(out[k], decoded[k - 1] if k else 0.0) + pixels[k]
    settled = count // 5
    return float((count - settled) / (decoded[-1] - (decoded[settled - 1] if settled else 0.0)))
