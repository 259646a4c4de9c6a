"""A version with more images: those of a source that are added, or rejects that can be read by now.

The images are packed as by a build: chunks in OUT/.build, then shards with numbers that no version
has, then the version's tables, then its manifest. Killed before, the set is what it was, and the
same command resumes; another command clears up and begins anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.dataset.aggregates import Aggregates
from pipeline.dataset.images import SIZE
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.members import list_fields
from pipeline.dataset.samples import UnknownClasses
from pipeline.dataset.shards import shard_number
from pipeline.options import BuildConfig
from pipeline.packing import chunks
from pipeline.packing.build import (
    STATE,
    describe_state,
    disk_errors_in_one_line,
    library_versions,
    pack_chunks,
    read_state,
    refuse_many_rejects,
    write_shards,
)
from pipeline.packing.chunks import ChunkError, chunk_facts_name
from pipeline.packing.known import KnownImages, content_keys, save_known
from pipeline.packing.measure import subtract_images
from pipeline.packing.plan import (
    BuildPlan,
    choose_held_out,
    compute_fingerprint,
    read_holdout,
)
from pipeline.packing.revision import Ids, NewSamples, Parent, SplitEdit, VersionFacts, seal_version
from pipeline.packing.shards import FOLDER as SHARDS
from pipeline.packing.shards import CollectedChunks, collect_chunks, read_shards
from pipeline.remote.target import WORK, Target, is_finished, open_target
from pipeline.sources import SPLITS, Listing, scan
from pipeline.sources.listing import DAMAGED, Names, Reject, read_rejects
from pipeline.tools.errors import DuetError, UsageError, hint_resume
from pipeline.tools.processes import LocalPool, Pool
from pipeline.tools.progress import announce, write_line
from pipeline.tools.text import hide_credentials

REPEATS = 3
"""Times that a chunk which was damaged on the disk is packed again before it is given up."""


def add_version(
    options: BuildConfig, target: Target | None = None, pool: Pool | None = None
) -> Manifest:
    """Make the version with the images of `options.add`, or with rejects that can be read by now.

    Args:
        options: the settings; those that the set decides are taken from it.
        target: OUT, a finished data set; by default the target of `options.out`.
        pool: runs the jobs; by default processes of this machine.

    Returns:
        The manifest of the newest version: the one before if there is nothing to add.

    Raises:
        UsageError: the source or the settings do not fit the set, or another build holds it.
        DataError: a manifest, table or shard of the set is damaged.
        DuetError: too many rejects, a disk failed or is full, or a worker died repeatedly.
    """
    options.check()
    target = target or open_target(options.out)
    with disk_errors_in_one_line(target):
        if not is_finished(target):
            raise UsageError(
                f"{target.address} holds no finished data set to add to; build it with --train SRC"
            )
        return _add(options, target, pool)


def _add(options: BuildConfig, target: Target, pool: Pool | None) -> Manifest:
    with target.reserve(extends=True), target.scratch() as scratch:
        parent = Parent(target, scratch)
        options = adopt_settings(options, parent.manifest, target)
        if options.retry_rejects and not parent.manifest.rejected:
            write_line(f"note: {target.address} has no rejects; nothing is packed")
            return parent.manifest
        with announce("listing the images"):
            plan, classes = _make_plan(options, parent, scratch)
        if (done := _find_done(options, plan, parent)) is not None:
            write_line(
                f"note: these images were added as version {done}; --replace looks for changed ones"
            )
            target.clear(WORK)
            return parent.manifest
        if not plan.images:
            write_line(f"note: none of the rejects of {target.address} is there any more")
            return parent.manifest
        _begin(options, plan, parent)
        kept = f"{hide_credentials(target.address)} keeps what is packed"
        with (
            hint_resume(kept),
            nullcontext(pool) if pool else LocalPool(options.workers) as workers,
        ):
            for _ in range(REPEATS):
                try:
                    return _Addition(options, plan, parent, workers, scratch, classes).run()
                except ChunkError as error:
                    target.remove(map(chunk_facts_name, error.numbers))
    raise DuetError(f"{target.address} gives back other bytes than were written; replace the disk")


def adopt_settings(options: BuildConfig, manifest: Manifest, target: Target) -> BuildConfig:
    """Return settings with those that a set decides; refuse others than its own.

    Raises:
        UsageError: a setting differs, or another tool made the set.
    """
    if manifest.foreign:
        raise UsageError(
            f"{target.address} was made by another tool and indexed in place; pack it with "
            "duet build-shards, which can be added to"
        )
    own: dict[str, Any] = {
        "seed": manifest.seed,
        "size": manifest.image_size or SIZE,
        "fit": manifest.fit,
        "encoding": manifest.encoding,
        "labels": bool(manifest.classes),
    }
    if manifest.encoding == "jpeg":
        own |= {"quality": manifest.quality, "chroma": manifest.chroma}
    for name, value in own.items():
        given = getattr(options, name)
        if given not in (value, getattr(BuildConfig, name)):
            flag = "--no-labels" if name == "labels" else f"--{name} {given}"
            has = "labels" if name == "labels" else f"--{name} {value}"
            raise UsageError(f"{flag} differs: {target.address} has {has}; leave the flag out")
    tables = chain.from_iterable(split.tables for split in manifest.splits.values())
    fields = sorted(set(list_fields(tables)))
    if sorted(options.members) != fields:
        flags = f"--fields and --masks {' '.join(fields)}" if fields else "neither"
        raise UsageError(
            f"the samples of {target.address} have {len(fields)} other members, and --fields and "
            f"--masks name {len(options.members)}; give {flags}"
        )
    for name in ("fields", "masks"):
        own[name] = tuple(getattr(options, name))
    return replace(options, **{name: value for name, value in own.items() if value is not None})


def _make_plan(
    options: BuildConfig, parent: Parent, scratch: Path
) -> tuple[BuildPlan, tuple[str, ...]]:
    """Return the plan of the images to pack, and the classes of the next version."""
    manifest = parent.manifest
    if options.retry_rejects:
        listings = _list_rejects(options, parent, scratch)
    else:
        listings = {
            options.split: [_scan(options, str(options.add), options.split, parent, scratch)]
        }
    orders, held, flat, first = {}, [], [], 0
    for split, some in listings.items():
        count = sum(map(len, some))
        rows = np.arange(first, first + count, dtype=np.uint32)
        seed = [manifest.seed, *split.encode(), manifest.number + 1]
        orders[split] = np.random.default_rng(seed).permutation(rows)
        held.append(np.full(count, split != "train"))
        flat += some
        first += count
    for listing in flat:
        for note in listing.notes:
            write_line(f"note: {note}")
    classes = max((listing.classes for listing in flat), key=len, default=manifest.classes)
    plan = BuildPlan(
        listings=tuple(flat),
        orders=orders,
        held_out=np.concatenate([np.zeros(0, bool), *held]),
        fingerprint=compute_fingerprint(options, flat),
        notes=(),
    )
    return plan, classes


def _scan(options: BuildConfig, source: str, split: Any, parent: Parent, scratch: Path) -> Listing:
    """List a source with the classes of the set, and with new ones behind them if they may be."""
    classes, number = parent.manifest.classes, 0

    def look(known: tuple[str, ...] | None) -> Listing:
        nonlocal number
        number += 1
        return scan(
            source,
            scratch / f"{split}-{number}-{abs(hash(source))}",
            split=split,
            classes=known or None,
            labels=options.find_labels(split),
            fields=options.members,
            labelled=bool(classes),
            strict=options.strict,
        )

    try:
        return look(classes)
    except UnknownClasses as error:
        if not options.new_classes:
            raise UsageError(
                f"source {hide_credentials(source)} has class {error.names[0]!r}, which "
                f"{parent.target.address} lacks; remove it, or give --new-classes to add it behind "
                "the others"
            ) from error
        return look((*classes, *error.names))
    except UsageError:
        if not options.new_classes:
            raise
    names = look(None).classes  # of shards and parquet files, which name their classes themselves
    return look((*classes, *(name for name in names if name not in classes)))


def _list_rejects(options: BuildConfig, parent: Parent, scratch: Path) -> dict[str, list[Listing]]:
    """List those images of all sources of a set that were rejected, or lie in a damaged one."""
    rejects = list(read_rejects(parent.rejects)) if parent.rejects else []
    names = {reject.name for reject in rejects} | set(filter(None, map(_find_damaged, rejects)))
    sources = dict[tuple[str, str], float]()
    for version in reversed(parent.versions):
        found = version.manifest.change.get("sources", version.manifest.sources)
        share = read_holdout(found)
        for split, source in found.items():
            if split != "val" or not share:
                sources.setdefault((split, source), share if split == "train" else 0.0)
    listings: dict[str, list[Listing]] = {}
    for (split, source), share in sources.items():
        listing = _scan(options, source, split, parent, scratch)
        held = choose_held_out(listing, share, parent.manifest.seed)
        is_damaged = [one.address in names for one in listing.containers]
        places = [
            n
            for n, container in enumerate(listing.rows["container"].tolist())
            if is_damaged[container] or listing.full_name(n) in names
        ]
        for name in dict.fromkeys((split, "val")):
            some = [place for place in places if held[place] == (name != split)]
            if some:
                listings.setdefault(name, []).append(_select(listing, some))
    return listings


def _find_damaged(reject: Reject) -> str | None:
    """Return the source whose rest a reject stands for; None for a reject of one file."""
    return (reject.source or reject.name) if reject.reason.startswith(DAMAGED) else None


def _select(listing: Listing, places: list[int]) -> Listing:
    """Return a listing of some of its images."""
    text = [listing.names[place].encode("utf-8", "surrogateescape") for place in places]
    ends = np.cumsum([len(one) for one in text]).astype(np.uint64)
    names = Names(np.frombuffer(b"".join(text), np.uint8), ends)
    rows, members = np.array(listing.rows[places]), np.array(listing.members[places])
    return replace(listing, rows=rows, names=names, members=members, rejected=0, lost=0)


def _find_done(options: BuildConfig, plan: BuildPlan, parent: Parent) -> int | None:
    """Return the version that these images were added as, None if they were not."""
    if options.replace or options.retry_rejects:
        return None
    for version in parent.versions:
        change = version.manifest.change
        if change.get("plan") == plan.fingerprint and options.split in change.get("sources", {}):
            return version.number
    return None


def _begin(options: BuildConfig, plan: BuildPlan, parent: Parent) -> None:
    """Write the state of the work, or go on with work in the same state; clear up after other."""
    flags = {key: getattr(options, key) for key in ("split", "replace", "retry_rejects")}
    ours = describe_state(options, plan) | flags | {"parent": parent.newest.identity}
    target = parent.target
    ours = json.loads(json.dumps(ours))
    if (theirs := read_state(target)) == ours:
        return
    if theirs:
        write_line(f"note: other work in {target.address} was cut short; it is cleared up")
    for folder in (chunks.FOLDER, SHARDS):
        target.clear(folder)
    target.remove(list(_list_leftovers(parent)))
    with target.create(STATE) as file:
        file.write(json.dumps(ours, indent=1).encode())


def _list_leftovers(parent: Parent) -> Iterator[str]:
    """Yield the shards that were written for a version which was not sealed."""
    firsts: dict[str, int] = {name: parent.first_number(name) for name in SPLITS}
    for name in parent.target.list_files():
        found = re.fullmatch(rf"({'|'.join(SPLITS)})-[0-9]{{6,}}\.(tar|idx)", name)
        number = shard_number(f"{name.rpartition('.')[0]}.tar")
        if found and number >= firsts[found[1]]:
            yield name


class _Addition:
    """The work of one command."""

    def __init__(
        self,
        options: BuildConfig,
        plan: BuildPlan,
        parent: Parent,
        pool: Pool,
        scratch: Path,
        classes: tuple[str, ...],
    ) -> None:
        self._options, self._plan, self._parent = options, plan, parent
        self._pool, self._scratch, self._classes = pool, scratch, classes
        self._target = parent.target

    def run(self) -> Manifest:
        """Make the missing files; raises ChunkError if a chunk must be packed again."""
        options, plan, target = self._options, self._plan, self._target
        if options.replace:  # a name that is not clear is refused before anything is packed
            for split, rows in plan.orders.items():
                if split in self._parent.manifest.splits:
                    self._find_names(split, tuple(plan.list_names(rows)))
        kept = self._parent.read_aggregates(self._pool)
        known = self._save_known(kept)
        pack_chunks(options, plan, target, self._pool, known)
        collected = collect_chunks(options, plan, target, self._scratch)
        if collected.skipped:
            count = f"{collected.skipped:,} of {plan.images:,} images"
            write_line(f"note: {count} are in {target.address} already, and skipped")
        if not options.retry_rejects:
            refuse_many_rejects(options, plan, target, collected)
        if not collected.packed.any():
            write_line(f"note: there is nothing to add to {target.address}")
            target.clear(WORK)
            return self._parent.manifest
        firsts = {split: self._parent.first_number(split) for split in plan.orders}
        orders = {
            split: rows for split, rows in plan.orders.items() if len(collected.order(plan, split))
        }
        plan = replace(plan, orders=orders)
        counts = write_shards(options, plan, target, self._pool, collected, firsts)
        with announce("looking for duplicates, and sealing the version"):
            edits = {
                split: self._edit(plan, split, counts[split], firsts[split], collected)
                for split in orders
            }
            manifest = self._seal(edits, kept, collected)
        target.clear(WORK)
        return manifest

    def _save_known(self, kept: Aggregates) -> KnownImages:
        parent = self._parent
        rows = [parent.indices[name] for name in parent.manifest.splits]
        keys = [content_keys(some["size"], some["crc"]) for some in rows]
        samples = list(chain.from_iterable(parent.withdrawn.values()))
        gone = content_keys([one.size for one in samples], [one.crc for one in samples])
        hashes = [kept.hashes[name] for name in parent.manifest.splits]
        save_known(self._target, np.concatenate(keys), np.concatenate(hashes), gone)
        return KnownImages(parent.newest.identity, parent.manifest.encoding == "raw")

    def _edit(
        self, plan: BuildPlan, split: str, shards: int, first: int, collected: CollectedChunks
    ) -> SplitEdit:
        """Return the samples of a split: those of the parent, in their order, then the new ones."""
        written = list(read_shards(self._target, split, shards, first))
        rows = np.concatenate([one.rows for one in written])
        rows["shard"] -= first
        order = collected.order(plan, split)
        new = NewSamples(
            shards=tuple(one.shard for one in written),
            rows=rows,
            names=tuple(plan.list_names(order)),
            members={
                field: np.concatenate([one.members[field] for one in written])
                for field in self._options.members
            },
            hashes=collected.find_hashes(order),
        )
        before = self._parent.manifest.splits.get(split)
        count = before.samples if before else 0
        origin, added = np.arange(count), np.arange(count, count + len(order))
        if self._options.replace and before:
            old = self._find_names(split, new.names)
            origin[old[old >= 0]] = added[old >= 0]
            added = added[old < 0]
        return SplitEdit(np.concatenate([origin, added]), new)

    def _find_names(self, split: str, names: tuple[str, ...]) -> Ids:
        """Return the id in the parent of each name, -1 for one that it does not have."""
        table = self._parent.texts(split, "names")
        if table is None:
            raise UsageError(
                f"{self._target.address} does not know the names of its images, as an older set; "
                "--replace needs them: leave it out"
            )
        places = {name: place for place, name in enumerate(names)}
        found = np.full(len(names), -1, np.int64)
        for sample, name in enumerate(table):
            if (place := places.get(name)) is None:
                continue
            if found[place] >= 0:
                raise UsageError(
                    f"{self._target.address} has two images {name!r}; --replace cannot tell "
                    "which is meant: withdraw one of them first"
                )
            found[place] = sample
        return found

    def _seal(
        self, edits: dict[str, SplitEdit], kept: Aggregates, collected: CollectedChunks
    ) -> Manifest:
        parent, options = self._parent, self._options
        sums = kept.sums
        replaced = added = 0
        for split, edit in edits.items():
            before = parent.manifest.splits.get(split)
            count = before.samples if before else 0
            gone = np.flatnonzero(edit.origin[:count] >= count)
            replaced += len(gone)
            added += len(edit.origin) - count
            if split == "train" and len(gone):
                rows = parent.indices[split]
                sums = subtract_images(
                    sums,
                    parent.target,
                    parent.manifest,
                    rows[gone],
                    np.delete(rows, gone),
                    self._pool,
                )
        sums += collected.sums
        rejects, rejected = self._write_rejects(collected)
        change: dict[str, Any] = {
            "added": added,
            "replaced": replaced,
            "skipped": collected.skipped,
        }
        if options.retry_rejects:
            change |= {"retried": self._plan.images}
        else:
            source = hide_credentials(str(options.add))
            change |= {"sources": {options.split: source}, "plan": self._plan.fingerprint}
        facts = VersionFacts(
            aggregates=Aggregates(sums, kept.hashes),
            change=change,
            rejects=rejects,
            rejected=rejected,
            withdrawn=parent.withdrawn,
            classes=self._classes,
            titles=self._extend_titles(),
            libraries=library_versions(),
        )
        return seal_version(parent, edits, facts, self._scratch)

    def _extend_titles(self) -> tuple[str, ...] | None:
        titles = self._parent.manifest.titles
        return None if titles is None else (*titles, *self._classes[len(titles) :])

    def _write_rejects(self, collected: CollectedChunks) -> tuple[Path, int]:
        """Write the rejects of the next version; return the file and their number."""
        before = list(read_rejects(self._parent.rejects)) if self._parent.rejects else []
        if self._options.retry_rejects:  # those that were tried again are listed anew, or packed
            listings = self._plan.listings
            tried = {one.full_name(n) for one in listings for n in range(len(one))}
            tried |= {container.address for one in listings for container in one.containers}
            before = [
                reject
                for reject in before
                if reject.name not in tried and _find_damaged(reject) not in tried
            ]
        found = [*before, *read_rejects(collected.rejects_file)]
        if self._options.retry_rejects:
            found = list(dict.fromkeys(found))  # scans name again what is no image
        path = self._scratch / "all-rejects.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(map(Reject.to_json_line, found))
        return path, len(found)
