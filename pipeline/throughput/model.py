"""The bottleneck model: predicted rates of the stream with other settings, and the gain of each.

The stream runs at the lowest of these rates, each from stages measured alone:

    the reading thread   storage, checksum and feed, one after the other
    DALI's threads       decoding and normalizing, at the rate of that many threads alone
    the processors       the CPU time of all of that, and of the training thread, over the cores
    the store            its bytes per second, for a data set that is not local

Queues that are too short for the jitter of batches cost more: `simulate_queue` replays measured
batches through queues of another length.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.stream.timing import Spent
from pipeline.throughput import stages, stream_rate
from pipeline.throughput.clock import Rate, measure_in_turn
from pipeline.throughput.hardware import format_cores, format_threads, get_available_memory
from pipeline.throughput.stages import Parts, ReaderRate, StageRates, measure_cold_reading


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Cost of an image at each stage, measured alone."""

    reader: Spent
    """Seconds per image of the reading thread, by stage."""
    pixels: Mapping[int, Rate]
    """Images per second of DALI, and the cores it keeps busy, by its number of threads."""
    hand_over: float
    """Seconds per image to hand a decoded batch to torch."""
    cores: int
    """Processors that this process may use."""
    store: float = 0.0
    """Images per second that the store delivers; 0 for a local or fully cached data set."""
    fetch_cpu: float = 0.0
    """CPU seconds to download and check an image."""
    reader_cpu: float = 1.0
    """Fraction of its seconds for which the reading thread keeps a core busy."""
    threads: int = 1
    """DALI's threads."""

    def with_changes(self, **changes: object) -> Costs:
        """Return a copy with some fields changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Bound:
    """An upper bound of the rate of the stream, in images per second."""

    name: str
    img_s: float
    detail: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Seconds per image of its parts."""


def list_bounds(costs: Costs) -> list[Bound]:
    """Return all upper bounds of the rate, the lowest first."""
    pixels = interpolate_pixels(costs, costs.threads)
    work = {
        "reading": costs.reader.total * costs.reader_cpu,
        "pixels": pixels.cpu / pixels.median,
        "hand-over": costs.hand_over,
        "fetching": costs.fetch_cpu if costs.store else 0.0,
    }
    found = [
        Bound("the reading thread", 1 / max(1e-12, costs.reader.total),
              f"one thread, {costs.reader.total * 1e6:.0f} µs an image", costs.reader._asdict()),
        Bound("the pixels", pixels.median, f"DALI with {format_threads(costs.threads)}"),
        Bound("the processors", costs.cores / max(1e-12, sum(work.values())),
              f"{sum(work.values()) * 1e6:.0f} µs of a core an image, {format_cores(costs.cores)}",
              work),
    ]  # fmt: skip
    if costs.store:
        found.append(Bound("the store", costs.store))
    return sorted(found, key=lambda bound: bound.img_s)


def predict_rate(costs: Costs) -> float:
    """Return the predicted images per second: the lowest bound."""
    return list_bounds(costs)[0].img_s


def interpolate_pixels(costs: Costs, threads: int) -> Rate:
    """Return DALI's rate with some number of threads, linear between the measured ones."""
    known = sorted(costs.pixels)
    if threads in costs.pixels:
        return costs.pixels[threads]
    rates = [costs.pixels[number].median for number in known]
    busy = [costs.pixels[number].cpu for number in known]
    return Rate((float(np.interp(threads, known, rates)),), float(np.interp(threads, known, busy)),
                0.0)  # fmt: skip


def simulate_queue(read: Sequence[float], pixels: Sequence[float], depth: int) -> float:
    """Return the batches per second that pass through a queue of `depth`.

    Batch k is read after batch k-1, as soon as the queue has room; it is decoded after it is read
    and batch k-1 is decoded. The trainer is taken to wait always, so no queue behind DALI matters.

    Args:
        read: seconds to read each batch.
        pixels: seconds to decode each batch.
        depth: most batches that are read and not yet decoded.
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
"""Smallest gain that is shown as one: the timers are no more exact than that."""
DEPTHS = (1, 2, 3, 4, 6)
"""Prefetch depths that are simulated."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change of a setting and its predicted effect."""

    name: str
    change: str
    """Old and new value."""
    img_s: float | None
    """Predicted images per second; None if it cannot be predicted here."""
    gain: float | None
    """Predicted over present rate."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class StreamState:
    """The stream with its present settings, and what was measured of it."""

    parts: Parts
    alone: StageRates
    costs: Costs
    """Costs where the data set is read from most of the time: memory, disk or store."""
    reading: ReaderRate
    """Rate of the reading thread there."""
    img_s: float
    """Images per second there, measured or scaled by the model."""
    fits: bool
    """Whether the data set fits into this machine's memory."""
    state: str
    """Where it is read from, in words."""

    def gained(self, costs: Costs) -> tuple[float, float]:
        """Return images per second and gain with other costs: measured rate times model ratio."""
        gain = predict_rate(costs) / predict_rate(self.costs)
        return self.img_s * gain, gain


def list_remedies(now: StreamState, seconds: float) -> list[Remedy]:
    """Return every change of a setting, the largest gain first, those that cannot help last."""
    found = [
        *_change_threads(now), *_change_prefetch(now), *_change_decoder_load(now, seconds),
        *_change_encoding(now, seconds), *_change_shuffle(now), *_change_cache(now),
        *_change_batch_size(now, seconds),
    ]  # fmt: skip
    return sorted(found, key=lambda one: -(one.gain or 0))


def _make_remedy(now: StreamState, name: str, change: str, costs: Costs, note: str = "") -> Remedy:
    img_s, gain = now.gained(costs)
    return Remedy(name=name, change=change, img_s=img_s, gain=gain, note=note)


def _change_threads(now: StreamState) -> Iterator[Remedy]:
    costs = now.costs
    others = [count for count in costs.pixels if count != costs.threads]
    if others:
        best = max(
            others, key=lambda count: (predict_rate(costs.with_changes(threads=count)), -count)
        )
        yield _make_remedy(
            now, "threads", f"{costs.threads} -> {best}", costs.with_changes(threads=best)
        )


def _change_prefetch(now: StreamState) -> Iterator[Remedy]:
    setting = now.parts.setting
    read = now.reading.each
    pixels = stages.measure_pixel_seconds(now.parts, now.alone.loaded, 60)
    turns = max(len(read), len(pixels), 200)
    reads = [read[turn % len(read)] for turn in range(turns)]
    made = [pixels[turn % len(pixels)] for turn in range(turns)]
    rates = {depth: simulate_queue(reads, made, depth) * setting.batch_size
             for depth in {*DEPTHS, setting.prefetch}}  # fmt: skip
    # Queues absorb jitter; they do not lift a bound.
    top = predict_rate(now.costs)
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


def _change_decoder_load(now: StreamState, seconds: float) -> Iterator[Remedy]:
    setting = now.parts.setting
    if setting.device != "gpu" or now.parts.encoding == "raw":
        yield Remedy(name="hardware decoder", change="", img_s=None, gain=None,
                     note="raw images" if setting.device == "gpu" else "needs a GPU")  # fmt: skip
        return
    loads = sorted({0.0, 0.5, 0.75, 1.0, setting.hw_decoder_load})
    works = {
        load: stages.make_pixel_step(now.parts, now.alone.loaded, setting.threads, load)
        for load in loads
    }
    rates = measure_in_turn(works, seconds, settle=stages.get_synchronize(now.parts))
    present = rates.pop(setting.hw_decoder_load)
    best = max(rates, key=lambda load: rates[load].median)
    note = "" if best in (0.0, 1.0) else "pixels then depend a little on their batch"
    pixels = {setting.threads: _scale_rate(now.costs, rates[best], present)}
    yield _make_remedy(now, "hardware decoder", f"{setting.hw_decoder_load:g} -> {best:g}",
                       now.costs.with_changes(pixels=pixels), note)  # fmt: skip


def _change_encoding(now: StreamState, seconds: float) -> Iterator[Remedy]:
    if now.parts.encoding == "raw":
        return
    samples = len(now.parts.storage)
    need = -(-stream_rate.PICTURES // now.parts.setting.batch_size)
    try:
        loaded = now.parts.loaded(min(need, max(1, samples // now.parts.setting.batch_size)))
        rate, each = stream_rate.measure_raw(now.parts.setting, loaded, seconds)
    except (OSError, subprocess.CalledProcessError):
        yield Remedy(name="raw encoding", change="jpeg -> raw", img_s=None, gain=None,
                     note="no disk space to try it")  # fmt: skip
        return
    img_s = rate.median
    note = f"{each / now.parts.bytes_each:.1f} times the bytes"
    if now.alone.disk and each * samples > get_available_memory():
        img_s = min(img_s, now.alone.disk / each)
        note += ", more than memory holds: the disk bounds it"
    else:
        note += ", in memory; tried on some of them"
    if now.costs.store:
        img_s = min(img_s, now.costs.store * now.parts.bytes_each / each)
        note += "; from the store even slower"
    yield Remedy(name="raw encoding", change="jpeg -> raw", img_s=img_s, gain=img_s / now.img_s,
                 note=note)  # fmt: skip


def _change_shuffle(now: StreamState) -> Iterator[Remedy]:
    if now.parts.setting.shuffle == "block":
        return
    if now.fits or now.alone.cold is None:
        note = "the set is in memory after its first epoch" if now.fits else (
            "this machine does not let go of pages; a disk cannot be told from memory")  # fmt: skip
        yield Remedy(name="block shuffle", change="full -> block", img_s=now.img_s, gain=1.0,
                     note=note)  # fmt: skip
        return
    parts = Parts(now.parts.setting.with_changes(shuffle="block"), now.parts.dataset)
    try:
        cold, _ = measure_cold_reading(parts, 60)
    finally:
        parts.storage.close()
    costs = now.costs.with_changes(reader=cold.seconds)
    yield _make_remedy(now, "block shuffle", "full -> block", costs, "shards are read end to end")


def _change_cache(now: StreamState) -> Iterator[Remedy]:
    if not now.costs.store:
        yield Remedy(name="cache", change="", img_s=None, gain=None,
                     note="for sets in a store only")  # fmt: skip
        return
    size = sum(shard.bytes for shard in now.parts.storage.shards)
    yield _make_remedy(now, "cache", f"--cache-size of {size / 1e9:,.1f} GB and more",
                  now.costs.with_changes(store=0.0), "from the second epoch on")  # fmt: skip


def _change_batch_size(now: StreamState, seconds: float) -> Iterator[Remedy]:
    setting = now.parts.setting
    if 2 * setting.batch_size > len(now.parts.storage):
        return
    parts = Parts(setting.with_changes(batch_size=2 * setting.batch_size), now.parts.dataset)
    try:
        works = {
            2: stages.make_pixel_step(parts, parts.loaded(4), setting.threads),
            1: stages.make_pixel_step(now.parts, now.alone.loaded, setting.threads),
        }
        rates = measure_in_turn(works, 2 * seconds, settle=stages.get_synchronize(parts))
    finally:
        parts.storage.close()
    pixels = {setting.threads: _scale_rate(now.costs, rates[2], rates[1])}
    yield _make_remedy(now, "batch", f"{setting.batch_size} -> {2 * setting.batch_size}",
                  now.costs.with_changes(pixels=pixels))  # fmt: skip


def _scale_rate(costs: Costs, other: Rate, present: Rate) -> Rate:
    """DALI's first measured rate, times the ratio of two rates measured in turn."""
    known = costs.pixels[costs.threads]
    factor = other.median / present.median
    return Rate(tuple(factor * rate for rate in known.windows), known.cpu, known.others)


def sweep_threads(parts: Parts, alone: StageRates, counts: Sequence[int], seconds: float) -> Costs:
    """Return the costs of the stream, with DALI's rate at each of the thread counts."""
    works = {count: stages.make_pixel_step(parts, alone.loaded, count) for count in counts}
    rates = measure_in_turn(works, seconds, settle=stages.get_synchronize(parts))
    hand_over = next(row.img_s for row in alone.stages if row.name == "hand-over")
    return Costs(
        reader=alone.warm.seconds, pixels=rates, hand_over=1 / hand_over,
        cores=parts.setting.cores, threads=parts.setting.threads,
    )  # fmt: skip


def find_knee(costs: Costs) -> int:
    """Return the fewest threads with 95 % of the highest predicted rate."""
    most = max(predict_rate(costs.with_changes(threads=count)) for count in costs.pixels)
    return min(
        count
        for count in costs.pixels
        if predict_rate(costs.with_changes(threads=count)) >= 0.95 * most
    )
