"""Give a folder of WebDataset shards an index and a manifest, so that they train as they are.

    python -m pipeline.index_shards DIR [--train GLOB] [--val GLOB] [--classes FILE]

For shards that another tool made of 256x256 JPEGs (`.jpg` or `.jpeg`, with the label in `.cls` or
`.json`). Every image is decoded once, and what cannot be trained from is named by shard and key;
then nothing is written, unless --skip-bad leaves it out. Images of other sizes or kinds need
`python -m pipeline.build_shards OUT --train DIR`. Nothing in DIR is changed, files are added.

One shard that another tool made -> where its samples lie, their labels, and what is wrong.

A folder of WebDataset shards of 256x256 JPEGs -> a data set, without repacking.

Nothing that is there is changed. Beside the tars come an `.idx` each (one that is there is kept),
`SPLIT.index.npy`, `stats.npz`, `rejects.jsonl` and, last, `manifest.json`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import tyro
from isal import isal_zlib

from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.image_stats import Statistics, Sums
from pipeline.dataset.images import Undecodable, decode_image
from pipeline.dataset.index import INDEX_DTYPE, Index, index_name, save_index
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import Manifest, Shard, Split
from pipeline.dataset.samples import (
    MAX_CLASSES,
    Classes,
    Sample,
    UnfitSample,
    group_samples,
    has_images,
    read_classes,
    read_label,
)
from pipeline.dataset.shards import format_idx, locate_files, parse_idx
from pipeline.dataset.tar import escape, extract_fault, read_members
from pipeline.tools.errors import DataError, UsageError, run
from pipeline.tools.files import HashedFile, atomic_write, ensure_writable, sha256
from pipeline.tools.processes import map_in_order
from pipeline.tools.progress import Progress

PICTURE_LIMIT = 1 << 24
"""Bytes of a stored JPEG; 256x256 pixels never come near."""


class Job(NamedTuple):
    """One shard to look at."""

    path: Path
    measured: bool
    """Whether it is of the training split: its pixels count for the statistics."""
    classes: Classes | None
    """Where they are known beforehand."""


class Bad(NamedTuple):
    """What cannot be trained from: a sample, or with an empty key the whole shard."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        key = f" key {escape(self.key)}" if self.key else ""
        return f"{escape(self.shard)}{key}: {self.reason}"


@dataclass
class Examined:
    """What one shard holds."""

    name: str
    bytes: int = 0
    sha256: str = ""
    idx_sha256: str = ""
    """Of the `.idx` that lies beside it, if there is one."""
    rows: Index = field(default_factory=lambda: np.zeros(0, INDEX_DTYPE))
    """A label in here is a place in `labels`, and the shard is number 0."""
    labels: list[int | str] = field(default_factory=list)
    """Those that there are, as they are written."""
    keys: list[str] = field(default_factory=list)
    """Of the rows; only where a label may yet turn out to be of no class."""
    sums: Sums = field(default_factory=Sums)
    bad: list[Bad] = field(default_factory=list)


def examine(job: Job) -> Examined:
    """Look at every sample of a shard: decode its image, find its label."""
    found = Examined(job.path.name)
    try:
        with HashedFile(job.path) as file:
            found.bytes = file.size
            if file.error is not None:
                raise file.error
            found.sha256 = file.sha256 or ""
            good = list(_good(file, job, found))
    except UsageError as error:
        found.bad.append(Bad(found.name, "", extract_fault(error)))
        return found
    except OSError as error:
        found.bad.append(Bad(found.name, "", f"cannot be read ({error.strerror})"))
        return found
    _look_at_idx(job.path.with_suffix(".idx"), good, found)
    return found


class Listing(NamedTuple):
    """An `.idx` to write."""

    path: Path
    """The tar."""
    pictures: frozenset[int]
    """Offsets of the images that are in it."""


def list_for_dali(job: Listing) -> str:
    """Write the `.idx` of a shard, and return its SHA-256."""
    with job.path.open("rb", buffering=0) as file:
        samples = [
            sample
            for sample in group_samples(read_members(file, job.path.name))
            if any(part.offset in job.pictures for part in sample.parts)
        ]
    content = format_idx(samples)
    with atomic_write(job.path.with_suffix(".idx")) as out:
        out.write(content)
    return hashlib.sha256(content).hexdigest()


def _good(file: HashedFile, job: Job, found: Examined) -> Iterator[Sample]:
    """Fill in rows and labels, or what is wrong; yield the samples that are fit."""
    rows, codes = [], dict[int | str, int]()
    for sample in filter(has_images, group_samples(read_members(file.stream(), job.path.name))):
        try:
            offset, size, crc, label = _row(file, sample, job, found.sums)
        except (UnfitSample, Undecodable) as error:
            found.bad.append(Bad(found.name, sample.key, str(error)))
            continue
        except OSError as error:
            found.bad.append(Bad(found.name, sample.key, f"it cannot be read ({error.strerror})"))
            continue
        rows.append((0, codes.setdefault(label, len(codes)), offset, size, crc))
        if not job.measured:
            found.keys.append(sample.key)
        yield sample
    found.rows, found.labels = np.array(rows, INDEX_DTYPE), list(codes)


def _row(file: HashedFile, sample: Sample, job: Job, sums: Sums) -> tuple[int, int, int, int | str]:
    """Return offset, size and CRC-32 of an image, and the label as it is written."""
    picture = sample.find_image()
    if picture.size > PICTURE_LIMIT:
        raise UnfitSample(f"its image has {picture.size:,} bytes")
    label = read_label(sample, file.read)
    number = label if job.classes is None else job.classes.number(label)
    if isinstance(number, int) and not 0 <= number < MAX_CLASSES:
        raise UnfitSample(f"label {str(label)[:40]} is no class number")
    if job.classes is not None and isinstance(number, str):
        raise UnfitSample(number)
    data = bytes(file.read(picture.offset, picture.size))
    pixels = decode_image(data)
    if job.measured:
        sums.add(pixels)
    return picture.offset, picture.size, isal_zlib.crc32(data), label


def _look_at_idx(path: Path, good: list[Sample], found: Examined) -> None:
    """Take an `.idx` that is there for what it should be, or say what is wrong with it."""
    if not path.exists():
        return
    content = path.read_bytes()
    try:
        places = parse_idx(content)
    except ValueError as error:
        found.bad.append(Bad(path.name, "", f"is no index of DALI's ({error}); move it away"))
        return
    known = {tuple(one) for one in places}
    if missing := [one for one in locate_files(good) if tuple(one) not in known]:
        where = f"byte {missing[0][0][1]:,}"
        reason = f"is not of {found.name}, where a sample begins at {where}; move it away"
        found.bad.append(Bad(path.name, "", reason))
    found.idx_sha256 = hashlib.sha256(content).hexdigest()


REJECTS = "rejects.jsonl"

_SPLITS = {
    "train": re.compile(r"(^|[-_.])train(ing)?([-_.]|$)"),
    "val": re.compile(r"(^|[-_.])(val|validation)([-_.]|$)"),
}
"""How the names of shards tell their split, unless globs do."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to index, and how."""

    folder: Path
    train: str | None = None
    val: str | None = None
    """Globs over the names of the tars."""
    classes: Path | None = None
    skip_bad: bool = False
    workers: int = 1


@dataclass
class Outcome:
    """What came of it."""

    manifest: Manifest | None = None
    """None: nothing was written, because of what is `bad`."""
    bad: list[Bad] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """Tars of the folder that are in no split."""


def index_folder(request: Request) -> Outcome:
    """Make a folder of shards a data set.

    Raises:
        UsageError: no shards, names that tell no split, a set that is there already, a folder that
            cannot be written, or labels that are no numbers from 0.
        DuetError: a process died.
    """
    folder = request.folder
    _check_folder(folder)
    splits, unused = _shards(request)
    given = None if request.classes is None else Classes(read_classes(request.classes))
    examined, sums = _examine(request, splits, given)
    shards = [one for split in examined.values() for one in split]
    outcome = Outcome(bad=[bad for one in shards for bad in one.bad], unused=unused)
    if any(not bad.key for bad in outcome.bad):
        return outcome
    known = given or Classes.of([one.labels for one in examined["train"]])
    for one in shards:
        outcome.bad += _number(one, known)
    if outcome.bad and not request.skip_bad:
        return outcome
    for name, split in examined.items():
        if not any(len(one.rows) for one in split):
            raise DataError(f"split {name!r} of {folder} has no sample that can be used; repack it")
    used = {name: [one for one in split if len(one.rows)] for name, split in examined.items()}
    outcome.manifest = _seal(request, used, Statistics.of(sums), known.names, outcome.bad)
    return outcome


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder of this machine; name one that holds WebDataset shards (.tar)"
        )
    if (folder / MANIFEST).exists():
        raise UsageError(
            f"{folder} is a data set already; `python -m pipeline.verify {folder}` checks it, and "
            f"without its {MANIFEST} it can be indexed anew"
        )
    ensure_writable(folder, "data set folder")


def _shards(request: Request) -> tuple[dict[str, list[str]], list[str]]:
    """Return the tars of each split by name, and those of none."""
    names = sorted(
        path.name
        for path in request.folder.glob("*.tar")
        if path.is_file() and not path.name.startswith(".")
    )
    splits: dict[str, list[str]] = {}
    for split, glob in (("train", request.train), ("val", request.val)):
        if glob is None and request.train is not None:
            continue  # who names one names all
        chosen = [name for name in names if _belongs(name, split, glob)]
        if glob is not None and not chosen:
            raise UsageError(
                f"--{split} {glob} fits no tar of {request.folder}; it has {_some(names)}"
            )
        if chosen:
            splits[split] = chosen
    if "train" not in splits:
        raise UsageError(
            f"no tar of {request.folder} is named train-*.tar (it has {_some(names)}); "
            "say which are meant by --train GLOB, and --val GLOB"
        )
    if both := sorted(set(splits["train"]) & set(splits.get("val", ()))):
        raise UsageError(f"{both[0]} belongs to train and to val; give other --train and --val")
    used = {name for split in splits.values() for name in split}
    return splits, [name for name in names if name not in used]


def _belongs(name: str, split: str, glob: str | None) -> bool:
    if glob is not None:
        return fnmatch(name, glob)
    return _SPLITS[split].search(name.removesuffix(".tar")) is not None


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "no .tar at all"


def _examine(
    request: Request, splits: dict[str, list[str]], classes: Classes | None
) -> tuple[dict[str, list[Examined]], Sums]:
    """Look at every shard; return what each holds, and the sums over all training images."""
    jobs = [
        Job(request.folder / name, split == "train", classes)
        for split, names in splits.items()
        for name in names
    ]
    total = sum(job.path.stat().st_size for job in jobs) >> 20
    results, sums, bad = [], Sums(), 0
    with Progress("examining", total=total, unit="MiB") as progress:
        for one in map_in_order(examine, jobs, request.workers):
            sums += one.sums
            del one.sums  # 786 kB each
            results.append(one)
            bad += len(one.bad)
            progress.advance(one.bytes >> 20)
            progress.note(f"{bad:,} bad" if bad else "")
    found = iter(results)
    return {split: [next(found) for _ in names] for split, names in splits.items()}, sums


def _number(one: Examined, known: Classes) -> list[Bad]:
    """Turn the labels of a shard into numbers; drop and return the samples that have none."""
    numbers = [known.number(label) for label in one.labels]
    bad = []
    for place, code in enumerate(one.rows["label"].tolist()):
        if isinstance(reason := numbers[code], str):
            bad.append(Bad(one.name, one.keys[place], reason))
    table = np.array([-1 if isinstance(number, str) else number for number in numbers], np.int32)
    if len(table):
        one.rows["label"] = table[one.rows["label"]]
        one.rows = one.rows[one.rows["label"] >= 0]
    return bad


def _seal(
    request: Request,
    used: dict[str, list[Examined]],
    statistics: Statistics,
    classes: tuple[str, ...],
    bad: Sequence[Bad],
) -> Manifest:
    """Write all that makes the shards a data set, the manifest last."""
    folder = request.folder
    rejects = "".join(
        json.dumps({"name": f"{one.shard}/{one.key}", "reason": one.reason}) + "\n" for one in bad
    ).encode()
    _refuse_others(folder, used, statistics, rejects)
    _write_idx(folder, used, request.workers)
    splits = {name: _split(folder, name, split) for name, split in used.items()}
    with atomic_write(folder / REJECTS) as file:
        file.write(rejects)
    manifest = Manifest(
        splits=splits,
        classes=classes,
        seed=0,
        sources={name: f"{len(split)} shards where they lay" for name, split in used.items()},
        plan=_fingerprint(splits, classes),
        stats_sha256=statistics.save(folder),
        rejected=len(bad),
        quality=None,
        foreign=True,
    )
    manifest.save(folder)
    return manifest


def _rows(split: Sequence[Examined]) -> Index:
    for number, one in enumerate(split):
        one.rows["shard"] = number
    return np.concatenate([one.rows for one in split])


def _split(folder: Path, name: str, split: Sequence[Examined]) -> Split:
    return Split(
        shards=tuple(
            Shard(
                name=one.name,
                samples=len(one.rows),
                bytes=one.bytes,
                sha256=one.sha256,
                idx_sha256=one.idx_sha256,
            )
            for one in split
        ),
        index_sha256=save_index(folder, name, _rows(split)),
    )


def _write_idx(folder: Path, used: dict[str, list[Examined]], workers: int) -> None:
    missing = [one for split in used.values() for one in split if not one.idx_sha256]
    jobs = [Listing(folder / one.name, frozenset(one.rows["offset"].tolist())) for one in missing]
    for one, digest in zip(missing, map_in_order(list_for_dali, jobs, workers), strict=True):
        one.idx_sha256 = digest


def _refuse_others(
    folder: Path, used: dict[str, list[Examined]], statistics: Statistics, rejects: bytes
) -> None:
    """Refuse to write over files that are not what would be written (as a killed run leaves)."""
    planned = {STATS: _npz(statistics), REJECTS: rejects}
    for name, split in used.items():
        file = io.BytesIO()
        np.save(file, _rows(split), allow_pickle=False)
        planned[index_name(name)] = file.getvalue()
    for name, content in planned.items():
        path = folder / name
        if path.exists() and sha256(path) != hashlib.sha256(content).hexdigest():
            raise UsageError(f"{path} is there and would be written over; move it away")


def _npz(statistics: Statistics) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **vars(statistics))
    return file.getvalue()


def _fingerprint(splits: dict[str, Split], classes: tuple[str, ...]) -> str:
    parts = [[name, *(shard.sha256 for shard in split.shards)] for name, split in splits.items()]
    return hashlib.sha256(json.dumps([parts, list(classes)]).encode()).hexdigest()


WORKERS = len(os.sched_getaffinity(0))


LISTED = 20
"""Lines about bad samples on the terminal; --json has them all."""


@dataclass(frozen=True, kw_only=True)
class IndexShards:
    """Index shards that another tool made, where they lie."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of the shards (.tar, not compressed); files are added to it, none is changed."""
    train: str | None = None
    """Names of the training shards, with * and ?; else those with `train` in their name."""
    val: str | None = None
    """Names of the validation shards; else those with `val` or `validation`."""
    classes: Path | None = None
    """Class names in the order of their labels: a line each, or a JSON list."""
    skip_bad: bool = False
    """Leave out samples that cannot be used, and list them in DIR/rejects.jsonl."""
    workers: int = WORKERS
    """Processes that read and decode."""
    json: bool = False
    """Print one JSON object on stdout."""


def main() -> int:
    """Index, or say what stands against it."""
    options = tyro.cli(IndexShards, prog="python -m pipeline.index_shards", description=__doc__)
    if not 1 <= options.workers <= 1024:
        raise UsageError(f"--workers {options.workers} is out of range; give 1 to 1024")
    for flag, glob in (("--train", options.train), ("--val", options.val)):
        if glob is not None and "/" in glob:
            raise UsageError(f"{flag} {glob} has a /; give names of files in {options.folder}")
    started = time.monotonic()
    request = Request(
        folder=Path(options.folder),
        train=options.train,
        val=options.val,
        classes=options.classes,
        skip_bad=options.skip_bad,
        workers=options.workers,
    )
    outcome = index_folder(request)
    seconds = time.monotonic() - started
    if options.json:
        sys.stdout.write(json.dumps(_facts(options.folder, outcome, seconds)) + "\n")
    for bad in outcome.bad[:LISTED]:
        sys.stderr.write(f"{bad}\n")
    if (more := len(outcome.bad) - LISTED) > 0:
        sys.stderr.write(f"... and {more:,} more\n")
    if outcome.manifest is None:
        raise DataError(_way_out(options.folder, outcome))
    _tell(options.folder, outcome, seconds)
    return 0


def _facts(folder: str, outcome: Outcome, seconds: float) -> dict[str, object]:
    facts: dict[str, object] = {
        "data": folder,
        "indexed": outcome.manifest is not None,
        "bad": [one._asdict() for one in outcome.bad],
        "unused": outcome.unused,
        "seconds": round(seconds, 3),
    }
    if outcome.manifest is not None:
        splits = outcome.manifest.splits
        facts["samples"] = {name: split.samples for name, split in splits.items()}
        facts["shards"] = {name: len(split.shards) for name, split in splits.items()}
        facts["classes"] = len(outcome.manifest.classes)
    return facts


def _way_out(folder: str, outcome: Outcome) -> str:
    if any(not bad.key for bad in outcome.bad):
        return (
            f"{folder} cannot be indexed, and nothing was written; mend or move away what is named "
            "above"
        )
    count = len(outcome.bad)
    return (
        f"{count:,} {'sample' if count == 1 else 'samples'} of {folder} cannot be trained from as "
        "they are, and nothing was written; leave them out with --skip-bad, or repack with "
        f"`python -m pipeline.build_shards OUT --train {folder}`"
    )


def _tell(folder: str, outcome: Outcome, seconds: float) -> None:
    manifest = outcome.manifest
    assert manifest is not None
    parts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    left_out = f", {manifest.rejected:,} left out (rejects.jsonl)" if manifest.rejected else ""
    unused = f"; {len(outcome.unused)} tars are in no split" if outcome.unused else ""
    count = sum(split.samples for split in manifest.splits.values())
    sys.stderr.write(
        f"data set {folder}: {parts} images of {len(manifest.classes)} classes"
        f"{left_out}{unused}, indexed in {seconds:.1f} s "
        f"({count / max(seconds, 1e-9):,.0f} pictures/s)\n"
    )


if __name__ == "__main__":
    run(main)
