"""A folder of WebDataset shards of 256x256 JPEGs -> a data set, without repacking.

Nothing that is there is changed. Beside the tars come an `.idx` each (one that is there is kept),
`SPLIT.index.npy`, `stats.npz`, `rejects.jsonl` and, last, `manifest.json`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.image_stats import Statistics, Sums
from pipeline.dataset.index import Index, index_name, save_index
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import Manifest, Shard, Split
from pipeline.indexing.examine import Bad, Examined, Job, Listing, examine, list_for_dali
from pipeline.indexing.names import Classes, read_classes
from pipeline.shard_pool import in_order
from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.files import sealed, sha256, writable_folder
from pipeline.tools.progress import Progress

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
    writable_folder(folder, "data set folder")


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
    """Look at every shard; return what each holds, and the sums over all training pictures."""
    jobs = [
        Job(request.folder / name, split == "train", classes)
        for split, names in splits.items()
        for name in names
    ]
    total = sum(job.path.stat().st_size for job in jobs) >> 20
    results, sums, bad = [], Sums(), 0
    with Progress("examining", total=total, unit="MiB") as progress:
        for one in in_order(examine, jobs, request.workers):
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
    with sealed(folder / REJECTS) as file:
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
    for one, digest in zip(missing, in_order(list_for_dali, jobs, workers), strict=True):
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
