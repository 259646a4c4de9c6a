"""Give a folder of WebDataset shards an index and a manifest, so that they train as they are.

    python -m pipeline.index_shards DIR [--train GLOB] [--val GLOB] [--class-names FILE]

For shards that another tool made of JPEGs (`.jpg` or `.jpeg`, with the label in `.cls` or `.json`),
squares of one size or images of many sizes. Every image is decoded once (--decode-every: fewer),
and samples that cannot be trained from are named; then nothing is written, unless --skip-bad.
Images of other kinds need `python -m pipeline.build_shards OUT --train DIR`. No file of DIR is
changed. Added are an `.idx` for each tar that has none, `SPLIT.index.npy`, a table of the
keys, one of each field (--fields), `stats.npz`, `rejects.jsonl` and, last, `manifest.json`.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from isal import isal_zlib

from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.image_stats import SquareSums, Statistics
from pipeline.dataset.images import SIZE, Undecodable, decode_image, measure_jpeg
from pipeline.dataset.index import (
    INDEX_DTYPE,
    MOST_IMAGE_BYTES,
    SIZED_DTYPE,
    Index,
    index_name,
    save_index,
)
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import REJECTS, Manifest, Shard, Split
from pipeline.dataset.members import (
    MEMBER_DTYPE,
    Members,
    escape_line,
    locate_member,
    save_tables,
    unescape_line,
)
from pipeline.dataset.samples import (
    JPEG_ENDINGS,
    MAX_CLASSES,
    TORN,
    Classes,
    Sample,
    UnfitSample,
    find_label,
    find_torn,
    group_samples,
    is_meant,
    read_classes,
)
from pipeline.dataset.shards import find_idx_fault, write_idx
from pipeline.dataset.tar import TarFault, escape, read_members
from pipeline.options import IndexConfig
from pipeline.packing.resize import resample
from pipeline.sources.listing import Reject, summarize_rejects
from pipeline.sources.names import TAR, is_archive
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import DataError, UsageError, run
from pipeline.tools.files import HashedFile, atomic_write, ensure_writable, sha256
from pipeline.tools.processes import map_in_order
from pipeline.tools.progress import Progress

BAD_SHOWN = 20
"""Lines about bad samples on the terminal; --json has them all."""
_SPLITS = {
    "train": re.compile(r"(^|[-_.])train(ing)?([-_.]|$)"),
    "val": re.compile(r"(^|[-_.])(val|validation)([-_.]|$)"),
}
"""Patterns that tell the split of a shard by its name, unless globs are given."""


class BadSample(NamedTuple):
    """A sample that cannot be trained from, or with an empty key a whole shard."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        key = f" key {escape(self.key)}" if self.key else ""
        return f"{escape(self.shard)}{key}: {self.reason}"


@dataclass
class IndexOutcome:
    """Result of indexing a folder."""

    manifest: Manifest | None = None
    """None: nothing was written, because of the samples in `bad`."""
    rest: str = "leave them out with --skip-bad, or"
    """Advice about the samples that are not in `bad`."""
    bad: list[BadSample] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    """Tars and other archives of the folder that are in no split."""
    empty: list[str] = field(default_factory=list)
    """Classes without a training sample."""


class ExamineJob(NamedTuple):
    """One shard to examine."""

    path: Path
    is_training: bool
    """True if the pixels of its images count in the statistics."""
    classes: Classes | None
    """Classes of the data set, where they are known beforehand."""
    config: IndexConfig


@dataclass
class ExaminedShard:
    """Contents of one shard."""

    name: str
    keys: bytes = b""
    """Keys of the rows, as lines of the table of keys."""
    bytes: int = 0
    sha256: str = ""
    idx_sha256: str = ""
    """SHA-256 of the `.idx` beside it, if there is one."""
    rows: Index = field(default_factory=lambda: np.zeros(0, SIZED_DTYPE))
    """Rows of its samples; a label is a place in `labels`, and the shard is number 0."""
    labels: list[int | str] = field(default_factory=list)
    """Distinct labels, as they are written."""
    members: dict[str, Members] = field(default_factory=dict)
    """Rows of each field, `MEMBER_DTYPE`, one for each of `rows`."""
    sums: SquareSums = field(default_factory=SquareSums)
    bad: list[BadSample] = field(default_factory=list)


def index_folder(config: IndexConfig) -> IndexOutcome:
    """Index a folder of shards.

    Raises:
        UsageError: no shards, names that tell no split, a set that is there already, a folder that
            cannot be written, or labels that are no numbers from 0.
        DuetError: a process died.
    """
    folder = Path(config.folder)
    _check_folder(folder)
    splits, unused = _find_shards(config)
    given = None if config.classes is None else Classes(read_classes(config.classes))
    examined, sums = _examine_shards(config, splits, given)
    shards = [one for split in examined.values() for one in split]
    outcome = IndexOutcome(bad=[bad for one in shards for bad in one.bad], unused=unused)
    if any(not bad.key for bad in outcome.bad):
        return outcome
    try:
        known = given or Classes.from_labels([one.labels for one in examined["train"]])
    except UsageError as error:
        if not outcome.bad:
            raise
        outcome.rest = f"without them {error};"
        return outcome
    for one in shards:
        outcome.bad += _number_labels(one, known)
    used = {label for one in examined["train"] for label in one.rows["label"].tolist()}
    outcome.empty = [name for number, name in enumerate(known.names) if number not in used]
    known.refuse_shift(used, (bad.reason for bad in outcome.bad))
    if outcome.bad and not config.skip_bad:
        return outcome
    kept = {name: [one for one in split if len(one.rows)] for name, split in examined.items()}
    if empty := [name for name, split in kept.items() if not split]:
        why = _summarize(outcome.bad)
        raise DataError(f"split {empty[0]!r} of {folder} has no sample that can be used: {why}")
    outcome.manifest = _seal(config, kept, sums, known.names, outcome.bad)
    return outcome


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder of this machine; name one that holds WebDataset shards (.tar)"
        )
    if (folder / MANIFEST).exists():
        raise UsageError(
            f"{folder} is a data set already; `duet verify {folder}` checks it, and "
            f"without its {MANIFEST} it can be indexed anew"
        )
    ensure_writable(folder, "data set folder")


def _find_shards(config: IndexConfig) -> tuple[dict[str, list[str]], list[str]]:
    """Return the names of the archives of each split, and of those in no split."""
    files = filter(Path.is_file, Path(config.folder).glob("[!.]*"))
    names = sorted(path.name for path in files if is_archive(path.name))
    splits: dict[str, list[str]] = {}
    for split, glob in (("train", config.train), ("val", config.val)):
        if glob is None and config.train is not None:
            continue  # --train alone: a set without validation
        if glob is None:
            chosen = [name for name in names if _SPLITS[split].search(name.removesuffix(".tar"))]
        else:
            chosen = fnmatch.filter(names, glob)
        if glob is not None and not chosen:
            raise UsageError(
                f"--{split} {glob} fits no tar of {config.folder}; it has {_name_some(names)}"
            )
        if chosen:
            splits[split] = chosen
    if "train" not in splits:
        raise UsageError(
            f"no tar of {config.folder} is named train-*.tar (it has {_name_some(names)}); "
            "say which are meant by --train GLOB, and --val GLOB"
        )
    if both := sorted(set(splits["train"]) & set(splits.get("val", ()))):
        raise UsageError(f"{both[0]} belongs to train and to val; give other --train and --val")
    used = {name for split in splits.values() for name in split}
    return splits, [name for name in names if name not in used]


def _name_some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "no .tar at all"


def _examine_shards(
    config: IndexConfig, splits: dict[str, list[str]], classes: Classes | None
) -> tuple[dict[str, list[ExaminedShard]], SquareSums]:
    """Examine every shard; return the contents of each, and the sums over all training images."""
    jobs = [
        ExamineJob(Path(config.folder) / name, split == "train", classes, config)
        for split, names in splits.items()
        for name in names
    ]
    total = sum(job.path.stat().st_size for job in jobs) >> 20
    results, sums, bad = [], SquareSums(), 0
    with Progress("examining", total=total, unit="MiB") as progress:
        for one in map_in_order(examine_shard, jobs, config.workers):
            sums.merge(one.sums)
            del one.sums  # 786 kB each
            results.append(one)
            bad += len(one.bad)
            progress.advance(one.bytes >> 20)
            progress.note(f"{bad:,} bad" if bad else "")
    found = iter(results)
    return {split: [next(found) for _ in names] for split, names in splits.items()}, sums


def _number_labels(one: ExaminedShard, known: Classes) -> list[BadSample]:
    """Turn the labels of a shard into numbers; drop and return the samples that have none."""
    numbers = [known.find_number(label) for label in one.labels]
    bad, keys = [], one.keys.splitlines(keepends=True)
    for place, code in enumerate(one.rows["label"].tolist()):
        if isinstance(reason := numbers[code], str):
            bad.append(BadSample(one.name, unescape_line(keys[place]), reason))
    table = np.array([-1 if isinstance(number, str) else number for number in numbers], np.int32)
    if len(table):
        one.rows["label"] = table[one.rows["label"]]
    if bad:
        kept = one.rows["label"] >= 0
        one.rows, one.keys = one.rows[kept], b"".join(compress(keys, kept))
        one.members = {name: rows[kept] for name, rows in one.members.items()}
    return bad


def examine_shard(job: ExamineJob) -> ExaminedShard:
    """Decode the image and read the label of every sample of a shard."""
    found = ExaminedShard(job.path.name)
    if not found.name.endswith(TAR):
        reason = "by its name no plain tar, which ends in .tar; unpack or rename it"
        found.bad.append(BadSample(found.name, "", reason))
        return found
    try:
        with HashedFile(job.path) as file:
            found.bytes = file.size
            if file.error is not None:
                raise file.error
            found.sha256 = file.sha256 or ""
            good = list(_examine_samples(file, job, found))
    except (TarFault, OSError) as error:
        if isinstance(error, OSError):
            reason = f"cannot be read ({error.strerror})"
        else:
            reason = error.reason
        found.bad.append(BadSample(found.name, "", reason))
        return found
    idx = job.path.with_suffix(".idx")
    if idx.exists():
        content = idx.read_bytes()
        found.idx_sha256 = hashlib.sha256(content).hexdigest()
        if fault := find_idx_fault(content, found.name, good):
            found.bad.append(BadSample(idx.name, "", f"{fault}; move it away"))
    return found


def _examine_samples(file: HashedFile, job: ExamineJob, found: ExaminedShard) -> Iterator[Sample]:
    """Fill in rows and labels, or the bad samples; yield the samples that can be trained from."""
    rows, keys, codes = [], list[bytes](), dict[int | str, int]()
    members = {name: list[tuple[int, int, int]]() for name in job.config.fields}
    unfit: list[tuple[str, UnfitSample]] = []
    samples = filter(is_meant, group_samples(read_members(file.stream(), job.path.name)))
    for place, sample in enumerate(samples):
        decode = place % job.config.decode_every == 0
        try:
            others = {name: locate_member(sample, name, file.read) for name in job.config.fields}
            row = _examine_sample(file, sample, job, found.sums, decode)
        except (UnfitSample, Undecodable, OSError) as error:
            reason = str(error)
            if isinstance(error, UnfitSample):
                unfit.append((sample.key, error))
            elif isinstance(error, OSError):
                reason = f"it cannot be read ({error.strerror})"
            found.bad.append(BadSample(found.name, sample.key, reason))
            continue
        rows.append((0, codes.setdefault(row[-1], len(codes)), *row[:-1]))
        keys.append(escape_line(sample.key))
        for name, other in others.items():
            members[name].append(other)
        yield sample
    if torn := find_torn(unfit):
        found.bad = [bad._replace(reason=TORN) if bad.key in torn else bad for bad in found.bad]
    found.rows, found.labels = np.array(rows, SIZED_DTYPE), list(codes)
    found.keys = b"".join(keys)
    found.members = {name: np.array(places, MEMBER_DTYPE) for name, places in members.items()}


def _examine_sample(
    file: HashedFile, sample: Sample, job: ExamineJob, sums: SquareSums, decode: bool
) -> tuple[int, int, int, int, int, int | str]:
    """Return offset, size, CRC-32, width and height of an image, and the label as it is written."""
    image = sample.find_image()
    if image.kind not in JPEG_ENDINGS:
        raise UnfitSample(f"its image is a .{escape(image.ending)}, no .jpg or .jpeg")
    if image.size > MOST_IMAGE_BYTES:
        raise UnfitSample(f"its image has {image.size:,} bytes")
    label = find_label(sample, file.read).label
    number = label if job.classes is None else job.classes.find_number(label)
    if isinstance(number, int) and not 0 <= number < MAX_CLASSES:
        raise UnfitSample(f"label {str(label)[:40]} is no class number")
    if job.classes is not None and isinstance(number, str):
        raise UnfitSample(number)
    data = bytes(file.read(image.offset, image.size))
    pixels = decode_image(data, size=None) if decode else None
    height, width = measure_jpeg(data) if pixels is None else pixels.shape[:2]
    sums.add_size(height, width)
    if job.is_training and pixels is not None:
        sums.add(pixels, pixels if (height, width) == (SIZE, SIZE) else resample(pixels))
    return image.offset, image.size, isal_zlib.crc32(data), width, height, label


def _seal(
    config: IndexConfig,
    used: dict[str, list[ExaminedShard]],
    sums: SquareSums,
    classes: tuple[str, ...],
    bad: Sequence[BadSample],
) -> Manifest:
    """Write the files that make the shards a data set, the manifest last."""
    folder = Path(config.folder)
    rejects = "".join(
        json.dumps({"name": f"{one.shard}/{one.key}", "reason": one.reason}) + "\n" for one in bad
    ).encode()
    statistics = Statistics.from_sums(sums.sums)
    dtype = INDEX_DTYPE if sums.side else SIZED_DTYPE
    indexes = {name: _join_rows(split, dtype) for name, split in used.items()}
    with TemporaryDirectory() as scratch:
        tables = {
            name: save_tables(
                Path(scratch), name, [one.keys for one in split], [one.members for one in split]
            )
            for name, split in used.items()
        }
        _refuse_other_files(folder, indexes, statistics, rejects, Path(scratch))
        for path in Path(scratch).iterdir():
            with path.open("rb") as source, atomic_write(folder / path.name) as file:
                shutil.copyfileobj(source, file, 1 << 20)
    missing = [one for split in used.values() for one in split if not one.idx_sha256]
    places = [(folder / one.name, frozenset(one.rows["offset"].tolist())) for one in missing]
    written = map_in_order(write_idx, places, config.workers)
    for one, digest in zip(missing, written, strict=True):
        one.idx_sha256 = digest
    splits = {
        name: Split(
            shards=tuple(map(_to_shard, split)),
            index_sha256=save_index(folder, name, indexes[name]),
            tables=tables[name],
        )
        for name, split in used.items()
    }
    hashes = [[name, *(one.sha256 for one in split)] for name, split in used.items()]
    with atomic_write(folder / REJECTS) as file:
        file.write(rejects)
    manifest = Manifest(
        splits=splits,
        classes=classes,
        seed=0,
        sources={name: f"{len(split)} shards where they lay" for name, split in used.items()},
        plan=hashlib.sha256(json.dumps([hashes, list(classes)]).encode()).hexdigest(),
        stats_sha256=statistics.save(folder),
        rejected=len(bad),
        image_size=sums.side or None,
        fit="square" if sums.side else "none",
        quality=None,
        foreign=True,
    )
    manifest.save(folder)
    return manifest


def _join_rows(split: Sequence[ExaminedShard], dtype: np.dtype[np.void]) -> Index:
    for number, one in enumerate(split):
        one.rows["shard"] = number
    return np.concatenate([one.rows for one in split])[list(dtype.names or ())].astype(dtype)


def _to_shard(one: ExaminedShard) -> Shard:
    return Shard(
        name=one.name,
        samples=len(one.rows),
        bytes=one.bytes,
        sha256=one.sha256,
        idx_sha256=one.idx_sha256,
    )


def _refuse_other_files(
    folder: Path,
    indexes: dict[str, Index],
    statistics: Statistics,
    rejects: bytes,
    tables: Path,
) -> None:
    """Refuse to overwrite files, unless a killed run left them with the same content.

    `tables` is the folder with the tables that would be written.
    """
    planned = {STATS: io.BytesIO(), REJECTS: io.BytesIO(rejects)}
    np.savez(planned[STATS], allow_pickle=False, **vars(statistics))
    for split, rows in indexes.items():
        np.save(planned.setdefault(index_name(split), io.BytesIO()), rows, allow_pickle=False)
    digests = {
        name: hashlib.sha256(content.getvalue()).hexdigest() for name, content in planned.items()
    }
    digests |= {path.name: sha256(path) for path in tables.iterdir()}
    for name, digest in digests.items():
        path = folder / name
        if path.exists() and sha256(path) != digest:
            raise UsageError(f"{path} is there and would be written over; move it away")


def main(argv: list[str] | None = None) -> int:
    """Index a folder, and report what was written or why nothing was."""
    config = parse_options(IndexConfig, argv, "python -m pipeline.index_shards")
    config.check()
    started = time.monotonic()
    outcome = index_folder(config)
    seconds = time.monotonic() - started
    if config.json:
        sys.stdout.write(json.dumps(_index_facts(config.folder, outcome, seconds)) + "\n")
    for bad in outcome.bad[:BAD_SHOWN]:
        sys.stderr.write(f"{bad}\n")
    if (more := len(outcome.bad) - BAD_SHOWN) > 0:
        sys.stderr.write(f"... and {more:,} more\n")
    if (manifest := outcome.manifest) is None:
        raise DataError(_describe_failure(config, outcome))
    parts = ", ".join(f"{split.samples:,} {name}" for name, split in manifest.splits.items())
    skipped = f", {manifest.rejected:,} skipped ({REJECTS})" if manifest.rejected else ""
    unused = ""
    if outcome.unused:
        unused = f"; {len(outcome.unused)} archives are in no split ({_name_some(outcome.unused)})"
    empty = f"; no training image of class {_name_some(outcome.empty)}" if outcome.empty else ""
    count = sum(split.samples for split in manifest.splits.values())
    sys.stderr.write(
        f"data set {config.folder}: {parts} images of {len(manifest.classes)} classes"
        f"{skipped}{unused}{empty}, indexed in {seconds:.1f} s "
        f"({count / max(seconds, 1e-9):,.0f} images/s)\n"
    )
    return 0


def _index_facts(folder: str, outcome: IndexOutcome, seconds: float) -> dict[str, object]:
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


def _describe_failure(config: IndexConfig, outcome: IndexOutcome) -> str:
    folder, fields = config.folder, " ".join(config.fields)
    if any(not bad.key for bad in outcome.bad):
        return f"{folder} cannot be indexed, nothing was written; mend or move what is named above"
    what = "sample" if len(outcome.bad) == 1 else "samples"
    return (
        f"{len(outcome.bad):,} {what} of {folder} cannot be trained from as they are, and nothing "
        f"was written; most often: {_summarize(outcome.bad)}; {outcome.rest} repack with "
        f"`duet build-shards OUT --train {folder}{f' --fields {fields}' if fields else ''}`"
    )


def _summarize(bad: Iterable[BadSample]) -> str:
    return summarize_rejects(Reject(f"{one.shard} key {one.key}", one.reason) for one in bad)


if __name__ == "__main__":
    run(main)
