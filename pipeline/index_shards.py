"""Give a folder of WebDataset shards an index and a manifest, so that they train as they are.

    python -m pipeline.index_shards DIR [--train GLOB] [--val GLOB] [--class-names FILE]
    python -m pipeline.index_shards hf://datasets/OWNER/NAME --out DATA

For shards that another tool made of JPEGs (`.jpg` or `.jpeg`, with the label in `.cls` or `.json`),
squares of one size or images of many sizes. Every image is decoded once (--decode-every: fewer),
and samples that cannot be trained from are named; then nothing is written, unless --skip-bad.
Images of other kinds need `python -m pipeline.build_shards OUT --train DIR`. No file of DIR is
changed. Added are an `.idx` for each tar that has none, `SPLIT.index.npy`, a table of the
keys, one of each field (--fields), `stats.npz`, `rejects.jsonl` and, last, `manifest.json`.

DIR may be an address, and --out another folder for what is added: then its manifest names the
address, and the shards are read from there.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pipeline.dataset.image_stats import SquareSums, Statistics
from pipeline.dataset.index import INDEX_DTYPE, SIZED_DTYPE, Index, save_index
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import REJECTS, Manifest, Shard, Split
from pipeline.dataset.members import save_tables
from pipeline.dataset.samples import Classes, read_classes
from pipeline.options import IndexConfig
from pipeline.packing.foreign_shards import (
    BadSample,
    ExaminedShard,
    ExamineJob,
    examine_shard,
    idx_name,
)
from pipeline.packing.shards import copy_file
from pipeline.remote.filesystem import is_remote, is_web, local_path, temporary_space
from pipeline.remote.target import FolderTarget, Target, is_finished, open_target
from pipeline.sources.listing import Reject, summarize_rejects
from pipeline.sources.names import is_archive
from pipeline.sources.paths import base_name, expand_braces, list_folder
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import DataError, UsageError, run
from pipeline.tools.files import ensure_writable, is_plain_name, sha256
from pipeline.tools.processes import map_in_order
from pipeline.tools.progress import Progress
from pipeline.tools.text import hide_credentials

BAD_SHOWN = 20
"""Lines about bad samples on the terminal; --json has them all."""
_SPLITS = {
    "train": re.compile(r"(^|[-_.])train(ing)?([-_.]|$)"),
    "val": re.compile(r"(^|[-_.])(val|validation)([-_.]|$)"),
}
"""Patterns that tell the split of a shard by its name, unless globs are given."""


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


def index_folder(config: IndexConfig) -> IndexOutcome:
    """Index a folder of shards, or shards at an address.

    Raises:
        UsageError: no shards, names that tell no split, a set that is there already, a folder that
            cannot be written, or labels that are no numbers from 0.
        StoreError: the store does not answer.
        DuetError: a process died.
    """
    target = _open_target(config)
    with temporary_space("the index"), TemporaryDirectory(prefix="duet-") as folder:
        return _index(config, target, Path(folder))


def _index(config: IndexConfig, target: Target, scratch: Path) -> IndexOutcome:
    names = _list_files(config)
    splits, unused = _find_shards(config, sorted(filter(is_archive, names)))
    given = None if config.classes is None else Classes(read_classes(config.classes))
    there = frozenset(names if config.out is None else ())
    examined, sums = _examine_shards(config, splits, given, scratch, there)
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
        outcome.bad += one.number_labels(known, scratch)
    used = {label for one in examined["train"] for label in one.rows["label"].tolist()}
    outcome.empty = [name for number, name in enumerate(known.names) if number not in used]
    known.refuse_shift(used, (bad.reason for bad in outcome.bad))
    if outcome.bad and not config.skip_bad:
        return outcome
    kept = {name: [one for one in split if len(one.rows)] for name, split in examined.items()}
    if empty := [name for name, split in kept.items() if not split]:
        why = _summarize(outcome.bad)
        raise DataError(
            f"split {empty[0]!r} of {_name_folder(config)} has no sample that can be used: {why}"
        )
    outcome.manifest = _seal(config, kept, sums, known.names, outcome.bad, target, scratch)
    return outcome


def _name_folder(config: IndexConfig) -> str:
    """Return the place of the shards for messages."""
    return hide_credentials(config.folder)


def _open_target(config: IndexConfig) -> Target:
    """Return where the files are written: beside the shards, or --out.

    Raises:
        UsageError: it cannot be written, or holds a data set.
    """
    address, safe = config.folder, _name_folder(config)
    if not is_remote(address):
        if config.out is not None:
            raise UsageError(f"--out is for shards at an address; those in {address} need none")
        if not local_path(address).is_dir():
            raise UsageError(
                f"{address} is no folder of this machine; name one that holds WebDataset shards "
                "(.tar)"
            )
    elif safe != address:
        raise UsageError(
            f"{safe} would stand in the manifest with its credentials; give it without, and them "
            "by the environment"
        )
    elif config.out is None and (is_web(address) or address.startswith("hf://")):
        raise UsageError(f"{safe} takes no files; name a folder for the index with --out")
    target = open_target(config.data)
    if is_finished(target):
        raise UsageError(
            f"{target.address} is a data set already; `duet verify {target.address}` checks it, "
            f"and without its {MANIFEST} it can be indexed anew"
        )
    if isinstance(target, FolderTarget):
        ensure_writable(target.path, "data set folder")
    return target


def _list_files(config: IndexConfig) -> list[str]:
    """Return the names of the files where the shards are, hidden ones left out."""
    if not is_remote(config.folder):
        return [one.name for one in local_path(config.folder).glob("[!.]*") if one.is_file()]
    if not is_web(config.folder):
        found = map(base_name, list_folder(config.folder.rstrip("/")))
        return [name for name in found if is_plain_name(name)]
    masks = [mask for glob in (config.train, config.val) if glob for mask in expand_braces(glob)]
    if not masks or any(mark in mask for mask in masks for mark in "*?["):
        raise UsageError(
            f"{_name_folder(config)}: a web server has no list of its files; name the shards, such "
            "as --train 'train-{000000..000146}.tar'"
        )
    if odd := [mask for mask in masks if not is_plain_name(mask)]:
        raise UsageError(
            f"{odd[0]} is no name of a file in {_name_folder(config)}: shards lie in one folder; "
            "give its address as DIR"
        )
    return list(dict.fromkeys(masks))


def _find_shards(config: IndexConfig, names: list[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the names of the archives of each split, and of those in no split."""
    where, splits = _name_folder(config), dict[str, list[str]]()
    for split, glob in (("train", config.train), ("val", config.val)):
        if glob is None and config.train is not None:
            continue  # --train alone: a set without validation
        if glob is None:
            chosen = [name for name in names if _SPLITS[split].search(name.removesuffix(".tar"))]
        else:
            masks = expand_braces(glob)
            fitting = {one for mask in masks for one in fnmatch.filter(names, mask)}
            chosen = [name for name in names if name in fitting]
        if glob is not None and not chosen:
            raise UsageError(f"--{split} {glob} fits no tar of {where}; it has {_name_some(names)}")
        if chosen:
            splits[split] = chosen
    if "train" not in splits:
        raise UsageError(
            f"no tar of {where} is named train-*.tar (it has {_name_some(names)}); "
            "say which are meant by --train GLOB, and --val GLOB"
        )
    if both := sorted(set(splits["train"]) & set(splits.get("val", ()))):
        raise UsageError(f"{both[0]} belongs to train and to val; give other --train and --val")
    used = {name for split in splits.values() for name in split}
    return splits, [name for name in names if name not in used]


def _name_some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])]) or "no .tar at all"


def _examine_shards(
    config: IndexConfig,
    splits: dict[str, list[str]],
    classes: Classes | None,
    scratch: Path,
    there: frozenset[str],
) -> tuple[dict[str, list[ExaminedShard]], SquareSums]:
    """Examine every shard; return the contents of each, and the sums over all training images.

    Args:
        config: the settings.
        splits: names of the shards of each split.
        classes: classes of the data set, where they are known beforehand.
        scratch: local folder for the `.idx` of each shard.
        there: names of files beside the shards, among them `.idx` that are kept.
    """
    remote = is_remote(config.folder)
    folder = config.folder if remote else str(local_path(config.folder))
    jobs = [
        ExamineJob(
            folder=folder,
            name=name,
            is_training=split == "train",
            classes=classes,
            config=config,
            scratch=scratch,
            has_idx=idx_name(name) in there,
        )
        for split, names in splits.items()
        for name in names
    ]
    total = len(jobs)
    if not remote:
        total = sum((Path(folder) / job.name).stat().st_size for job in jobs) >> 20
    results, sums, bad = [], SquareSums(), 0
    with Progress("examining", total=total, unit="shards" if remote else "MiB") as progress:
        for one in map_in_order(examine_shard, jobs, config.workers):
            sums.merge(one.sums)
            del one.sums  # 786 kB each
            results.append(one)
            bad += len(one.bad)
            progress.advance(1 if remote else one.bytes >> 20)
            progress.note(f"{bad:,} bad" if bad else "")
    found = iter(results)
    return {split: [next(found) for _ in names] for split, names in splits.items()}, sums


def _seal(
    config: IndexConfig,
    used: dict[str, list[ExaminedShard]],
    sums: SquareSums,
    classes: tuple[str, ...],
    bad: Sequence[BadSample],
    target: Target,
    scratch: Path,
) -> Manifest:
    """Write the files that make the shards a data set, the manifest last."""
    (folder := scratch / "set").mkdir()
    dtype, statistics = INDEX_DTYPE if sums.side else SIZED_DTYPE, Statistics.from_sums(sums.sums)
    (folder / REJECTS).write_text(
        "".join(
            json.dumps({"name": f"{one.shard}/{one.key}", "reason": one.reason}) + "\n"
            for one in bad
        )
    )
    splits = {}
    for name, split in used.items():
        keys, members = [one.keys for one in split], [one.members for one in split]
        splits[name] = Split(
            shards=tuple(_to_shard(one, scratch) for one in split),
            index_sha256=save_index(folder, name, _join_rows(split, dtype)),
            tables=save_tables(folder, name, keys, members),
        )
    hashes = [[name, *(one.sha256 for one in split)] for name, split in used.items()]
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
        shards_at=None if config.out is None else config.folder.rstrip("/"),
    )
    files = sorted(folder.iterdir())
    _refuse_other_files(target, files)
    shards = chain.from_iterable(used.values())
    files += [scratch / idx_name(one.name) for one in shards if not one.idx_sha256]
    for path in files:
        copy_file(path, target, path.name)
    with target.create(MANIFEST) as file:
        file.write(manifest.text())
    return manifest


def _join_rows(split: Sequence[ExaminedShard], dtype: np.dtype[np.void]) -> Index:
    for number, one in enumerate(split):
        one.rows["shard"] = number
    return np.concatenate([one.rows for one in split])[list(dtype.names or ())].astype(dtype)


def _to_shard(one: ExaminedShard, scratch: Path) -> Shard:
    return Shard(
        name=one.name,
        samples=len(one.rows),
        bytes=one.bytes,
        sha256=one.sha256,
        idx_sha256=one.idx_sha256 or sha256(scratch / idx_name(one.name)),
    )


def _refuse_other_files(target: Target, files: Iterable[Path]) -> None:
    """Refuse to overwrite files, unless a killed run left them with the same content."""
    for path in files:
        size = target.size(path.name)
        same = size == path.stat().st_size and target.read(path.name) == path.read_bytes()
        if size is None or same:
            continue
        raise UsageError(
            f"{target.address}/{path.name} is there and would be written over; move it away"
        )


def main(argv: list[str] | None = None) -> int:
    """Index a folder, and report what was written or why nothing was."""
    config = parse_options(IndexConfig, argv, "python -m pipeline.index_shards")
    config.check()
    started = time.monotonic()
    outcome = index_folder(config)
    seconds = time.monotonic() - started
    if config.json:
        sys.stdout.write(json.dumps(_index_facts(config.data, outcome, seconds)) + "\n")
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
        f"data set {config.data}: {parts} images of {len(manifest.classes)} classes"
        f"{skipped}{unused}{empty}, indexed in {seconds:.1f} s "
        f"({count / max(seconds, 1e-9):,.0f} images/s)\n"
    )
    return 0


def _index_facts(data: str, outcome: IndexOutcome, seconds: float) -> dict[str, object]:
    facts: dict[str, object] = {
        "data": data,
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
    folder, fields = _name_folder(config), " ".join(config.fields)
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
