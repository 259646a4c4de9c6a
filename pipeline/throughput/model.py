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

import math
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from pipeline.stream.timing import Spent
from pipeline.throughput import stages, stream_rate
from pipeline.throughput.clock import SURE, Rate, measure_in_turn
from pipeline.throughput.hardware import format_count
from pipeline.throughput.stages import Parts, ReaderRate, StageRates, measure_cold_reading
from pipeline.tools.units import available_memory


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


MEANING = {
    "the reading thread": "one Python thread that reads, checks and feeds",
    "the pixels": "DALI's threads, which decode and normalise",
    "the processors": "processor time: reading and pixels together want more cores than there are",
    "the store": "the store, which does not deliver images any faster",
}
"""Meaning of a bound, by its name."""


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
    busy = sum(work.values())
    found = [
        Bound("the reading thread", 1 / max(1e-12, costs.reader.total),
              f"one thread, {costs.reader.total * 1e6:.0f} µs an image", costs.reader._asdict()),
        Bound("the pixels", pixels.median, f"DALI with {format_count(costs.threads, 'thread')}"),
        Bound("the processors", costs.cores / max(1e-12, busy),
              f"{busy * 1e6:.0f} µs of a core an image, {format_count(costs.cores, 'core')}", work),
    ]  # fmt: skip
    if costs.store:
        found.append(Bound("the store", costs.store))
    return sorted(found, key=lambda bound: bound.img_s)


def predict_rate(costs: Costs) -> float:
    """Return the predicted images per second: the lowest bound."""
    return list_bounds(costs)[0].img_s


def interpolate_pixels(costs: Costs, threads: int) -> Rate:
    """Return DALI's rate with some number of threads, linear between the measured ones."""
    if threads in costs.pixels:
        return costs.pixels[threads]
    known = sorted(costs.pixels)
    rate = np.interp(threads, known, [costs.pixels[number].median for number in known])
    cpu = np.interp(threads, known, [costs.pixels[number].cpu for number in known])
    return Rate((float(rate),), float(cpu), 0.0)


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
    out, decoded = np.zeros(count + 1), np.zeros(count + 1)  # the last: before the first batch
    for k in range(count):
        room = decoded[k - depth - 1] if k > depth else 0.0  # one more is in the making
        out[k] = max(out[k - 1], room) + read[k]
        decoded[k] = max(out[k], decoded[k - 1]) + pixels[k]
    settled = count // 5
    return float((count - settled) / (decoded[count - 1] - decoded[settled - 1]))


WORTH = 1.03
"""Smallest gain that is shown as one: the timers are no more exact than that."""
UNSTEADY = "not sure: what it is from was not steady"
"""Remark on a gain that comes from rates which were not steady."""
DEPTHS = (1, 2, 3, 4, 6)
"""Prefetch depths that are simulated."""


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change of a setting and its predicted effect."""

    name: str
    change: str
    """Old and new value."""
    img_s: float | None = None
    """Predicted images per second; None if it cannot be predicted here."""
    gain: float | None = None
    """Predicted over present rate."""
    note: str = ""
    sure: bool = True
    """False if the gain is no more than noise, or what it is computed from was not steady."""

    @property
    def is_worth(self) -> bool:
        """True if the gain is large enough to be shown as one."""
        return self.gain is not None and self.gain >= WORTH

    def qualify(self, *rates: Rate, steady: bool = True) -> Remedy:
        """Return the remedy, marked as not sure if rates or the stream do not bear out its gain.

        Args:
            rates: what the gain is computed from.
            steady: whether the stream, whose rate the gain multiplies, was steady.
        """
        noise = SURE * math.hypot(*(rate.error for rate in rates))
        steady = steady and all(rate.is_steady for rate in rates)
        if not self.is_worth or (steady and (self.gain or 0) - 1 > noise):
            return self
        why = "no more than noise" if steady else UNSTEADY
        return replace(self, sure=False, note="; ".join(filter(None, (self.note, why))))


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
    """True if the data set fits into this machine's memory."""
    state: str
    """Source of its bytes, in words: page cache, disk or store."""
    rate: Rate
    """Images per second of the stream, as measured."""


def list_remedies(now: StreamState, seconds: float) -> list[Remedy]:
    """Return every change of a setting, the largest gain first, those that cannot help last."""
    found = (
        _change_threads(now), _change_prefetch(now), _change_decoder_load(now, seconds),
        _change_encoding(now, seconds), _change_shuffle(now), _change_cache(now),
        _change_batch_size(now, seconds),
    )  # fmt: skip
    return sorted((one for one in found if one), key=lambda one: -(one.gain or 0))


def _make_remedy(
    now: StreamState, name: str, change: str, costs: Costs, rates: Sequence[Rate], note: str = ""
) -> Remedy:
    """Return a change that leads to other costs: measured rate times model ratio.

    Args:
        now: the stream with its present settings.
        name: of the change.
        change: old and new value.
        costs: costs with the change.
        rates: what these costs, and those they replace, were measured as.
        note: text beside the gain.
    """
    gain = predict_rate(costs) / predict_rate(now.costs)
    found = Remedy(name=name, change=change, img_s=now.img_s * gain, gain=gain, note=note)
    return found.qualify(*rates, steady=now.rate.is_steady)


def _change_threads(now: StreamState) -> Remedy | None:
    threads, pixels = now.costs.threads, now.costs.pixels
    counts = [count for count in pixels if count != threads and count <= now.costs.cores]
    if not counts:
        return None
    others = [replace(now.costs, threads=count) for count in counts]
    best = max(others, key=lambda costs: (predict_rate(costs), -costs.threads))
    rates = [pixels[threads], pixels[best.threads]]
    return _make_remedy(now, "threads", f"{threads} -> {best.threads}", best, rates)


def _change_prefetch(now: StreamState) -> Remedy:
    setting, present = now.parts.setting, now.parts.setting.prefetch
    pixels = stages.measure_pixel_seconds(now.parts, now.alone.loaded, 60)
    turns = max(len(now.reading.each), len(pixels), 200)
    read, made = (np.resize(each, turns).tolist() for each in (now.reading.each, pixels))
    top = predict_rate(now.costs)  # queues absorb jitter; they do not lift a bound
    rates = {depth: min(top, simulate_queue(read, made, depth) * setting.batch_size)
             for depth in {*DEPTHS, present}}  # fmt: skip
    gains = {depth: rate / rates[present] for depth, rate in rates.items()}
    best = min(depth for depth in gains if gains[depth] > max(gains.values()) / 1.01)
    if best <= present:
        best = min(depth for depth in DEPTHS if depth > present or depth == DEPTHS[-1])
    return Remedy(
        name="prefetch depth", change=f"{present} -> {best}",
        img_s=now.img_s * gains[best], gain=gains[best],
        note="measured batches replayed through queues of that length",
    ).qualify(now.reading.rate(), steady=now.rate.is_steady)  # fmt: skip


def _change_decoder_load(now: StreamState, seconds: float) -> Remedy:
    setting = now.parts.setting
    if setting.device != "gpu" or now.parts.encoding == "raw":
        note = "raw images" if setting.device == "gpu" else "needs a GPU"
        return Remedy(name="hardware decoder", change="", note=note)
    loads = sorted({0.0, 0.5, 0.75, 1.0, setting.hw_decoder_load})
    works = {
        load: stages.make_pixel_step(now.parts, now.alone.loaded, hw_decoder_load=load)
        for load in loads
    }
    rates = measure_in_turn(works, seconds, setting.synchronize)
    present = rates.pop(setting.hw_decoder_load)
    best = max(rates, key=lambda load: rates[load].median)
    note = "" if best in (0.0, 1.0) else "pixels then depend a little on their batch"
    return _make_remedy(now, "hardware decoder", f"{setting.hw_decoder_load:g} -> {best:g}",
                        _scale_pixels(now.costs, rates[best], present), [rates[best], present],
                        note)  # fmt: skip


def _change_encoding(now: StreamState, seconds: float) -> Remedy | None:
    if now.parts.encoding == "raw":
        return None
    setting, samples = now.parts.setting, len(now.parts.shard_reader)
    need = -(-stream_rate.RAW_IMAGES // setting.batch_size)
    try:
        loaded = now.parts.load_batches(min(need, max(1, samples // setting.batch_size)))
        side = now.parts.shard_reader.manifest.mean_side
        rate, each = stream_rate.measure_raw(setting, loaded, side, seconds)
    except (OSError, subprocess.CalledProcessError):
        return Remedy(name="raw encoding", change="jpeg -> raw", note="no disk space to try it")
    img_s = rate.median
    note = f"{each / now.parts.bytes_each:.1f} times the bytes"
    if now.alone.disk and each * samples > available_memory():
        img_s = min(img_s, now.alone.disk / each)
        note += ", more than memory holds: the disk bounds it"
    else:
        note += ", in memory; tried on some of them"
    if now.costs.store:
        img_s = min(img_s, now.costs.store * now.parts.bytes_each / each)
        note += "; from the store even slower"
    found = Remedy(name="raw encoding", change="jpeg -> raw", img_s=img_s, gain=img_s / now.img_s,
                   note=note)  # fmt: skip
    return found.qualify(rate, now.rate)


def _change_shuffle(now: StreamState) -> Remedy | None:
    if now.parts.setting.shuffle == "block":
        return None
    if now.fits or now.alone.cold is None:
        note = "the set is in memory after its first epoch" if now.fits else (
            "this machine does not let go of pages; a disk cannot be told from memory")  # fmt: skip
        return Remedy(name="block shuffle", change="full -> block", img_s=now.img_s, gain=1.0,
                      note=note)  # fmt: skip
    with closing(Parts(replace(now.parts.setting, shuffle="block"), now.parts.dataset)) as parts:
        cold, _ = measure_cold_reading(parts, 60)
    costs = replace(now.costs, reader=cold.seconds)
    rates = [cold.rate(), now.alone.cold.rate()]
    return _make_remedy(now, "block shuffle", "full -> block", costs, rates,
                        "shards are read end to end")  # fmt: skip


def _change_cache(now: StreamState) -> Remedy:
    if not now.costs.store:
        return Remedy(name="cache", change="", note="for sets in a store only")
    size = sum(shard.bytes for shard in now.parts.shard_reader.shards)
    return _make_remedy(now, "cache", f"--cache-size of {size / 1e9:,.1f} GB and more",
                        replace(now.costs, store=0.0), [], "from the second epoch on")  # fmt: skip


def _change_batch_size(now: StreamState, seconds: float) -> Remedy | None:
    setting = now.parts.setting
    double = replace(setting, batch_size=2 * setting.batch_size)
    if double.batch_size > len(now.parts.shard_reader):
        return None
    with closing(Parts(double, now.parts.dataset)) as parts:
        works = {
            2: stages.make_pixel_step(parts, parts.load_batches(4)),
            1: stages.make_pixel_step(now.parts, now.alone.loaded),
        }
        rates = measure_in_turn(works, 2 * seconds, setting.synchronize)
    return _make_remedy(now, "batch", f"{setting.batch_size} -> {double.batch_size}",
                        _scale_pixels(now.costs, rates[2], rates[1]),
                        [rates[2], rates[1]])  # fmt: skip


def _scale_pixels(costs: Costs, other: Rate, present: Rate) -> Costs:
    """Return costs with DALI's rate times the ratio of two rates measured in turn."""
    known, factor = costs.pixels[costs.threads], other.median / present.median
    scaled = replace(known, windows=tuple(factor * rate for rate in known.windows))
    return replace(costs, pixels={costs.threads: scaled})


def sweep_threads(parts: Parts, alone: StageRates, counts: Sequence[int], seconds: float) -> Costs:
    """Return the costs of the stream, with DALI's rate at each of the thread counts."""
    works = {count: stages.make_pixel_step(parts, alone.loaded, threads=count) for count in counts}
    rates = measure_in_turn(works, seconds, parts.setting.synchronize)
    hand_over = next(row.img_s for row in alone.stages if row.name == "hand-over")
    return Costs(
        reader=alone.warm.seconds, pixels=rates, hand_over=1 / hand_over,
        cores=parts.setting.cores, threads=parts.setting.threads,
    )  # fmt: skip


def find_knee(costs: Costs) -> int:
    """Return the fewest threads, no more than there are cores, with 95 % of their highest rate."""
    counts = [count for count in costs.pixels if count <= costs.cores] or list(costs.pixels)
    rates = {count: predict_rate(replace(costs, threads=count)) for count in counts}
    return min(count for count, rate in rates.items() if rate >= 0.95 * max(rates.values()))
