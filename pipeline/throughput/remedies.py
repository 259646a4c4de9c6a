"""What could be changed, and what each change is predicted to gain."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.throughput import raw_trial, stages
from pipeline.throughput.clock import Rate, in_turn
from pipeline.throughput.machine import memory_bytes
from pipeline.throughput.model import Costs, jitter, predicted
from pipeline.throughput.reading import Reading, reading_cold
from pipeline.throughput.setting import Parts
from pipeline.throughput.stages import Alone

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
    """Predicted pictures a second; None: it cannot be said."""
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
        """Pictures a second and gain with other costs: the model's ratio on what was measured."""
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
                     note="raw pictures" if setting.device == "gpu" else "needs a GPU")  # fmt: skip
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
    need = -(-raw_trial.PICTURES // now.parts.setting.batch_size)
    try:
        loaded = now.parts.loaded(min(need, max(1, samples // now.parts.setting.batch_size)))
        rate, each = raw_trial.measure(now.parts.setting, loaded, seconds)
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
