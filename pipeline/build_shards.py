"""The first door: pack pictures into a sealed data set of WebDataset shards.

    python -m pipeline.build_shards OUT --train SRC [--val SRC | --holdout 0.1]

`SRC` is a folder per class, a folder of tars (one a class), or one tar of either kind; see
`pipeline.sources`. Every picture is cut to 256x256 (`pipeline.picture`), shuffled over its
whole split by the seed, and packed. Pictures that cannot be read are left out, counted, and
listed in OUT/rejects.jsonl. Running the same command again on a finished set does nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pipeline.errors import DuetError, UsageError, run
from pipeline.files import PARTIAL, sealed, writable_folder
from pipeline.manifest import NAME as MANIFEST
from pipeline.manifest import Manifest, Shard, Split
from pipeline.picture import PictureError, encode, square
from pipeline.pixel_stats import NAME as STATS
from pipeline.pixel_stats import Statistics, Sums
from pipeline.progress import Progress
from pipeline.shards import Index, index_name, save_index, write_shard
from pipeline.sources import Picture, Reject, Source, read, scan

REJECTS = "rejects.jsonl"


@dataclass(frozen=True, kw_only=True)
class Build:
    """Pack pictures into WebDataset tar shards that Duet, DALI and webdataset all read."""

    out: Annotated[Path, tyro.conf.Positional]
    """Folder of the data set; created if need be."""
    train: Path
    """Training pictures: a folder per class, a tar per class, or one tar of either."""
    val: Path | None = None
    """Validation pictures, laid out like the training ones."""
    holdout: float = 0.0
    """Without --val: the share of each class's training pictures to keep for validation."""
    seed: int = 0
    """Seed of the shuffle over each split (and of what is held out)."""
    samples_per_shard: int = 1000
    """Samples in each shard but the last."""
    quality: int = 90
    """JPEG quality of the stored 256x256 pictures, 1..100."""
    workers: int = len(os.sched_getaffinity(0))
    """Processes that decode and encode."""
    json: bool = False
    """Print one JSON object about the finished set on stdout."""

    def check(self) -> None:
        """Refuse values that cannot work, each in one line (UsageError)."""
        for name, low, high in (
            ("samples_per_shard", 1, 100_000),
            ("quality", 1, 100),
            ("workers", 1, 1024),
            ("seed", 0, 2**63 - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise UsageError(f"{flag} {value} is out of range; give {low} to {high}")
        if not 0 <= self.holdout < 1:
            raise UsageError(f"--holdout {self.holdout} is out of range; give 0 to below 1")
        if self.val is not None and self.holdout:
            raise UsageError("--val and --holdout exclude each other; give one of them")


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
    options.check()
    splits, classes, rejects = _plan(options)
    plan = _fingerprint(options, splits, classes)
    if (done := _finished(options.out, plan)) is not None:
        return done
    writable_folder(options.out, "data set folder")
    _clean(options.out)
    built, jobs = [], list(_jobs(splits, options.samples_per_shard))
    pictures = sum(len(job.pictures) for job in jobs)
    with Progress("packing", total=pictures, unit="img") as progress:
        for one in _run(jobs, options):
            built.append(one)
            progress.advance(one.shard.samples + len(one.rejects))
            progress.note(f"{len(rejects) + sum(len(b.rejects) for b in built)} left out")
    built.sort(key=lambda one: one.shard.name)
    rejects += [reject for one in built for reject in one.rejects]
    return _seal(options, plan, classes, built, rejects)


def _plan(options: Build) -> tuple[dict[str, list[Picture]], tuple[str, ...], list[Reject]]:
    """Return the pictures of each split in stored order, the classes, and what is left out."""
    sources: dict[str, Source] = {"train": scan(options.train)}
    classes = sources["train"].classes
    if options.val is not None:
        sources["val"] = scan(options.val, classes)
    rejects = [reject for source in sources.values() for reject in source.rejects]
    splits = {name: source.pictures for name, source in sources.items()}
    if options.holdout:
        splits["train"], splits["val"] = _hold_out(splits["train"], options)
    return (
        {name: _shuffled(pictures, options.seed, name) for name, pictures in splits.items()},
        classes,
        rejects,
    )


def _hold_out(pictures: list[Picture], options: Build) -> tuple[list[Picture], list[Picture]]:
    """Split each class's pictures by a seeded draw; every class keeps one in each part."""
    parts: tuple[list[Picture], list[Picture]] = ([], [])
    labels = np.array([picture.label for picture in pictures])
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if len(places) < 2:
            raise UsageError(
                f"--holdout needs two pictures a class; class number {label} "
                f"of {options.train} has one"
            )
        count = min(len(places) - 1, max(1, round(len(places) * options.holdout)))
        drawn = np.random.default_rng([options.seed, int(label)]).permutation(places)
        parts[1].extend(pictures[place] for place in sorted(drawn[:count]))
        parts[0].extend(pictures[place] for place in sorted(drawn[count:]))
    return parts


def _shuffled(pictures: list[Picture], seed: int, split: str) -> list[Picture]:
    order = np.random.default_rng([seed, *split.encode()]).permutation(len(pictures))
    return [pictures[place] for place in order]


def _fingerprint(options: Build, splits: dict[str, list[Picture]], classes: Sequence[str]) -> str:
    """Hash everything the bytes of the shards depend on, but the pictures' contents."""
    digest = hashlib.sha256()
    settings = (options.seed, options.samples_per_shard, options.quality, list(classes))
    digest.update(json.dumps(settings).encode())
    for name, pictures in splits.items():
        digest.update(name.encode())
        for picture in pictures:
            digest.update(repr(picture).encode())
    return digest.hexdigest()


def _finished(out: Path, plan: str) -> Manifest | None:
    """Return the manifest of a finished set of the same plan; refuse one of another plan."""
    if not (out / MANIFEST).exists():
        return None
    manifest = Manifest.load(out)
    if manifest.plan != plan:
        raise UsageError(
            f"{out} holds a finished data set of other pictures or settings; name another folder"
        )
    return manifest


def _clean(out: Path) -> None:
    """Remove what an unfinished build left; refuse a folder that holds anything else."""
    ours = re.compile(r"(train|val)-\d{6}\.(tar|idx)$|.*" + re.escape(PARTIAL) + "$")
    known = {STATS, REJECTS, index_name("train"), index_name("val")}
    for path in sorted(out.iterdir()):
        if not (ours.match(path.name) or path.name in known):
            raise UsageError(
                f"{out} holds {path.name}, which is no part of a data set; name an empty folder"
            )
    for path in out.iterdir():
        path.unlink()


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
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        try:
            while True:
                while len(running) < 2 * options.workers and (job := next(todo, None)):
                    running.add(pool.submit(_build_shard, options.out, job, options.quality))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
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


def _build_shard(out: Path, job: _Job, quality: int) -> _Built:
    """Build one shard; runs in a worker process."""
    sums, rejects = Sums(), []

    def samples() -> Iterator[tuple[bytes, int]]:
        for picture in job.pictures:
            try:
                pixels = square(read(picture))
            except PictureError as error:
                rejects.append(Reject(picture.name, str(error)))
                continue
            if job.split == "train":
                sums.add(pixels)
            yield encode(pixels, quality), picture.label

    shard, rows = write_shard(out, job.split, job.number, samples())
    return _Built(job.split, shard, rows, sums, rejects)


def _seal(
    options: Build, plan: str, classes: tuple[str, ...], built: list[_Built], rejects: list[Reject]
) -> Manifest:
    """Write the files about the shards, and the manifest last."""
    splits, sums = {}, Sums()
    for name in dict.fromkeys(one.split for one in built):
        parts = [one for one in built if one.split == name]
        rows = np.concatenate([one.rows for one in parts])
        _all_classes(name, rows, classes, rejects)
        splits[name] = Split(
            shards=tuple(one.shard for one in parts),
            index_sha256=save_index(options.out, name, rows),
        )
    for one in built:
        sums += one.sums
    Statistics.of(sums).save(options.out)
    with sealed(options.out / REJECTS) as file:
        for reject in rejects:
            file.write((json.dumps(reject._asdict()) + "\n").encode())
    sources = {"train": str(options.train)}
    if "val" in splits:
        sources["val"] = str(options.val or f"{options.holdout:g} of {options.train}")
    manifest = Manifest(
        splits=splits,
        classes=classes,
        seed=options.seed,
        sources=sources,
        plan=plan,
        rejected=len(rejects),
        quality=options.quality,
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
    manifest = build(options)
    seconds = time.monotonic() - started
    samples = {name: split.samples for name, split in manifest.splits.items()}
    if options.json:
        facts = {
            "data": str(options.out),
            "samples": samples,
            "shards": {name: len(split.shards) for name, split in manifest.splits.items()},
            "bytes": sum(split.bytes for split in manifest.splits.values()),
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
        f"{seconds:.0f} s\n"
    )
    return 0


if __name__ == "__main__":
    run(main)
