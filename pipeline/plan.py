"""What to pack: the settings of a build, and which picture goes where in which split."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from pipeline.errors import UsageError
from pipeline.picture import Encoding
from pipeline.sources import Picture, Reject, Source, scan


@dataclass(frozen=True, kw_only=True)
class Build:
    """Pack pictures into WebDataset tar shards that Duet, DALI and webdataset all read."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
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
    """Samples in each shard but the last; 1000 raw ones are a tar of 199 MB."""
    encoding: Encoding = "jpeg"
    """How the 256x256 pictures are stored: `jpeg`, or `raw` uint8 pixels (KEY.npy), which need no
    decoding and about eight times the space (197 kB a picture; ImageNet: 255 GB)."""
    quality: int = 90
    """JPEG quality of the stored pictures, 1..100; only for --encoding jpeg."""
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
        if self.encoding == "raw" and self.quality != Build.quality:
            raise UsageError(
                f"--quality {self.quality} says nothing about --encoding raw; leave it out"
            )
        for source in filter(None, (self.train, self.val)):
            if self.out.resolve().is_relative_to(source.resolve()):
                raise UsageError(f"{self.out} lies inside the source {source}; name another OUT")
        if self.val is not None and self.holdout:
            raise UsageError("--val and --holdout exclude each other; give one of them")


@dataclass(frozen=True)
class Plan:
    """Every picture of the set in its place, before any of them has been opened."""

    splits: dict[str, list[Picture]]
    """Per split its pictures in stored order: shuffled over the whole split by the seed."""
    classes: tuple[str, ...]
    rejects: list[Reject]
    """Files left out by their names."""
    fingerprint: str
    """SHA-256 over all that the bytes of the shards depend on, but the pictures' contents."""


def make_plan(options: Build) -> Plan:
    """Scan the sources and put their pictures in order.

    Raises:
        UsageError: a setting or a source that cannot work.
    """
    options.check()
    sources: dict[str, Source] = {"train": scan(options.train)}
    classes = sources["train"].classes
    if options.val is not None:
        sources["val"] = scan(options.val, classes)
    splits = {name: source.pictures for name, source in sources.items()}
    if options.holdout:
        splits["train"], splits["val"] = _hold_out(splits["train"], classes, options)
    splits = {name: _shuffled(pictures, options.seed, name) for name, pictures in splits.items()}
    return Plan(
        splits=splits,
        classes=classes,
        rejects=[reject for source in sources.values() for reject in source.rejects],
        fingerprint=fingerprint(options, splits, classes),
    )


def _hold_out(
    pictures: list[Picture], classes: tuple[str, ...], options: Build
) -> tuple[list[Picture], list[Picture]]:
    """Split each class's pictures by a seeded draw; every class keeps one in each part."""
    parts: tuple[list[Picture], list[Picture]] = ([], [])
    labels = np.array([picture.label for picture in pictures])
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if len(places) < 2:
            raise UsageError(
                f"--holdout needs two pictures a class; class {classes[label]!r} "
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


def fingerprint(options: Build, splits: dict[str, list[Picture]], classes: tuple[str, ...]) -> str:
    """Return `Plan.fingerprint` of settings, the pictures of each split in order, and classes."""
    digest = hashlib.sha256()
    # For JPEGs the quality alone, as before there was a choice: sets of that time stay valid.
    stored = options.quality if options.encoding == "jpeg" else options.encoding
    settings = (options.seed, options.samples_per_shard, stored, list(classes))
    digest.update(json.dumps(settings).encode())
    for name, pictures in splits.items():
        digest.update(name.encode())
        for picture in pictures:
            where = (picture.path, picture.offset, picture.size, picture.label)
            digest.update(repr(where).encode(errors="surrogateescape"))
    return digest.hexdigest()
