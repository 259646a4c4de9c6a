"""Lists the images of WebDataset shards: tars in which `KEY.jpg` and `KEY.cls` are a sample.

SRC.tar    SRC/*.tar    SRC/train-{000000..001280}.tar    s3://bucket/train-{000..146}.tar
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import BinaryIO, NamedTuple

from pipeline.dataset.samples import (
    LABEL_ENDINGS,
    MAX_LABEL_BYTES,
    Read,
    SampleFile,
    group_by_key,
    read_member_label,
)
from pipeline.dataset.tar import Member, escape, read_members
from pipeline.remote.filesystem import hide_credentials, is_remote
from pipeline.sources.classes import LabelMapper
from pipeline.sources.listing import Listing, ListingWriter, is_image
from pipeline.sources.paths import (
    SourceFiles,
    base_name,
    find_files,
    open_file,
    read_small,
    scan_each,
    select_split,
    sibling_address,
)
from pipeline.tools.errors import UsageError

ENDING = ".tar"
SAMPLES = 4096
"""Most samples of a shard that are in memory at a time."""
LOOK = 64
"""Members of the first shard that are examined to detect the kind of a source."""
LARGEST_MANIFEST = 64 << 20
"""Size limit of a manifest or a list of classes in bytes."""

_META = re.compile(r"__[^/]*__($|/)")
"""Names of members that webdataset skips."""


@dataclass
class _SourceSample:
    """Images and label of the members that follow each other and have the same key."""

    key: str
    images: list[SampleFile] = field(default_factory=list)
    label: int | str | None = None
    rank: int = len(LABEL_ENDINGS)
    """Index in `LABEL_ENDINGS` of the file that holds the label."""
    title: str | None = None
    """Readable name of the class."""
    no_label: str = "no label"
    """Reason for rejecting the sample if it has no label."""


class _LabelledImage(NamedTuple):
    """An image to list."""

    name: str
    offset: int
    size: int
    label: int | str
    title: str | None


@dataclass
class _ShardPart:
    """Images and rejects of some samples that follow each other in a shard."""

    address: str
    images: list[_LabelledImage] = field(default_factory=list)
    rejects: list[tuple[str, str]] = field(default_factory=list)

    def reject(self, name: str, reason: str) -> None:
        """Add a member or a sample that cannot be packed."""
        self.rejects.append((f"{self.address}/{escape(name)}", reason))


def is_webdataset(source: str) -> bool:
    """Return whether a source is WebDataset shards, by the first members of its first tar.

    A tar of images alone, such as a class, is no shard.

    Raises:
        UsageError: a brace range that cannot be read, or a first tar that is damaged.
        OSError: the first tar cannot be opened.
    """
    files = find_files(source, ENDING)
    if files is None:
        return False
    images, others = set[str](), set[str]()
    with open_file(files.addresses[0]) as file:
        members = islice(read_members(file, files.addresses[0]), LOOK)
        groups = group_by_key(_skip_meta(members))
        for key, part in ((key, part) for key, group in groups for part in group if part.regular):
            ending = part.ending.lower()
            if is_image(f".{ending}"):
                images.add(key)
            elif ending in ("json", "txt"):
                others.add(key)
            # An image and a caption or a record are a sample, if without a label.
            if ending == "cls" or key in images & others:
                return True
    return False


def scan_webdataset(
    source: str, writer: ListingWriter, split: str, classes: Sequence[str] | None
) -> Listing:
    """List the images of a source for which `is_webdataset` holds.

    Args:
        source: folder, tar, glob, brace range or address, as the user named it.
        writer: an empty listing, which the images are added to.
        split: `train` or `val`; chooses among the shards of a folder by their names.
        classes: class list of the training split if this is another split of the same set.

    Raises:
        UsageError: a damaged shard, labels that do not fit together, or as `LabelMapper.finish`.
        OSError: a shard cannot be opened or read; of a store, `Unreachable`.
    """
    files = find_files(source, ENDING)
    if files is None:
        raise UsageError(f"source {hide_credentials(source)} names no shards")
    addresses, labels = _select_shards(files, source, split, classes)
    titles: dict[int, str] = {}
    for part in scan_each(addresses, _scan_shard, is_remote(source)):
        _add_part(part, writer, labels, titles)
    return labels.finish(writer, titles)


def _select_shards(
    files: SourceFiles, source: str, split: str, classes: Sequence[str] | None
) -> tuple[tuple[str, ...], LabelMapper]:
    """Return the shards of a split, and the classes that a file beside them lists."""
    first = files.addresses[0]
    text = read_small(sibling_address(first, "manifest.json"), LARGEST_MANIFEST)
    try:
        table = json.loads(text or b"{}")
        names, titles = table["classes"], table.get("titles")
        if table.get("encoding", "jpeg") != "jpeg":
            raise UsageError(
                f"source {hide_credentials(source)} is a packed data set of raw pixels; "
                "it is used as it is, and packed from where its images came from"
            )
        inside = {name: {shard["name"] for shard in part["shards"]}
                  for name, part in table["splits"].items()}  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        listed = read_small(sibling_address(first, "classes.txt"), LARGEST_MANIFEST)
        lines = [line.strip() for line in (listed or b"").decode(errors="replace").splitlines()]
        return select_split(files, split, source), LabelMapper(
            source, [*filter(None, lines)], classes
        )
    labels = LabelMapper(source, names, classes, titles)
    if files.folder is None:
        return files.addresses, labels
    if split not in inside:
        raise UsageError(
            f"source {hide_credentials(source)} is a packed data set without a split {split!r}; "
            f"it has {', '.join(sorted(inside))}"
        )
    chosen = tuple(name for name in files.addresses if base_name(name) in inside[split])
    if lost := inside[split] - {base_name(name) for name in chosen}:
        raise UsageError(
            f"source {hide_credentials(source)} lacks shard {min(lost)}, which its manifest names"
        )
    return chosen, labels


def _add_part(
    part: _ShardPart, writer: ListingWriter, labels: LabelMapper, titles: dict[int, str]
) -> None:
    """Add a part of a shard to the listing, and the readable names of numbers to `titles`."""
    kept, classes = [], []
    for image in part.images:
        if not labels.fits(image.label):
            what = "number" if isinstance(image.label, int) else "word"
            part.reject(image.name, f"no label: {image.label!r} is a {what}, unlike others")
            continue
        classes.append(labels.find_class(image.label, f"{part.address}/{escape(image.name)}"))
        if isinstance(image.label, int) and image.title:
            titles.setdefault(image.label, image.title)
        kept.append(image)
    writer.add(
        writer.container("tar", part.address),
        classes,
        [image.name for image in kept],
        [image.offset for image in kept],
        [image.size for image in kept],
    )
    for reject in part.rejects:
        writer.reject(*reject)


def _scan_shard(address: str) -> Iterator[_ShardPart]:
    """Yield the samples of a shard, `SAMPLES` at a time."""
    part = _ShardPart(address)
    seen: set[int] = set()
    with open_file(address) as file:
        for sample in _read_samples(file, address):
            _choose_image(sample, part, seen)
            if len(part.images) + len(part.rejects) >= SAMPLES:
                yield part
                part = _ShardPart(address)
    yield part


def _skip_meta(members: Iterator[Member]) -> Iterator[Member]:
    return (member for member in members if not _META.match(member.name))


def _read_samples(file: BinaryIO, address: str) -> Iterator[_SourceSample]:
    """Yield the samples of a shard with their labels."""

    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    titled = True  # False once the record beside a label has no readable name of the class
    for key, group in group_by_key(_skip_meta(read_members(file, address))):
        sample = _SourceSample(key)
        for part in group:
            ending = part.ending.lower()
            if is_image(f".{ending}"):
                sample.images.append(part)
            elif not part.regular or ending not in LABEL_ENDINGS:
                continue
            elif LABEL_ENDINGS.index(ending) < sample.rank:
                _read_label(part, read, sample)
            elif ending == "json" and titled and part.size <= MAX_LABEL_BYTES:
                sample.title = read_member_label(part, read).title
                titled = sample.title is not None
        yield sample


def _read_label(part: SampleFile, read: Read, sample: _SourceSample) -> None:
    """Take the label of a sample from one of its files, or note that the file holds none."""
    found = read_member_label(part, read)
    sample.title = found.title or sample.title
    if found.label is not None:
        sample.label, sample.rank = found.label, LABEL_ENDINGS.index(part.kind)
    elif part.kind != "txt":
        sample.no_label = f"no label: its .{part.kind} of {part.size:,} bytes holds none"


def _choose_image(sample: _SourceSample, part: _ShardPart, seen: set[int]) -> None:
    """Add the image of a sample to the part, or the reason why there is none.

    Args:
        sample: the sample.
        part: receives the image or the rejects.
        seen: hashes of the names of the shard's images so far; the image's is added.
    """
    images = [image for image in sample.images if image.regular]
    for image in sample.images:
        if not image.regular:
            part.reject(image.name, "no image: a link")
    if not images:
        if not sample.images and sample.label is not None:
            part.reject(sample.key, "no image in the sample")
        return
    # `KEY.jpg` is the image where there is a `KEY.mask.png` beside it.
    plain = [image for image in images if "." not in image.ending]
    chosen = plain if len(plain) == 1 else images
    if len(chosen) > 1 or sample.label is None:
        reason = "two images in one sample" if len(chosen) > 1 else sample.no_label
        for image in chosen:
            part.reject(image.name, reason)
        return
    (image,) = chosen
    name = image.name
    if hash(name) in seen:
        name = f"{name} (at byte {image.offset})"
    seen.add(hash(name))
    part.images.append(_LabelledImage(name, image.offset, image.size, sample.label, sample.title))
