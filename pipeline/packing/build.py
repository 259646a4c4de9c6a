"""The whole of a build: plan, pack in chunks, gather into shards, seal; killed, it goes on.

What is done is told by files in OUT/.build alone, so a build has no state but its folder: every
step looks for what is missing and makes it. The manifest is written last.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import Manifest
from pipeline.packing import chunks
from pipeline.packing.chunks import ChunkError, chunk_job, data_name, facts_name, pack_chunk
from pipeline.packing.plan import Build, Plan, chunk_format, make_plan, settings
from pipeline.packing.shards import FOLDER as SHARDS
from pipeline.packing.shards import (
    REJECTS,
    Collected,
    ShardJob,
    all_classes,
    collect,
    copied,
    done_name,
    fetch_done,
    parse_done,
    seal,
    write_shard_of,
)
from pipeline.remote.target import WORK, Target, is_finished, open_target
from pipeline.tools.errors import REBUILD, DataError, DuetError, UsageError
from pipeline.tools.processes import LocalPool, Pool, read_ahead
from pipeline.tools.progress import Progress

STATE = f"{WORK}/build.json"
"""What the build in this folder is of."""

REPEATS = 3
"""Times that a chunk damaged on the disk is packed again before the disk is blamed."""

LIBRARIES = ("pillow", "simplejpeg", "torch", "webdataset")
"""Whose releases decide the bytes of a shard."""


def build(options: Build, target: Target | None = None, pool: Pool | None = None) -> Manifest:
    """Build the data set, or go on with it, and return its manifest.

    Args:
        options: the settings.
        target: where OUT is, if not where `options.out` says.
        pool: what does the work, if not processes of this machine.

    Raises:
        UsageError: the source or OUT will not do, or another build is at work there.
        DuetError: more was left out than allowed, a disk failed or is full, a worker died again.
        DataError: OUT holds a finished set that is not whole.
    """
    options.check()
    return _build_in(target or open_target(options.out), options, pool)


def _build_in(target: Target, options: Build, pool: Pool | None) -> Manifest:
    with _one_line(target):
        if is_finished(target):
            return _as_it_is(options, target)
    with _one_line(target), target.reserve(), target.scratch() as scratch:
        plan = make_plan(options, scratch)
        _begin(options, plan, target)
        with _used(pool, options) as workers:
            damaged: Counter[int] = Counter()
            while max(damaged.values(), default=0) < REPEATS:
                try:
                    return _build(options, plan, target, workers, scratch)
                except ChunkError as error:
                    target.remove(map(facts_name, error.numbers))
                    damaged.update(error.numbers)
    raise DuetError(f"{target.address} gives back other bytes than were written; replace the disk")


def _build(options: Build, plan: Plan, target: Target, pool: Pool, scratch: Path) -> Manifest:
    """Do what is missing; raises ChunkError if a chunk must be packed again."""
    _pack(options, plan, target, pool)
    collected = collect(plan, target, scratch)
    _few_enough(options, plan, target, collected)
    all_classes(plan, collected, target)
    shards = _gather(options, plan, target, pool, collected)
    manifest = seal(options, plan, target, collected, shards, scratch, libraries())
    target.clear(WORK)
    return manifest


def _pack(options: Build, plan: Plan, target: Target, pool: Pool) -> None:
    """Stage one: the chunks that are missing."""
    there = target.list_files(chunks.FOLDER)
    missing = [
        part
        for part in plan.parts()
        if not {data_name(part.number), facts_name(part.number)} <= there
    ]
    if not missing:
        return
    already = plan.pictures - sum(part.stop - part.start for part in missing)
    left_out = plan.rejected
    jobs = (chunk_job(plan, part, options, target) for part in missing)
    with Progress("packing", total=plan.pictures, unit="img", already=already) as progress:
        for done in pool.run(pack_chunk, jobs):
            left_out += done.rejected
            progress.advance(done.pictures)
            progress.note(f"{left_out} left out")


def _gather(
    options: Build, plan: Plan, target: Target, pool: Pool, collected: Collected
) -> dict[str, int]:
    """Stage two: the shards that are missing. Returns the number of shards of each split."""
    counts = {}
    jobs = []
    total = int(collected.packed.sum())
    there = target.list_files(SHARDS)
    for split in plan.orders:
        order = collected.order(plan, split)
        step = options.samples_per_shard
        counts[split] = -(-len(order) // step)
        maybe = [n for n in range(counts[split]) if done_name(split, n) in there]
        rows = [order[number * step : (number + 1) * step] for number in range(counts[split])]
        done = {
            number
            for number, fetched in zip(
                maybe, read_ahead(partial(fetch_done, target, split), maybe), strict=True
            )
            if parse_done(fetched, split, number, collected.taken[rows[number]])
        }
        jobs += [(split, n, rows[n]) for n in range(counts[split]) if n not in done]
    already = total - sum(len(rows) for *_, rows in jobs)
    todo = (
        ShardJob(target, split, number, options.encoding, collected.taken[rows])
        for split, number, rows in jobs
    )
    with Progress("writing shards", total=total, unit="img", already=already) as progress:
        for samples in pool.run(write_shard_of, todo):
            progress.advance(samples)
    return counts


def _few_enough(options: Build, plan: Plan, target: Target, collected: Collected) -> None:
    """Refuse to ship a set of which too much is missing."""
    everything = plan.pictures + plan.rejected
    if collected.rejected <= options.max_rejects * everything + 1e-6:  # 0.29 * 100 is below 29
        return
    copied(collected.rejects_file, target, REJECTS)
    share = collected.rejected / everything
    raise DuetError(
        f"{collected.rejected:,} of {everything:,} files ({share:.2%}) cannot be packed, more than "
        f"--max-rejects {options.max_rejects:g} allows; {target.address}/{REJECTS} says why: mend "
        f"them and start in another folder, or go on without them: --max-rejects {_above(share):g}"
    )


def _above(share: float) -> float:
    """Return a number not below a share, of two digits that count: 0.26 for 0.25."""
    digits = 1 - math.floor(math.log10(share))
    return min(1.0, round(share + 0.5 * 10.0**-digits, digits))


def _as_it_is(options: Build, target: Target) -> Manifest:
    """Return the manifest of a finished set of the same plan; refuse one of another plan."""
    manifest = Manifest.parse(target.read(MANIFEST), f"{target.address}/{MANIFEST}")
    with tempfile.TemporaryDirectory() as scratch:
        fingerprint = make_plan(options, Path(scratch)).fingerprint
    if manifest.plan != fingerprint:
        raise UsageError(
            f"{target.address} holds a finished data set of other images or settings, or of "
            "another version of Duet; name another folder"
        )
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    for shard, size in zip(shards, read_ahead(lambda s: target.size(s.name), shards), strict=True):
        if size != shard.bytes:
            raise DataError(f"{target.address}/{shard.name} is missing or not whole; {REBUILD}")
    target.clear(WORK)  # of a build that was killed after its last word
    return manifest


def _begin(options: Build, plan: Plan, target: Target) -> None:
    """Write down what this build is of, or make sure that the unfinished one is of the same."""
    ours = {
        "plan": plan.fingerprint,
        "format": chunk_format(),
        "settings": settings(options),
        "libraries": libraries(),
    }
    try:
        theirs = json.loads(target.read(STATE))
    except FileNotFoundError:
        target.clear(chunks.FOLDER)  # of a build whose folder was deleted under it
        target.clear(SHARDS)
        with target.create(STATE) as file:
            file.write(json.dumps(ours, indent=1).encode())
        return
    except ValueError:
        theirs = {}
    if theirs == ours:
        return
    raise UsageError(
        f"{target.address} holds an unfinished data set of {_difference(theirs, ours)}; "
        "name another folder, or delete this one"
    )


def _difference(theirs: Mapping[str, object], ours: Mapping[str, object]) -> str:
    if theirs.get("format") != ours["format"]:
        return "another version of Duet"
    for kind in ("settings", "libraries"):
        before, now = theirs.get(kind), ours[kind]
        if isinstance(before, dict) and isinstance(now, dict):
            for key in now:
                if before.get(key) != now[key]:
                    return f"{key} {before.get(key)}, and this one is of {now[key]}"
    return "other images"


def libraries() -> dict[str, str]:
    """Return the releases of what decides the bytes of a shard."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


@contextmanager
def _used(pool: Pool | None, options: Build) -> Iterator[Pool]:
    if pool is not None:
        yield pool
        return
    with LocalPool(options.workers) as ours:
        yield ours


@contextmanager
def _one_line(target: Target) -> Iterator[None]:
    """Turn what a disk does wrong into one line."""
    try:
        yield
    except DuetError:  # a store that does not answer is an OSError, too
        raise
    except OSError as error:
        what = (
            f"{error.filename or target.address} failed while packing ({error.strerror})"
            if error.strerror
            else str(error)  # our own words, which name the file
        )
        raise DuetError(f"{what}; mend it and run the same command again, it goes on") from error
