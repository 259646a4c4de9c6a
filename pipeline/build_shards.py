"""Pack pictures into a sealed data set of WebDataset shards.

    python -m pipeline.build_shards OUT --train SRC [--val SRC | --holdout 0.1]

`SRC` is a folder per class, a folder of tars (one a class), or one tar of either kind; see
`pipeline.sources`. Every picture is cut to 256x256 (`pipeline.picture`), shuffled over its
whole split by the seed, and packed: as a JPEG, or with `--encoding raw` as its pixels, which need
no decoding and about eight times the space. Pictures that cannot be read are left out, counted, and
listed in OUT/rejects.jsonl. Running the same command again on a finished set does nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context
from pathlib import Path

import numpy as np
import tyro

from pipeline.errors import REBUILD, DataError, DuetError, UsageError, run
from pipeline.files import claimed, sealed, writable_folder
from pipeline.index import Index, save_index
from pipeline.manifest import NAME as MANIFEST
from pipeline.manifest import Manifest, Shard, Split
from pipeline.picture import PictureError, as_npy, encode, square
from pipeline.pixel_stats import Statistics, Sums
from pipeline.plan import Build, Plan, make_plan
from pipeline.processes import tie_to_parent
from pipeline.progress import Progress
from pipeline.shards import write_shard
from pipeline.sources import WHOLE_FILE, Picture, Reject, read

REJECTS = "rejects.jsonl"


@dataclass
class _Job:
    """One shard to build."""

    split: str
    number: int
    pictures: list[Picture]


@dataclass
class _Built:
    """What building one shard gave."""

    split: str
    shard: Shard
    rows: Index
    sums: Sums
    rejects: list[Reject] = field(default_factory=list)


def build(options: Build) -> Manifest:
    """Build the data set and return its manifest.

    Raises:
        UsageError: the source or OUT will not do.
        DuetError: a worker died, or no picture of a class could be read.
    """
    plan = make_plan(options)
    if (done := _finished(options.out, plan.fingerprint)) is not None:
        return done
    writable_folder(options.out, "data set folder")
    with claimed(options.out):
        return _seal(options, plan, _pack(options, plan))


def _pack(options: Build, plan: Plan) -> list[_Built]:
    """Build every shard; the results come in the order of their names."""
    built, left_out = [], len(plan.rejects)
    jobs = list(_jobs(plan.splits, options.samples_per_shard))
    pictures = sum(len(job.pictures) for job in jobs)
    with Progress("packing", total=pictures, unit="img") as progress:
        for one in _run(jobs, options):
            built.append(one)
            left_out += len(one.rejects)
            progress.advance(one.shard.samples + len(one.rejects))
            progress.note(f"{left_out} left out")
    return sorted(built, key=lambda one: one.shard.name)


def _finished(out: Path, plan: str) -> Manifest | None:
    """Return the manifest of a finished set of the same plan; refuse one of another plan."""
    if not (out / MANIFEST).exists():
        return None
    manifest = Manifest.load(out)
    if manifest.plan != plan:
        raise UsageError(
            f"{out} holds a finished data set of other pictures or settings; name another folder"
        )
    for split in manifest.splits.values():
        for shard in split.shards:
            path = out / shard.name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise DataError(f"{path} is missing or not whole; {REBUILD}")
    return manifest


def _jobs(splits: dict[str, list[Picture]], samples_per_shard: int) -> Iterator[_Job]:
    for split, pictures in splits.items():
        for start in range(0, len(pictures), samples_per_shard):
            yield _Job(
                split, start // samples_per_shard, pictures[start : start + samples_per_shard]
            )


def _run(jobs: list[_Job], options: Build) -> Iterator[_Built]:
    """Build shards in a pool, as they finish; a few are queued ahead, so memory stays flat."""
    todo = iter(jobs)
    running: set[Future[_Built]] = set()
    with ProcessPoolExecutor(
        options.workers, mp_context=get_context("spawn"), initializer=tie_to_parent
    ) as pool:
        try:
            while True:
                while len(running) < 2 * options.workers and (job := next(todo, None)):
                    running.add(pool.submit(_build_shard, options, job))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except KeyboardInterrupt:
            for process in active_children():  # a shard half built is of no use to anybody
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise DuetError(
                "a packing process died (out of memory?); run the same command again, "
                "with fewer --workers"
            ) from error
        except OSError as error:
            raise DuetError(
                f"{error.filename or options.out} failed while packing "
                f"({error.strerror or error}); mend it and run the same command again"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _build_shard(options: Build, job: _Job) -> _Built:
    """Build one shard; runs in a worker process."""
    sums, rejects = Sums(), []
    raw = options.encoding == "raw"

    def samples() -> Iterator[tuple[bytes, int]]:
        for picture in job.pictures:
            try:
                pixels = square(_bytes(picture))
            except PictureError as error:
                rejects.append(Reject(picture.name, str(error)))
                continue
            if job.split == "train":
                sums.add(pixels)
            yield as_npy(pixels) if raw else encode(pixels, options.quality), picture.label

    shard, rows = write_shard(options.out, job.split, job.number, samples(), options.encoding)
    return _Built(job.split, shard, rows, sums, rejects)


def _bytes(picture: Picture) -> bytes:
    """Read a picture; a file of its own that cannot be read is one bad picture, no more."""
    try:
        return read(picture)
    except OSError as error:
        if picture.size != WHOLE_FILE:
            raise  # the tar went away or is shorter now: that concerns all of its pictures
        raise PictureError(f"cannot be read: {error.strerror or error}") from error


def _seal(options: Build, plan: Plan, built: list[_Built]) -> Manifest:
    """Write the files about the shards, and the manifest last."""
    splits, sums = {}, Sums()
    rejects = plan.rejects + [reject for one in built for reject in one.rejects]
    for name in dict.fromkeys(one.split for one in built):
        parts = [one for one in built if one.split == name]
        rows = np.concatenate([one.rows for one in parts])
        _all_classes(name, rows, plan.classes, rejects)
        splits[name] = Split(
            shards=tuple(one.shard for one in parts),
            index_sha256=save_index(options.out, name, rows),
        )
    for one in built:
        sums += one.sums
    stats_sha256 = Statistics.of(sums).save(options.out)
    with sealed(options.out / REJECTS) as file:
        for reject in rejects:
            file.write((json.dumps(reject._asdict()) + "\n").encode())
    sources = {"train": str(options.train)}
    if "val" in splits:
        sources["val"] = str(options.val or f"{options.holdout:g} of {options.train}")
    manifest = Manifest(
        splits=splits,
        classes=plan.classes,
        seed=options.seed,
        sources=sources,
        plan=plan.fingerprint,
        stats_sha256=stats_sha256,
        rejected=len(rejects),
        quality=options.quality if options.encoding == "jpeg" else None,
        encoding=options.encoding,
    )
    manifest.save(options.out)
    return manifest


def _all_classes(split: str, rows: Index, classes: tuple[str, ...], rejects: list[Reject]) -> None:
    counts = np.bincount(rows["label"], minlength=len(classes)) if len(rows) else np.zeros(1)
    empty = np.flatnonzero(counts == 0)
    if len(rows) == 0 or (split == "train" and len(empty)):
        what = f"class {classes[empty[0]]!r}" if len(rows) else f"split {split!r}"
        example = f" (for example {rejects[-1].name}: {rejects[-1].reason})" if rejects else ""
        raise UsageError(f"no picture of {what} could be read{example}; replace them")


def main() -> int:
    """Build, then say what was built."""
    options = tyro.cli(Build, prog="python -m pipeline.build_shards", description=__doc__)
    started = time.monotonic()
    known = (options.out / MANIFEST).exists()
    manifest = build(options)
    seconds = time.monotonic() - started
    samples = {name: split.samples for name, split in manifest.splits.items()}
    size = sum(split.bytes for split in manifest.splits.values())
    if options.json:
        facts = {
            "data": str(options.out),
            "samples": samples,
            "shards": {name: len(split.shards) for name, split in manifest.splits.items()},
            "bytes": size,
            "encoding": manifest.encoding,
            "classes": len(manifest.classes),
            "rejected": manifest.rejected,
            "seconds": round(seconds, 3),
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    parts = ", ".join(f"{count:,} {name}" for name, count in samples.items())
    left_out = (
        f", {manifest.rejected} left out ({options.out / REJECTS})" if manifest.rejected else ""
    )
    sys.stderr.write(
        f"data set {options.out}: {parts} pictures of {len(manifest.classes)} classes{left_out}, "
        f"{_human(size)} of {manifest.encoding} shards, "
        + ("built before\n" if known else f"{seconds:.0f} s\n")
    )
    return 0


def _human(size: int) -> str:
    """Return a number of bytes in MB, or in GB from a billion on (powers of ten)."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


if __name__ == "__main__":
    run(main)
