"""Driver of a build: plan, pack chunks, write shards, seal; a killed build resumes.

Only the files in OUT/.build tell what is done: every step looks for missing files and makes them.
The manifest is written last.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.tar import escape
from pipeline.options import BuildConfig
from pipeline.packing import chunks
from pipeline.packing.chunks import (
    ChunkError,
    chunk_data_name,
    chunk_facts_name,
    make_chunk_job,
    pack_chunk,
)
from pipeline.packing.formats import PACKAGES
from pipeline.packing.known import KnownImages
from pipeline.packing.plan import (
    BuildPlan,
    describe_format,
    make_plan,
    output_settings,
)
from pipeline.packing.shards import FOLDER as SHARDS
from pipeline.packing.shards import (
    REJECTS,
    CollectedChunks,
    ShardJob,
    check_classes,
    collect_chunks,
    copy_file,
    fetch_shard,
    parse_shard,
    seal,
    shard_facts_name,
    write_rejects,
    write_shard,
)
from pipeline.remote.target import WORK, Target, is_finished, open_target
from pipeline.sources.listing import read_rejects, summarize_rejects
from pipeline.tools.errors import REBUILD, DataError, DuetError, UsageError, hint_resume
from pipeline.tools.jsonl import parse_json
from pipeline.tools.packages import find_version
from pipeline.tools.processes import LocalPool, Pool, read_ahead
from pipeline.tools.progress import Progress, announce, write_line
from pipeline.tools.text import hide_credentials

STATE = f"{WORK}/build.json"
"""File with the plan and the settings of the build in this folder."""

REPEATS = 3
"""Times that a chunk which was damaged on the disk is packed again before the build fails."""

LIBRARIES = ("pillow", "simplejpeg", "torch", "webdataset")
"""Packages whose versions decide the bytes of a shard."""


def build(options: BuildConfig, target: Target | None = None, pool: Pool | None = None) -> Manifest:
    """Build the data set, or resume its build, and return its manifest.

    Args:
        options: the settings.
        target: OUT; by default the target of `options.out`.
        pool: runs the jobs; by default processes of this machine.

    Raises:
        UsageError: the source or OUT cannot be used, or another build holds OUT.
        DuetError: too many rejects, a disk failed or is full, or a worker died repeatedly.
        DataError: OUT holds a finished set with a shard missing or truncated.
    """
    options.check()
    target = target or open_target(options.out)
    with disk_errors_in_one_line(target):
        if is_finished(target):
            return _check_finished(options, target)
    with disk_errors_in_one_line(target), target.reserve(), target.scratch() as scratch:
        with announce(f"listing the images of {escape(hide_credentials(options.train))}"):
            plan = make_plan(options, scratch)
        _tell_notes(plan)
        _check_state(options, plan, target)
        # Damage is told before hours of packing; the list of other rejects is whole at their end.
        if plan.lost and _has_too_many_rejects(options, plan, plan.rejected):
            _refuse_rejects(options, plan, target, plan.rejected, write_rejects(plan, scratch))
        kept = f"{hide_credentials(target.address)} keeps what is packed"
        with (
            hint_resume(kept),
            nullcontext(pool) if pool else LocalPool(options.workers) as workers,
        ):
            damaged: Counter[int] = Counter()
            while max(damaged.values(), default=0) < REPEATS:
                try:
                    return _build_once(options, plan, target, workers, scratch)
                except ChunkError as error:
                    target.remove(map(chunk_facts_name, error.numbers))
                    damaged.update(error.numbers)
    raise DuetError(f"{target.address} gives back other bytes than were written; replace the disk")


def _tell_notes(plan: BuildPlan) -> None:
    for note in plan.notes:
        write_line(f"note: {note}")


def _build_once(
    options: BuildConfig, plan: BuildPlan, target: Target, pool: Pool, scratch: Path
) -> Manifest:
    """Make the missing files; raises ChunkError if a chunk must be packed again."""
    pack_chunks(options, plan, target, pool)
    collected = collect_chunks(options, plan, target, scratch)
    refuse_many_rejects(options, plan, target, collected)
    check_classes(plan, collected, target)
    shards = write_shards(options, plan, target, pool, collected)
    with announce("looking for duplicates, and sealing the set"):
        manifest = seal(options, plan, target, collected, shards, scratch, library_versions())
    target.clear(WORK)
    return manifest


def pack_chunks(
    options: BuildConfig,
    plan: BuildPlan,
    target: Target,
    pool: Pool,
    known: KnownImages | None = None,
) -> None:
    """Pack the missing chunks, which is stage one; images that are known are left out."""
    there = target.list_files(chunks.FOLDER)
    missing = [
        part
        for part in plan.parts()
        if not {chunk_data_name(part.number), chunk_facts_name(part.number)} <= there
    ]
    if not missing:
        return
    already = plan.images - sum(part.stop - part.start for part in missing)
    rejects = plan.rejected
    jobs = (make_chunk_job(plan, part, options, target, known) for part in missing)
    with Progress("packing", total=plan.images, unit="img", already=already) as progress:
        for done in pool.run(pack_chunk, jobs):
            rejects += done.rejected
            progress.advance(done.images)
            progress.note(f"{rejects} skipped")


def write_shards(
    options: BuildConfig,
    plan: BuildPlan,
    target: Target,
    pool: Pool,
    collected: CollectedChunks,
    first_numbers: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Write the missing shards, which is stage two.

    Args:
        options: the settings.
        plan: the images.
        target: OUT.
        pool: runs the jobs.
        collected: facts of all chunks.
        first_numbers: number of the first shard of each split; None: 0.

    Returns:
        the number of shards of each split.
    """
    counts = {}
    jobs = []
    total = int(collected.packed.sum())
    there = target.list_files(SHARDS)
    step = options.samples_per_shard
    for split in plan.orders:
        order = collected.order(plan, split)
        rows = [order[start : start + step] for start in range(0, len(order), step)]
        counts[split] = len(rows)
        first = (first_numbers or {}).get(split, 0)
        maybe = [n for n in range(len(rows)) if shard_facts_name(split, first + n) in there]
        files = read_ahead(partial(fetch_shard, target, split), [first + n for n in maybe])
        done = {
            number
            for number, fetched in zip(maybe, files, strict=True)
            if parse_shard(fetched, collected.hash(rows[number]))
        }
        jobs += [(split, first + n, some) for n, some in enumerate(rows) if n not in done]
    already = total - sum(len(rows) for *_, rows in jobs)
    todo = (
        ShardJob(
            target,
            split,
            number,
            options.encoding,
            collected.taken[rows],
            collected.members[rows],
            options.members,
            sized=options.fit != "square",
        )
        for split, number, rows in jobs
    )
    with Progress("writing shards", total=total, unit="img", already=already) as progress:
        for samples in pool.run(write_shard, todo):
            progress.advance(samples)
    return counts


def refuse_many_rejects(
    options: BuildConfig, plan: BuildPlan, target: Target, collected: CollectedChunks
) -> None:
    """Refuse to seal a set with too many rejects.

    Raises:
        DuetError: says how many, and why most of them.
    """
    if _has_too_many_rejects(options, plan, collected.rejected - collected.withdrawn):
        _refuse_rejects(options, plan, target, collected.rejected, collected.rejects_file)


def _has_too_many_rejects(options: BuildConfig, plan: BuildPlan, rejected: int) -> bool:
    lost, everything = rejected + plan.lost, plan.images + plan.rejected + plan.lost
    return lost > options.max_rejects * everything + 1e-6  # 0.29 * 100 is below 29


def _refuse_rejects(
    options: BuildConfig, plan: BuildPlan, target: Target, rejected: int, rejects: Path
) -> NoReturn:
    """Refuse to go on with too many rejects, and leave the list of them in OUT."""
    where = f"{WORK}/{REJECTS}" if options.extends else REJECTS
    copy_file(rejects, target, where)
    lost, everything = rejected + plan.lost, plan.images + plan.rejected + plan.lost
    share, about = lost / everything, "about " if plan.lost else ""
    raise DuetError(
        f"{about}{lost:,} of {everything:,} files ({share:.2%}) cannot be packed, more than "
        f"--max-rejects {options.max_rejects:g} allows; most often: "
        f"{summarize_rejects(read_rejects(rejects))}; {target.address}/{where} "
        "says why: mend them and start in another folder, or go on without them: "
        f"--max-rejects {_round_up(share):g}"
    )


def _round_up(share: float) -> float:
    """Round a share up to two significant digits, 0.26 for 0.25, and at most 1."""
    digits = 1 - math.floor(math.log10(share))
    return min(1.0, round(share + 0.5 * 10.0**-digits, digits))


def _check_finished(options: BuildConfig, target: Target) -> Manifest:
    """Return the manifest of a finished set of the same plan; refuse one of another plan."""
    manifest = Manifest.parse(target.read(MANIFEST), f"{target.address}/{MANIFEST}")
    with tempfile.TemporaryDirectory() as scratch:
        plan = make_plan(options, Path(scratch))
    if manifest.plan != plan.fingerprint:
        theirs, ours = _known_settings(manifest, options)
        what = _describe_difference({"settings": theirs}, {"settings": ours})
        raise UsageError(
            f"{target.address} holds a finished data set of {what}; name another folder"
        )
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    for shard, size in zip(shards, read_ahead(lambda s: target.size(s.name), shards), strict=True):
        if size != shard.bytes:
            raise DataError(f"{target.address}/{shard.name} is missing or not whole; {REBUILD}")
    _tell_notes(plan)
    if "parent" not in read_state(target):
        target.clear(WORK)  # left by a build that was killed after sealing
    return manifest


def read_state(target: Target) -> dict[str, object]:
    """Return the state of the work in a target; empty if there is none."""
    try:
        found = parse_json(target.read(STATE))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _known_settings(
    manifest: Manifest, options: BuildConfig
) -> tuple[dict[str, object], dict[str, object]]:
    """Return the settings that a manifest tells of, and those of this build."""
    theirs: dict[str, object] = {
        name: value
        for name in ("seed", "encoding", "quality", "chroma", "fit")
        if (value := getattr(manifest, name)) is not None
    }
    if manifest.image_size is not None:
        theirs["size"] = manifest.image_size
    if len(shards := manifest.splits["train"].shards) > 1:
        theirs["samples_per_shard"] = shards[0].samples
    return theirs, {name: getattr(options, name) for name in theirs}


def describe_state(options: BuildConfig, plan: BuildPlan) -> dict[str, object]:
    """Return what a build must share with the files that it resumes from."""
    return {
        "plan": plan.fingerprint,
        "format": describe_format(),
        "settings": output_settings(options),
        "libraries": library_versions(),
    }


def _check_state(options: BuildConfig, plan: BuildPlan, target: Target) -> None:
    """Write the state file, or check that the unfinished build has the same plan and settings."""
    ours = describe_state(options, plan)
    try:
        theirs = parse_json(target.read(STATE))
    except FileNotFoundError:
        target.clear(chunks.FOLDER)  # left by a build whose state file was deleted
        target.clear(SHARDS)
        with target.create(STATE) as file:
            file.write(json.dumps(ours, indent=1).encode())
        return
    except ValueError:
        theirs = {}
    if theirs == ours:
        return
    raise UsageError(
        f"{target.address} holds an unfinished data set of {_describe_difference(theirs, ours)}; "
        "name another folder, or delete this one"
    )


def _describe_difference(theirs: Mapping[str, object], ours: Mapping[str, object]) -> str:
    if theirs.get("format") != ours.get("format"):
        return "another version of Duet"
    for kind in ("settings", "libraries"):
        before, now = theirs.get(kind), ours.get(kind)
        if isinstance(before, dict) and isinstance(now, dict):
            for key in now:
                if before.get(key) != now[key]:
                    return f"{key} {before.get(key)}, and this one is of {now[key]}"
    return "other images, settings or order of the classes, or of another version of Duet"


def library_versions() -> dict[str, str]:
    """Return the versions of the packages that decide the bytes of a shard."""
    decoders = {name: found for name in PACKAGES if (found := find_version(name))}
    return {name: find_version(name) or "unknown" for name in LIBRARIES} | decoders


@contextmanager
def disk_errors_in_one_line(target: Target) -> Iterator[None]:
    """Convert OSError into a one-line DuetError."""
    try:
        yield
    except DuetError:  # StoreError is an OSError, too
        raise
    except OSError as error:
        what = (
            f"{error.filename or target.address} failed while packing ({error.strerror})"
            if error.strerror
            else str(error)  # raised by Duet; it names the file
        )
        raise DuetError(f"{what}; mend it and run the same command again, it resumes") from error
