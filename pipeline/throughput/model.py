"""What the stream would give if it were set otherwise, from its stages measured alone.

Three things can hold it back, and the lowest does:

    the reading thread   storage, checksum and feed, one after the other
    DALI's threads       decoding and normalising, as fast as they are alone with so many threads
    the processors       what all of that, and the taker, needs of them together

to which come a store (its bytes a second) and queues that are too short for what varies from batch
to batch: `jitter` replays measured batches through queues of another length.

What could be changed, and what each change is predicted to gain.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.stream.timing import Spent
from pipeline.throughput import stages, stream_rate
from pipeline.throughput.clock import Rate, in_turn
from pipeline.throughput.hardware import in_cores, in_threads, memory_bytes
from pipeline.throughput.stages import Alone, Parts, Reading, reading_cold


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What an image costs at each stage, alone."""

    reader: Spent
    """Seconds of the reading thread."""
    pixels: Mapping[int, Rate]
    """By the number of threads: images a second, with the cores that it keeps busy."""
    hand_over: float
    """Seconds of the taker."""
    cores: int
    """That this process may use."""
    store: float = 0.0
    """Images a second that a store gives; 0: not from a store, or all in the cache."""
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
    """Something that holds the stream back, and at how many images a second."""

    name: str
    img_s: float
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds an image of what it consists of."""


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
              f"one thread, {costs.reader.total * 1e6:.0f} µs an image", costs.reader._asdict()),
        Bound("the pixels", pixels.median, f"DALI with {in_threads(costs.threads)}"),
        Bound("the processors", costs.cores / max(1e-12, sum(work.values())),
              f"{sum(work.values()) * 1e6:.0f} µs of a core an image, {in_cores(costs.cores)}",
              work),
    ]  # fmt: skip
    if costs.store:
        found.append(Bound("the store", costs.store))
    return sorted(found, key=lambda bound: bound.img_s)


def predicted(costs: Costs) -> float:
    """Images a second."""
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


WORTH = 1.03
"""A smaller gain is none: the clocks are not better than that."""
DEPTHS = (1, 2, 3, 4, 6)
"""Prefetch depths looked at."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One change and what it would do."""

    name: str
    change: str
    """From what to what."""
    img_s: float | None
    """Predicted images a second; None: it cannot be said."""
    gain: float | None
    """Over what the stream gives now."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Now:
    """The stream as it is set, and what is known of it."""

    parts: Parts
    alone: Alone
    costs: Costs
    """In the state of the set that counts: from memory, from the disk, or from its store."""
    reading: Reading
    """Of the reading thread in that state."""
    img_s: float
    """Measured, or where that state was not measured, predicted."""
    fits: bool
    """The set fits into this machine's memory."""
    state: str
    """That state in words."""

    def gained(self, costs: Costs) -> tuple[float, float]:
        """Images a second and gain with other costs: the model's ratio on what was measured."""
        gain = predicted(costs) / predicted(self.costs)
        return self.img_s * gain, gain


def remedies(now: Now, seconds: float) -> list[Remedy]:
    """Everything that can be turned, the largest gain first; what cannot help here last."""
    found = [
        *_threads(now), *_prefetch(now), *_decoder_load(now, seconds), *_raw(now, seconds),
        *_block(now), *_cache(now), *_batch(now, seconds),
    ]  # fmt: skip
    return sorted(found, key=lambda one: -(one.gain or 0))


def _remedy(now: Now, name: str, change: str, costs: Costs, note: str = "") -> Remedy:
    img_s, gain = now.gained(costs)
    return Remedy(name=name, change=change, img_s=img_s, gain=gain, note=note)


def _threads(now: Now) -> Iterator[Remedy]:
    costs = now.costs
    others = [count for count in costs.pixels if count != costs.threads]
    if others:
        best = max(others, key=lambda count: (predicted(costs.but(threads=count)), -count))
        yield _remedy(now, "threads", f"{costs.threads} -> {best}", costs.but(threads=best))


def _prefetch(now: Now) -> Iterator[Remedy]:
    setting = now.parts.setting
    read = now.reading.each
    pixels = stages.pixel_seconds(now.parts, now.alone.loaded, 60)
    turns = max(len(read), len(pixels), 200)
    reads = [read[turn % len(read)] for turn in range(turns)]
    made = [pixels[turn % len(pixels)] for turn in range(turns)]
    rates = {depth: jitter(reads, made, depth) * setting.batch_size
             for depth in {*DEPTHS, setting.prefetch}}  # fmt: skip
    # Queues even out what varies; they do not lift a bound.
    top = predicted(now.costs)
    gains = {depth: min(rate, top) / min(rates[setting.prefetch], top)
             for depth, rate in rates.items()}  # fmt: skip
    best = min(depth for depth in gains if gains[depth] > max(gains.values()) / 1.01)
    if best <= setting.prefetch:
        best = min(depth for depth in DEPTHS if depth > setting.prefetch or depth == DEPTHS[-1])
    yield Remedy(
        name="prefetch depth", change=f"{setting.prefetch} -> {best}",
        img_s=now.img_s * gains[best], gain=gains[best],
        note="measured batches replayed through queues of that length",
    )  # fmt: skip


def _decoder_load(now: Now, seconds: float) -> Iterator[Remedy]:
    setting = now.parts.setting
    if setting.device != "gpu" or now.parts.encoding == "raw":
        yield Remedy(name="hardware decoder", change="", img_s=None, gain=None,
                     note="raw images" if setting.device == "gpu" else "needs a GPU")  # fmt: skip
        return
    loads = sorted({0.0, 0.5, 0.75, 1.0, setting.hw_decoder_load})
    works = {
        load: stages.pixels(now.parts, now.alone.loaded, setting.threads, load) for load in loads
    }
    rates = in_turn(works, seconds, settle=stages.settling(now.parts))
    present = rates.pop(setting.hw_decoder_load)
    best = max(rates, key=lambda load: rates[load].median)
    note = "" if best in (0.0, 1.0) else "pixels then depend a little on their batch"
    yield _remedy(
        now, "hardware decoder", f"{setting.hw_decoder_load:g} -> {best:g}",
        now.costs.but(pixels={setting.threads: _scaled(now.costs, rates[best], present)}), note,
    )  # fmt: skip


def _raw(now: Now, seconds: float) -> Iterator[Remedy]:
    if now.parts.encoding == "raw":
        return
    samples = len(now.parts.storage)
    need = -(-stream_rate.PICTURES // now.parts.setting.batch_size)
    try:
        loaded = now.parts.loaded(min(need, max(1, samples // now.parts.setting.batch_size)))
        rate, each = stream_rate.measure_raw(now.parts.setting, loaded, seconds)
    except (OSError, subprocess.CalledProcessError):
        yield Remedy(name="raw encoding", change="jpeg -> raw", img_s=None, gain=None,
                     note="no room to try it")  # fmt: skip
        return
    img_s = rate.median
    note = f"{each / now.parts.bytes_each:.1f} times the bytes"
    if now.alone.disk and each * samples > memory_bytes():
        img_s = min(img_s, now.alone.disk / each)
        note += ", more than memory holds: the disk bounds it"
    else:
        note += ", in memory; tried on some of them"
    if now.costs.store:
        img_s = min(img_s, now.costs.store * now.parts.bytes_each / each)
        note += "; from the store even slower"
    yield Remedy(name="raw encoding", change="jpeg -> raw", img_s=img_s, gain=img_s / now.img_s,
                 note=note)  # fmt: skip


def _block(now: Now) -> Iterator[Remedy]:
    if now.parts.setting.shuffle == "block":
        return
    if now.fits or now.alone.cold is None:
        note = "the set is in memory after its first epoch" if now.fits else (
            "this machine does not let go of pages; a disk cannot be told from memory")  # fmt: skip
        yield Remedy(name="block shuffle", change="full -> block", img_s=now.img_s, gain=1.0,
                     note=note)  # fmt: skip
        return
    parts = Parts(now.parts.setting.but(shuffle="block"), now.parts.dataset)
    try:
        cold, _ = reading_cold(parts, 60)
    finally:
        parts.storage.close()
    yield _remedy(now, "block shuffle", "full -> block", now.costs.but(reader=cold.seconds),
                  "shards are read end to end")  # fmt: skip


def _cache(now: Now) -> Iterator[Remedy]:
    if not now.costs.store:
        yield Remedy(name="cache", change="", img_s=None, gain=None,
                     note="for sets in a store only")  # fmt: skip
        return
    size = sum(shard.bytes for shard in now.parts.storage.shards)
    yield _remedy(now, "cache", f"--cache-size of {size / 1e9:,.1f} GB and more",
                  now.costs.but(store=0.0), "from the second epoch on")  # fmt: skip


def _batch(now: Now, seconds: float) -> Iterator[Remedy]:
    setting = now.parts.setting
    if 2 * setting.batch_size > len(now.parts.storage):
        return
    parts = Parts(setting.but(batch_size=2 * setting.batch_size), now.parts.dataset)
    try:
        works = {
            2: stages.pixels(parts, parts.loaded(4), setting.threads),
            1: stages.pixels(now.parts, now.alone.loaded, setting.threads),
        }
        rates = in_turn(works, 2 * seconds, settle=stages.settling(parts))
    finally:
        parts.storage.close()
    pixels = {setting.threads: _scaled(now.costs, rates[2], rates[1])}
    yield _remedy(now, "batch", f"{setting.batch_size} -> {2 * setting.batch_size}",
                  now.costs.but(pixels=pixels))  # fmt: skip


def _scaled(costs: Costs, other: Rate, present: Rate) -> Rate:
    """DALI's rate as it was measured first, times what two rates measured in turn differ by."""
    known = costs.pixels[costs.threads]
    factor = other.median / present.median
    return Rate(tuple(factor * rate for rate in known.windows), known.cpu, known.others)


def sweep(parts: Parts, alone: Alone, counts: Sequence[int], seconds: float) -> Costs:
    """Return the costs of the stream, with DALI's rate at each number of threads."""
    works = {count: stages.pixels(parts, alone.loaded, count) for count in counts}
    rates = in_turn(works, seconds, settle=stages.settling(parts))
    hand_over = next(row.img_s for row in alone.stages if row.name == "hand-over")
    return Costs(
        reader=alone.warm.seconds, pixels=rates, hand_over=1 / hand_over,
        cores=parts.setting.cores, threads=parts.setting.threads,
    )  # fmt: skip


def knee(costs: Costs) -> int:
    """The fewest threads that give 95 % of the most."""
    most = max(predicted(costs.but(threads=count)) for count in costs.pixels)
    return min(
        count for count in costs.pixels if predicted(costs.but(threads=count)) >= 0.95 * most
    )
