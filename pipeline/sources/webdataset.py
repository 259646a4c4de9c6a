"""Lists the images of WebDataset shards: tars in which `KEY.jpg` and `KEY.cls` are a sample.

SRC.tar    SRC/*.tar    SRC/train-{000000..001280}.tar    s3://bucket/train-{000..146}.tar
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from typing import BinaryIO, NamedTuple

from pipeline.dataset.samples import LABEL_ENDINGS, MAX_LABEL_BYTES, MemberLabel, parse_label
from pipeline.dataset.tar import Member, escape, read_members
from pipeline.remote.filesystem import hide_credentials, is_remote
from pipeline.sources.classes import LabelMapper
from pipeline.sources.listing import PICTURE_ENDINGS, Listing, ListingWriter
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
"""Samples that are in memory at a time."""
LOOK = 64
"""Members of the first shard that tell whether it is one."""
LARGEST_MANIFEST = 64 << 20

_KEY = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
"""webdataset's own: the key ends at the first dot of the base name, the rest is the ending."""
_META = re.compile(r"__[^/]*__($|/)")
"""Members that webdataset passes over."""


@dataclass
class _SourceSample:
    """Members that follow each other and have the same key."""

    key: str
    pictures: list[tuple[str, Member]] = field(default_factory=list)
    label: int | str | None = None
    rank: int = len(LABEL_ENDINGS)
    """Place in `LABEL_ENDINGS` of what the label was read from."""
    title: str | None = None
    no_label: str = "no label"
    """The reason why not, if there is none."""


class _LabelledImage(NamedTuple):
    name: str
    offset: int
    size: int
    label: int | str
    title: str | None


@dataclass
class _ShardPart:
    """Some samples of a shard that follow each other."""

    address: str
    pictures: list[_LabelledImage] = field(default_factory=list)
    rejects: list[tuple[str, str]] = field(default_factory=list)

    def reject(self, name: str, reason: str) -> None:
        """Note a member or a sample that cannot be packed."""
        self.rejects.append((f"{self.address}/{escape(name)}", reason))


def is_webdataset(source: str) -> bool:
    """Say whether a source is WebDataset shards: looks at the first members of the first tar.

    Tars of plain images, one a class, are none.

    Raises:
        UsageError: a brace range that cannot be read, or a first tar that is damaged.
        OSError: the first tar cannot be opened.
    """
    files = find_files(source, ENDING)
    if files is None:
        return False
    images, others = set[str](), set[str]()
    with open_file(files.addresses[0]) as file:
        for member in islice(read_members(file, files.addresses[0]), LOOK):
            key, ending = _split_name(member.name)
            if not member.regular or not key:
                continue
            if _is_image(ending):
                images.add(key)
            elif ending in ("json", "txt"):
                others.add(key)
            # A caption or a record beside each image is a sample, if without a label.
            if ending == "cls" or key in images & others:
                return True
    return False


def scan_webdataset(
    source: str, writer: ListingWriter, split: str, classes: Sequence[str] | None
) -> Listing:
    """List the images of a source for which `is_webdataset` holds.

    Args:
        source: as the user named it.
        writer: of the listing; nothing has been added yet.
        split: `train` or `val`, for folders whose shards are named so.
        classes: of the training split, when this is another one of the same set.

    Raises:
        UsageError: a damaged shard, labels that do not fit together; what the writer finds.
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
    """Return the shards of a split, and what lies beside them about classes."""
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
    kept, classes = [], []
    for picture in part.pictures:
        where = f"{part.address}/{escape(picture.name)}"
        if not labels.fits(picture.label):
            what = "number" if isinstance(picture.label, int) else "word"
            part.reject(picture.name, f"no label: {picture.label!r} is a {what}, unlike others")
            continue
        classes.append(labels.find_class(picture.label, where))
        if isinstance(picture.label, int) and picture.title:
            titles.setdefault(picture.label, picture.title)
        kept.append(picture)
    writer.add(
        writer.container("tar", part.address),
        classes,
        [picture.name for picture in kept],
        [picture.offset for picture in kept],
        [picture.size for picture in kept],
    )
    for reject in part.rejects:
        writer.reject(*reject)


def _scan_shard(address: str) -> Iterator[_ShardPart]:
    """Yield the samples of a shard, `SAMPLES` at a time."""
    part = _ShardPart(address)
    seen: set[int] = set()
    with open_file(address) as file:
        for sample in _group_samples(file, address):
            _choose_image(sample, part, seen)
            if len(part.pictures) + len(part.rejects) >= SAMPLES:
                yield part
                part = _ShardPart(address)
    yield part


def _group_samples(file: BinaryIO, address: str) -> Iterator[_SourceSample]:
    """Group the members of a shard as webdataset does."""
    members = ((*_split_name(member.name), member) for member in read_members(file, address))
    titled = True  # until a record beside a label has no readable name of the class
    for key, group in groupby(filter(itemgetter(0), members), key=itemgetter(0)):
        sample = _SourceSample(key)
        for _, ending, member in group:
            if _is_image(ending):
                sample.pictures.append((ending, member))
            elif not member.regular or ending not in LABEL_ENDINGS:
                continue
            elif LABEL_ENDINGS.index(ending) < sample.rank:
                _read_label(file, member, ending, sample)
            elif ending == "json" and titled and member.size <= MAX_LABEL_BYTES:
                file.seek(member.offset)
                sample.title = parse_label(ending, file.read(member.size)).title
                titled = sample.title is not None
        yield sample


def _read_label(file: BinaryIO, member: Member, ending: str, sample: _SourceSample) -> None:
    found = MemberLabel(None)
    if member.size <= MAX_LABEL_BYTES:
        file.seek(member.offset)
        found = parse_label(ending, file.read(member.size))
    sample.title = found.title or sample.title
    if found.label is not None:
        sample.label, sample.rank = found.label, LABEL_ENDINGS.index(ending)
    elif ending != "txt":
        sample.no_label = f"no label: its .{ending} of {member.size:,} bytes holds none"


def _choose_image(sample: _SourceSample, part: _ShardPart, seen: set[int]) -> None:
    """Note the image of a sample, or why there is none."""
    pictures = [(ending, member) for ending, member in sample.pictures if member.regular]
    for _, member in sample.pictures:
        if not member.regular:
            part.reject(member.name, "no image: a link")
    if not pictures:
        if not sample.pictures and sample.label is not None:
            part.reject(sample.key, "no image in the sample")
        return
    # `KEY.jpg` is the image where there is a `KEY.mask.png` beside it.
    plain = [member for ending, member in pictures if "." not in ending]
    chosen = plain if len(plain) == 1 else [member for _, member in pictures]
    if len(chosen) > 1 or sample.label is None:
        reason = "two images in one sample" if len(chosen) > 1 else sample.no_label
        for member in chosen:
            part.reject(member.name, reason)
        return
    name, offset, size, _ = chosen[0]
    if hash(name) in seen:
        name = f"{name} (at byte {offset})"
    seen.add(hash(name))
    part.pictures.append(_LabelledImage(name, offset, size, sample.label, sample.title))


def _split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and ending (`left.jpg`, in small letters); both may be ""."""
    match = None if _META.match(name) else _KEY.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


def _is_image(ending: str) -> bool:
    return f".{ending}".endswith(PICTURE_ENDINGS)
