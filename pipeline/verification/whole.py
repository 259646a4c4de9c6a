"""A whole data set, checked on all cores."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from pipeline.dataset.check import Job, check_shard
from pipeline.dataset.manifest import Manifest
from pipeline.indexing.names import Classes
from pipeline.shard_pool import in_order
from pipeline.tools.progress import Progress
from pipeline.verification.beside import index_damage, list_damage, stats_damage, strangers
from pipeline.verification.described import manifest_damage
from pipeline.verification.findings import Damage

BYTES_A_SECOND, DECODED_A_SECOND = 400e6, 1500
"""About what one process checks and decodes, to tell whether helpers are worth their start."""
STARTED_IN = 2.0
"""Seconds of work that no helper process is started for."""


@dataclass
class Report:
    """What a check has found."""

    damage: list[Damage] = field(default_factory=list)
    """Empty: the set is sound."""
    notes: list[str] = field(default_factory=list)
    """Names of files in the folder that are no part of the set."""
    bytes: int = 0
    """Of the shards, read."""
    pictures: int = 0
    """In those shards, by the manifest."""


def check(data: Path, *, decode: bool = False, workers: int | None = None) -> Report:
    """Check all of a data set.

    Args:
        data: its folder.
        decode: decode every picture, too.
        workers: processes; by default as many as there are cores, and none for a small set.

    Raises:
        UsageError: `data` holds no data set.
        DataError: the manifest itself cannot be read.
        DuetError: a process died.
    """
    manifest = Manifest.load(data)
    report = Report(damage=manifest_damage(manifest))
    if report.damage:
        return report  # where it says the files are, nobody should look
    report.notes = strangers(data, manifest)
    report.damage += stats_damage(data, manifest) + list_damage(data, manifest)
    sound = set()
    for name, split in manifest.splits.items():
        found = index_damage(data, name, split)
        report.damage += found
        if not found:
            sound.add(name)
    jobs = list(_jobs(data, manifest, sound, decode))
    total = sum(job.shard.bytes for job in jobs)
    if workers is None:
        workers = _workers(manifest, total, decode)
    with Progress("checking", total=total >> 20, unit="MiB") as progress:
        for job, checked in zip(jobs, in_order(check_shard, jobs, workers), strict=True):
            report.damage += checked.damage
            report.bytes += checked.bytes
            report.pictures += job.shard.samples if checked.bytes else 0
            progress.advance(job.shard.bytes >> 20)
            progress.note(f"{len(report.damage):,} damaged" if report.damage else "")
    return report


def _workers(manifest: Manifest, total: int, decode: bool) -> int:
    pictures = sum(split.samples for split in manifest.splits.values()) if decode else 0
    seconds = total / BYTES_A_SECOND + pictures / DECODED_A_SECOND
    return 1 if seconds < STARTED_IN else len(os.sched_getaffinity(0))


def _jobs(data: Path, manifest: Manifest, sound: set[str], decode: bool) -> Iterator[Job]:
    classes = Classes(manifest.classes)
    for name, split in manifest.splits.items():
        starts = accumulate((shard.samples for shard in split.shards[:-1]), initial=0)
        for number, (shard, start) in enumerate(zip(split.shards, starts, strict=True)):
            yield Job(
                data=data,
                split=name,
                number=number,
                shard=shard,
                start=start,
                indexed=name in sound,
                classes=classes,
                encoding=manifest.encoding,
                foreign=manifest.foreign,
                decode=decode,
            )
