"""Stage two: encoded images of many chunks, in shuffled order -> shards, side files, manifest.

`collect_chunks` reads the facts of stage one, `write_shard` makes one shard in a worker process,
and `seal` writes index, statistics, rejects, duplicates and, last, the manifest.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from pipeline.dataset.aggregates import NAME as AGGREGATES
from pipeline.dataset.aggregates import Aggregates
from pipeline.dataset.image_stats import NAME as STATS
from pipeline.dataset.image_stats import Statistics, Sums
from pipeline.dataset.images import Encoding
from pipeline.dataset.index import INDEX_DTYPE, SIZED_DTYPE, Index, index_name
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import Manifest, Shard, Split
from pipeline.dataset.members import (
    MEMBER_DTYPE,
    Members,
    escape_line,
    field_table,
    save_texts,
    write_npy_header,
)
from pipeline.dataset.shards import SampleContent, shard_name, to_shard, write_tar
from pipeline.options import BuildConfig
from pipeline.packing.chunks import (
    HASH_BYTES,
    ChunkError,
    FetchedFacts,
    PackedChunk,
    chunk_data_name,
    chunk_facts_name,
    fetch_facts,
    parse_chunk,
)
from pipeline.packing.duplicates import NAME as DUPLICATES
from pipeline.packing.duplicates import (
    DuplicateCounts,
    DuplicateMember,
    find_duplicates,
    write_duplicates,
)
from pipeline.packing.known import PRESENT, WITHDRAWN
from pipeline.packing.plan import BuildPlan, ChunkPlan, Places, describe_holdout, mean_side
from pipeline.remote.target import WORK, ByteRange, Target
from pipeline.sources import Reject
from pipeline.sources.listing import map_file, read_rejects, summarize_rejects
from pipeline.tools.errors import UsageError
from pipeline.tools.files import sha256
from pipeline.tools.jsonl import parse_json
from pipeline.tools.processes import read_ahead

FOLDER = f"{WORK}/shards"
REJECTS = "rejects.jsonl"
EXAMINED = 10_000
"""Rejects of a class that are looked at for the most frequent reason."""

TAKEN_DTYPE = np.dtype(
    [("chunk", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc", "<u4"), ("label", "<i4"),
     ("width", "<u2"), ("height", "<u2")]
)  # fmt: skip
"""An image to store: its chunk, byte range and CRC-32 there, its label, and its size in pixels."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to write, with everything that a worker on any node needs."""

    target: Target
    split: str
    number: int
    encoding: Encoding
    taken: npt.NDArray[np.void]
    """`TAKEN_DTYPE`, in stored order."""
    members: Members
    """`MEMBER_DTYPE` [n, fields]: ranges in the chunks, behind those of the images."""
    fields: tuple[str, ...] = ()
    """Endings of the other members of each sample."""
    sized: bool = False
    """True if the index is to have the sizes of the images."""


def shard_facts_name(split: str, number: int) -> str:
    """Return the name of the file with the facts of a shard; it marks the shard as done."""
    return f"{FOLDER}/{split}-{number:06d}.npz"


def write_shard(job: ShardJob) -> int:
    """Write a shard, its `.idx` and its facts; runs in a worker process.

    Returns:
        the number of its samples.

    Raises:
        ChunkError: a chunk is missing or damaged.
        OSError: the target cannot be read or written.
    """
    name = shard_name(job.split, job.number)
    with job.target.create(name) as file:
        sizes = job.taken[["height", "width"]].tolist() if job.sized else None
        written = write_tar(file, job.number, _read_samples(job), job.encoding, sizes)
    with job.target.create(name.removesuffix(".tar") + ".idx") as file:
        file.write(written.listing)
    members: dict[str, Any] = {_MEMBER_KEY + name: one for name, one in written.members.items()}
    with job.target.create(shard_facts_name(job.split, job.number)) as file:
        shard = to_shard(name, written)
        np.savez(
            file,
            rows=written.rows,
            shard=np.array(json.dumps(asdict(shard))),
            content=np.array(hash_content(job.taken, job.members)),
            **members,
        )
    return len(written.rows)


_MEMBER_KEY = "field-"
"""Beginning of the names of the rows of fields in the facts of a shard."""


def hash_content(taken: npt.NDArray[np.void], members: Members) -> str:
    """Return a hash of the samples of a shard; it changes if one of them becomes a reject."""
    columns = np.stack([taken[name].astype(np.int64) for name in ("crc", "size", "label")])
    others = np.stack([members[name].astype(np.int64) for name in ("crc", "size")])
    return hashlib.sha256(columns.tobytes() + others.tobytes()).hexdigest()


def fetch_shard(target: Target, split: str, number: int) -> FetchedFacts:
    """Read the facts of a shard, and the sizes of its tar and `.idx`; as `fetch_facts`."""
    name = shard_name(split, number)
    files = (name, name.removesuffix(".tar") + ".idx")
    return fetch_facts(target, shard_facts_name(split, number), files)


class WrittenShard(NamedTuple):
    """The facts of a finished shard."""

    shard: Shard
    rows: Index
    members: dict[str, Members]
    """Rows of each field."""


def parse_shard(fetched: FetchedFacts, content: str | None = None) -> WrittenShard | None:
    """Return a finished shard, or None if it has to be written (again).

    Args:
        fetched: what `fetch_shard` gave; only one thread may parse, as in `chunks.parse_chunk`.
        content: `hash_content` of what it should hold; None if that was checked before.
    """
    try:
        with np.load(io.BytesIO(fetched.content)) as arrays:
            shard = Shard(**parse_json(arrays["shard"].item()))
            rows, held = arrays["rows"], arrays["content"].item()
            members = {
                name.removeprefix(_MEMBER_KEY): arrays[name]
                for name in arrays
                if name.startswith(_MEMBER_KEY)
            }
    except Exception:  # NumPy's reader raises anything on a damaged header
        return None
    if content is not None and held != content:
        return None
    size, idx_size = fetched.sizes
    whole = size == shard.bytes and idx_size is not None
    return WrittenShard(shard, rows, members) if whole else None


def _read_samples(job: ShardJob) -> Iterator[SampleContent]:
    lengths = job.taken["size"].astype(np.int64) + job.members["size"].sum(1, dtype=np.int64)
    ranges = [
        ByteRange(chunk_data_name(chunk), offset, length)
        for (chunk, offset, *_), length in zip(job.taken.tolist(), lengths.tolist(), strict=True)
    ]
    found = job.target.read_ranges(ranges)
    for row, places in zip(job.taken, job.members.tolist(), strict=True):
        try:
            data = next(found)
        except FileNotFoundError as error:
            raise ChunkError(int(row["chunk"])) from error
        parts, end = [], 0
        for size, crc in ((row["size"], row["crc"]), *((size, crc) for _, size, crc in places)):
            part = data[end : end + int(size)]
            end += len(part)
            if len(part) != size or isal_zlib.crc32(part) != crc:
                raise ChunkError(int(row["chunk"]))
            parts.append(part)
        members = dict(zip(job.fields, parts[1:], strict=True))
        yield SampleContent(parts[0], int(row["label"]), members)


@dataclass(frozen=True)
class CollectedChunks:
    """Facts of all chunks of a build. Rows count as in `BuildPlan`."""

    taken: npt.NDArray[np.void]
    """`TAKEN_DTYPE` of each row; of rejected ones all zeros."""
    packed: npt.NDArray[np.bool_]
    """bool [n]: True for each row that could be packed."""
    members: Members
    """`MEMBER_DTYPE` [n, fields] of each row."""
    hashes: npt.NDArray[np.uint8]
    """[n, 32] perceptual hashes of the packed rows, in the order of the rows."""
    sums: Sums
    rejects_file: Path
    rejected: int
    skipped: int = 0
    """Number of images that the data set has already."""
    withdrawn: int = 0
    """Number of rejects that were withdrawn from the data set: no fault of their source."""

    def hash(self, rows: Places) -> str:
        """Return `hash_content` of the shard of these rows."""
        return hash_content(self.taken[rows], self.members[rows])

    def find_hashes(self, rows: Places) -> npt.NDArray[np.uint8]:
        """Return the perceptual hashes of packed rows, uint8 [n, 32]."""
        return np.asarray(self.hashes[(np.cumsum(self.packed) - 1)[rows]])

    def order(self, plan: BuildPlan, split: str) -> Places:
        """Return the rows of a split that are stored, in stored order."""
        rows = plan.orders[split]
        return rows[self.packed[rows]]


def collect_chunks(
    options: BuildConfig, plan: BuildPlan, target: Target, scratch: Path
) -> CollectedChunks:
    """Read all chunks back, in their order.

    Raises:
        ChunkError: some are missing or damaged.
    """
    count = plan.images
    taken = _allocate(scratch / "taken.bin", TAKEN_DTYPE, (count,))
    members = _allocate(scratch / "members.bin", MEMBER_DTYPE, (count, len(options.members)))
    packed = np.zeros(count, np.bool_)
    sums, rejected, skipped, withdrawn = Sums(mean_side(options)), plan.rejected, 0, 0
    rejects_file = write_rejects(plan, scratch)
    with (
        (scratch / "hashes.bin").open("wb") as hashes,
        rejects_file.open("a", encoding="utf-8") as rejects,
    ):
        for part, first, chunk in _read_chunks(options, plan, target):
            rows = slice(first, first + part.stop - part.start)
            members[rows] = chunk.members
            packed[rows] = chunk.packed["packed"]
            for name in ("offset", "size", "crc", "width", "height"):
                taken[name][rows] = chunk.packed[name]
            taken["chunk"][rows] = part.number
            labels = plan.listings[part.listing].rows["label"]
            taken["label"][rows] = labels[part.start : part.stop]
            hashes.write(chunk.packed["hash"][chunk.packed["packed"]].tobytes())
            sums += chunk.sums
            for place, reason in sorted(chunk.reasons.items()):
                if reason == PRESENT:
                    skipped += 1
                    continue
                rejects.write(plan.make_reject(first + place, reason).to_json_line())
                rejected += 1
                withdrawn += reason == WITHDRAWN
    return CollectedChunks(
        taken=taken,
        packed=packed,
        members=members,
        hashes=map_file(scratch / "hashes.bin", np.dtype(np.uint8)).reshape(-1, HASH_BYTES),
        sums=sums,
        rejects_file=rejects_file,
        rejected=rejected,
        skipped=skipped,
        withdrawn=withdrawn,
    )


def write_rejects(plan: BuildPlan, scratch: Path) -> Path:
    """Write what the scans rejected, as lines of `rejects.jsonl`; return the file."""
    path = scratch / REJECTS
    with path.open("w", encoding="utf-8") as file:
        for listing in plan.listings:
            file.writelines(map(Reject.to_json_line, listing.rejects()))
    return path


def _read_chunks(
    options: BuildConfig, plan: BuildPlan, target: Target
) -> Iterator[tuple[ChunkPlan, int, PackedChunk]]:
    firsts = plan.first_rows
    damaged: list[int] = []

    def fetch(part: ChunkPlan) -> FetchedFacts:
        return fetch_facts(target, chunk_facts_name(part.number), [chunk_data_name(part.number)])

    files = read_ahead(fetch, plan.parts())
    for part, fetched in zip(plan.parts(), files, strict=True):
        try:
            images, fields = part.stop - part.start, len(options.members)
            chunk = parse_chunk(fetched, part.number, images, fields)
        except ChunkError:
            damaged.append(part.number)
        else:
            yield part, firsts[part.listing] + part.start, chunk
    if damaged:
        raise ChunkError(*damaged)


def _allocate(path: Path, dtype: np.dtype[np.void], shape: tuple[int, ...]) -> npt.NDArray[np.void]:
    """Map a new file with allocated blocks: on a full disk, a write to a sparse one is SIGBUS."""
    if not (count := math.prod(shape)):
        return np.zeros(shape, dtype)
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
    return np.memmap(path, dtype, "r+", shape=shape)


def check_classes(plan: BuildPlan, collected: CollectedChunks, target: Target) -> None:
    """Refuse a training set that lacks a class, and a split without images.

    Raises:
        UsageError: names the class or the split, and a reject.
    """
    for split, rows in plan.orders.items():
        labels = collected.taken["label"][collected.order(plan, split)]
        if len(labels) and not plan.classes:
            continue
        empty = np.flatnonzero(np.bincount(labels, minlength=len(plan.classes)) == 0)
        if len(labels) == 0 or (split == "train" and len(empty)):
            what = f"class {plan.classes[empty[0]]!r}" if len(labels) else f"split {split!r}"
            if len(labels):
                rows = rows[collected.taken["label"][rows] == empty[0]]
            names = {plan.name(int(row)) for row in rows[:EXAMINED]}
            rejects = (one for one in read_rejects(collected.rejects_file) if one.name in names)
            raise UsageError(
                f"no image of {what} could be read; most often: {summarize_rejects(rejects)}; "
                f"replace them, delete {target.address}, and run the same command again"
            )


def seal(
    options: BuildConfig,
    plan: BuildPlan,
    target: Target,
    collected: CollectedChunks,
    shards: dict[str, int],
    scratch: Path,
    libraries: dict[str, str],
) -> Manifest:
    """Write index, statistics, rejects and duplicates, then the manifest, and return it.

    Raises:
        OSError: the target cannot be written.
    """
    splits = {}
    for name, count in shards.items():
        split = _write_index(name, count, target, options, scratch)
        names = _write_names(name, plan, target, collected, scratch)
        splits[name] = replace(split, tables=names | split.tables)
    with (scratch / DUPLICATES).open("wb") as file:
        same = _write_duplicates(file, plan, collected)
    stats_sha256 = Statistics.from_sums(collected.sums).save(scratch)
    copy_file(scratch / STATS, target, STATS)
    copy_file(scratch / DUPLICATES, target, DUPLICATES)
    copy_file(collected.rejects_file, target, REJECTS)
    hashes = {name: collected.find_hashes(collected.order(plan, name)) for name in splits}
    with target.create(AGGREGATES) as out:
        indices = {name: split.index_sha256 for name, split in splits.items()}
        Aggregates(collected.sums, hashes).write(out, indices)
    sources = {"train": str(options.train)}
    if "val" in splits:
        sources["val"] = str(options.val or describe_holdout(options.holdout, sources["train"]))
    if "test" in splits:
        sources["test"] = str(options.test)
    manifest = Manifest(
        splits=splits,
        classes=plan.classes,
        titles=plan.listings[0].titles,
        seed=options.seed,
        sources=sources,
        plan=plan.fingerprint,
        stats_sha256=stats_sha256,
        rejected=collected.rejected,
        image_size=None if options.fit == "none" else options.size,
        fit=options.fit,
        quality=options.quality if options.encoding == "jpeg" else None,
        chroma=options.chroma if options.encoding == "jpeg" else None,
        encoding=options.encoding,
        rejects_sha256=sha256(collected.rejects_file),
        duplicates=same.groups,
        leaks=same.leaks,
        duplicates_sha256=sha256(scratch / DUPLICATES),
        libraries=libraries,
    )
    with target.create(MANIFEST) as file:
        file.write(manifest.text())
    return manifest


def copy_file(path: Path, target: Target, name: str) -> None:
    """Copy a local file into the target."""
    with path.open("rb") as source, target.create(name) as file:
        shutil.copyfileobj(source, file, 1 << 20)


def _write_duplicates(
    file: IO[bytes], plan: BuildPlan, collected: CollectedChunks
) -> DuplicateCounts:
    """Find the groups of duplicates, and write them."""
    rows = np.flatnonzero(collected.packed)
    split_of = np.zeros(plan.images, np.uint8)
    sample_of = np.zeros(plan.images, np.uint32)
    names = list(plan.orders)
    for number, name in enumerate(names):
        order = collected.order(plan, name)
        split_of[order] = number
        sample_of[order] = np.arange(len(order), dtype=np.uint32)

    def member(place: int) -> DuplicateMember:
        row = int(rows[place])
        return DuplicateMember(
            split=names[split_of[row]],
            sample=int(sample_of[row]),
            label=int(collected.taken["label"][row]),
            name=next(plan.list_names(np.array([row], np.uint32))),
        )

    taken = collected.taken[rows]
    return write_duplicates(
        file,
        find_duplicates(collected.hashes, taken["size"], taken["crc"]),
        split_of[rows],
        taken["label"],
        member,
    )


def _write_index(
    name: str, shards: int, target: Target, options: BuildConfig, scratch: Path
) -> Split:
    """Join the rows of a split's shards into its index, and those of each field into its table.

    One shard is in memory at a time.
    """
    facts = tuple(found.shard for found in read_shards(target, name, shards))
    samples = sum(shard.samples for shard in facts)
    dtype = INDEX_DTYPE if options.fit == "square" else SIZED_DTYPE
    tables = [field_table(field) for field in options.members]
    files = [index_name(name), *(f"{name}.{table}" for table in tables)]
    kinds = [dtype, *(MEMBER_DTYPE for _ in tables)]
    digests = [hashlib.sha256() for _ in files]
    with ExitStack() as stack:
        opened = [stack.enter_context((scratch / one).open("wb")) for one in files]
        for file, digest, kind in zip(opened, digests, kinds, strict=True):
            write_npy_header(file, digest, kind, samples)
        for found in read_shards(target, name, shards):
            parts = (found.rows, *(found.members[field] for field in options.members))
            for file, digest, rows in zip(opened, digests, parts, strict=True):
                file.write(rows.tobytes())
                digest.update(rows.tobytes())
    for one in files:
        copy_file(scratch / one, target, one)
    index, *others = (digest.hexdigest() for digest in digests)
    return Split(shards=facts, index_sha256=index, tables=dict(zip(tables, others, strict=True)))


def _write_names(
    name: str, plan: BuildPlan, target: Target, collected: CollectedChunks, scratch: Path
) -> dict[str, str]:
    """Write the names of a split's images in stored order; return the SHA-256 of the tables."""
    rows = collected.order(plan, name)
    tables = save_texts(scratch, name, "names", len(rows), map(escape_line, plan.list_names(rows)))
    for table in tables:
        copy_file(scratch / f"{name}.{table}", target, f"{name}.{table}")
    return tables


def read_shards(target: Target, name: str, shards: int, first: int = 0) -> Iterator[WrittenShard]:
    """Yield the facts of so many written shards of a split, from number `first` on.

    Raises:
        OSError: one is not there any more.
    """
    files = read_ahead(partial(fetch_shard, target, name), range(first, first + shards))
    for number, fetched in enumerate(files, first):
        done = parse_shard(fetched)
        if done is None:
            raise OSError(f"{target.address}/{shard_name(name, number)} went away while packing")
        yield done
