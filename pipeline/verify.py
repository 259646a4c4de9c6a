"""Check a sealed dataset against its manifest, byte for byte, or prove what was delivered of it.

    python -m pipeline.verify DATA
    python -m pipeline.verify DATA --decode
    python -m pipeline.verify --ledger RUN

Every shard is read once: its SHA-256, every member of the tar, every row of the index, every label
and every image's CRC-32 are checked, and damage is named by shard, sample and key. --decode
decodes every image as well. With --ledger, the ledgers of a run are read instead: was each epoch
delivered exactly once? Exit code 0: sound. 4: damaged, or not exactly once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from pipeline.dataset.check import (
    CheckJob,
    DamageRow,
    check_index,
    check_lists,
    check_shard,
    check_stats,
    check_tables,
    make_damage_row,
)
from pipeline.dataset.index import map_index
from pipeline.dataset.manifest import Manifest, find_root
from pipeline.dataset.members import list_fields
from pipeline.dataset.samples import Classes
from pipeline.dataset.tar import escape
from pipeline.dataset.versions import (
    Version,
    Withdrawn,
    find_unknown_files,
    list_versions,
    load_withdrawn,
    locate_version,
    parse_version,
    read_local,
)
from pipeline.options import Verify
from pipeline.remote.dataset import locate_dataset
from pipeline.remote.filesystem import is_remote, local_path
from pipeline.stream.ledger.proof import prove
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import REBUILD, DamagedFile, DataError, UsageError, run
from pipeline.tools.processes import map_in_order
from pipeline.tools.progress import Progress
from pipeline.tools.text import human_bytes
from pipeline.tools.units import cpu_count

BYTES_A_SECOND, DECODED_A_SECOND = 400e6, 1500
"""Rough rates of one process, to decide whether helpers are worth their start."""
LISTED = 100
"""Lines about damage on the terminal; --json has them all."""
WORTH_HELPERS = 2.0
"""Seconds of work below which no helper process is started."""


@dataclass
class VerificationReport:
    """Damage found by a check, and what was read."""

    damage: list[DamageRow] = field(default_factory=list)
    """Damaged places; empty if the dataset is sound."""
    notes: list[str] = field(default_factory=list)
    """Names of files in the folder that are not part of the dataset."""
    unpurged: list[str] = field(default_factory=list)
    """Names of the shards that a purge which was cut short has not reached."""
    bytes: int = 0
    """Number of bytes read, of shards."""
    images: int = 0
    """Number of images in those shards, by the manifest."""


def check(
    data: Path, *, decode: bool = False, workers: int | None = None, version: Version = None
) -> VerificationReport:
    """Check all of a version of a dataset.

    Args:
        data: folder of the dataset.
        decode: decode every image, too.
        workers: number of processes; by default one per core, and none for a small dataset.
        version: number or identity of the version; None: the newest.

    Raises:
        UsageError: `data` holds no dataset, or no such version.
        DuetError: a process died.
    """
    root = find_root(data)
    try:
        data = locate_version(data, version)
        manifest, versions = Manifest.load(data), list(list_versions(read_local(root), str(root)))
        newest = versions[0].manifest
        withdrawn = load_withdrawn(root, newest)
    except DamagedFile as error:  # where it says the files are, nobody should look
        name = os.path.relpath(error.path, root)
        return VerificationReport([make_damage_row(name, error.reason)])
    if manifest.shards_at is not None:
        raise UsageError(
            f"verify reads local shards, and those of {root} lie at {manifest.shards_at}; each is "
            "checked when it is fetched"
        )
    report = VerificationReport()
    report.notes = find_unknown_files(root, versions)
    report.damage += check_stats(data, manifest) + check_lists(data, manifest)
    sound: dict[str, tuple[str, ...]] = {}
    for name in manifest.splits:
        found = check_index(data, name, manifest)
        others = check_tables(data, name, manifest, indexed=not found)
        report.damage += found + others
        if not found:
            sound[name] = () if others else tuple(manifest.splits[name].tables)
    jobs = list(_list_jobs(root, manifest, sound, decode, newest, withdrawn))
    total = sum(job.shard.bytes for job in jobs)
    if workers is None:
        workers = _choose_workers(manifest, total, decode)
    with Progress("checking", total=total >> 20, unit="MiB") as progress:
        for job, checked in zip(jobs, map_in_order(check_shard, jobs, workers), strict=True):
            report.damage += checked.damage
            report.bytes += checked.bytes
            report.images += job.shard.samples if checked.bytes else 0
            report.unpurged += [job.shard.name] if checked.is_unpurged else []
            progress.advance(job.shard.bytes >> 20)
            progress.note(f"{len(report.damage):,} damaged" if report.damage else "")
    return report


def _choose_workers(manifest: Manifest, total: int, decode: bool) -> int:
    images = sum(split.samples for split in manifest.splits.values()) if decode else 0
    seconds = total / BYTES_A_SECOND + images / DECODED_A_SECOND
    return 1 if seconds < WORTH_HELPERS else cpu_count()


def _list_jobs(
    root: Path,
    manifest: Manifest,
    sound: dict[str, tuple[str, ...]],
    decode: bool,
    newest: Manifest,
    withdrawn: Withdrawn,
) -> Iterator[CheckJob]:
    """Yield a job for each shard.

    Args:
        root: folder of the shards.
        manifest: of the version.
        sound: tables of each split whose index is sound.
        decode: decode each image.
        newest: manifest of the newest version, which knows the shards that were purged.
        withdrawn: all samples that were withdrawn.
    """
    classes = Classes(manifest.classes, decimals=manifest.foreign)
    facts = replace(manifest, splits={})  # each job goes to a process, and there may be a million
    for name, split in manifest.splits.items():
        places = _place_samples(root, name, manifest, name in sound)
        for number, (shard, ids) in enumerate(zip(split.shards, places, strict=True)):
            purged = newest.purged.get(shard.name, shard.sha256)
            yield CheckJob(
                data=root,
                split=name,
                number=number,
                shard=replace(shard, sha256=purged),
                ids=ids,
                indexed=name in sound,
                classes=classes,
                manifest=facts,
                decode=decode,
                tables=sound.get(name, ()),
                fields=tuple(list_fields(split.tables)),
                unpurged=shard.sha256 if shard.name in newest.purged else None,
                withdrawn=frozenset(one.offset for one in withdrawn.get(shard.name, ())),
            )


def _place_samples(
    root: Path, name: str, manifest: Manifest, is_sound: bool
) -> Iterator[Sequence[int]]:
    """Yield the ids of the samples of each shard of a split."""
    counts = [shard.samples for shard in manifest.splits[name].shards]
    borders = pairwise(accumulate(counts, initial=0))
    if manifest.number == 1 or not is_sound:
        yield from (range(start, stop) for start, stop in borders)
        return
    shards = map_index(root, name, manifest)["shard"]  # replaced samples are in later ones
    order = np.argsort(shards, kind="stable")
    for number, (start, stop) in enumerate(borders):
        ids = order[start:stop]
        yield ids[shards[ids] == number].tolist()


def verify(data: Path, *, decode: bool = False, version: Version = None) -> list[DamageRow]:
    """Return all damage found in a dataset; an empty list means it is sound.

    Raises:
        UsageError: `data` holds no dataset.
    """
    return check(data, decode=decode, version=version).damage


def main(argv: list[str] | None = None) -> int:
    """Check, name all damage, and return 0 or 4."""
    options = parse_options(Verify, argv, "python -m pipeline.verify")
    if not options.data:
        if not options.ledger:
            raise UsageError("name the folder of a dataset: duet verify DATA")
        data, _ = locate_dataset(options.ledger[0], flag="DATA")
        options = replace(options, data=data)
    if is_remote(options.data):
        raise UsageError(f"verify reads local folders, and {options.data} is an address")
    folder = local_path(options.data)
    if options.ledger:
        return _prove_delivery(options, folder)
    started = time.monotonic()
    version = parse_version(options.data_version, "--data-version")
    report = check(folder, decode=options.decode, version=version)
    seconds = time.monotonic() - started
    if options.json:
        sys.stdout.write(json.dumps(_make_facts(options, report, seconds)) + "\n")
    for one in report.damage[:LISTED]:
        sys.stderr.write(f"{_describe_damage(one)}\n")
    if (more := len(report.damage) - LISTED) > 0:
        sys.stderr.write(f"... and {more:,} more; --json lists them all\n")
    if report.notes:
        sys.stderr.write(f"no part of the set: {_shorten_list(report.notes)}\n")
    sys.stderr.writelines(_describe_unpurged(options.data, report))
    sys.stderr.write(f"{_describe_speed(report, seconds, options.decode)}\n")
    if report.damage:
        count = len(report.damage)
        places = "1 place" if count == 1 else f"{count:,} places"
        raise DataError(f"{options.data} is damaged in {places}; {REBUILD}")
    sys.stderr.write(f"{options.data} is sound\n")
    return 0


def _make_facts(options: Verify, report: VerificationReport, seconds: float) -> dict[str, object]:
    return {
        "data": options.data,
        "sound": not report.damage,
        "damage": report.damage,
        "notes": report.notes,
        "decoded": options.decode,
        "pictures": report.images,
        "bytes": report.bytes,
        "seconds": round(seconds, 3),
    }


def _describe_unpurged(data: str, report: VerificationReport) -> Iterator[str]:
    if names := report.unpurged:
        yield (
            f"{len(names):,} shards ({_shorten_list(names)}) still hold samples that were "
            f"withdrawn: run duet withdraw {data} --purge again\n"
        )


def _describe_damage(one: DamageRow) -> str:
    sample = f" sample {one['sample']}" if "sample" in one else ""
    key = f" key {escape(one['key'])}" if "key" in one else ""
    return f"{escape(one['file'])}{sample}{key}: {one['reason']}"


def _shorten_list(names: list[str]) -> str:
    more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
    return ", ".join(map(escape, names[:3])) + more


def _describe_speed(report: VerificationReport, seconds: float, decode: bool) -> str:
    seconds = max(seconds, 1e-9)
    what = "checked and decoded" if decode else "checked"
    return (
        f"{report.images:,} images, {human_bytes(report.bytes)} {what} in {seconds:.1f} s "
        f"({human_bytes(report.bytes / seconds)}/s, {report.images / seconds:,.0f} images/s)"
    )


def _prove_delivery(options: Verify, folder: Path) -> int:
    """Prove from ledgers, name what is wrong, and return 0 or 4."""
    proof = prove(folder, options.ledger)
    if options.json:
        facts = {"data": str(options.data), **proof.facts()}
        sys.stdout.write(json.dumps(facts) + "\n")
    for finding in proof.findings:
        sys.stderr.write(f"{finding.reason}\n")
    if proof.findings:
        ledgers = ", ".join(map(str, options.ledger))
        raise DataError(
            f"the ledgers in {ledgers} do not prove that each sample was delivered once an epoch; "
            "see above, and give the ledgers of all attempts"
        )
    sys.stderr.write(f"{proof.summary()}\n")
    return 0


if __name__ == "__main__":
    run(main)
