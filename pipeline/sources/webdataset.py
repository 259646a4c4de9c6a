"""Lists the images of WebDataset shards: tars in which `KEY.jpg` and `KEY.cls` are a sample.

SRC.tar    SRC/*.tar    SRC/train-{000000..001280}.tar    s3://bucket/train-{000..146}.tar
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import BinaryIO, NamedTuple

from pipeline.dataset.members import find_member
from pipeline.dataset.samples import (
    IMAGE_KINDS,
    MAX_LABEL_BYTES,
    TORN,
    Read,
    Sample,
    SampleFile,
    SampleLabel,
    UnfitSample,
    find_label,
    find_torn,
    group_samples,
    is_meant,
    read_member_label,
)
from pipeline.dataset.tar import Member, escape, read_members
from pipeline.remote.filesystem import is_remote
from pipeline.sources.classes import LabelMapper
from pipeline.sources.listing import Listing, ListingWriter
from pipeline.sources.names import (
    HIDDEN,
    TAR,
    describe_special,
    is_hidden,
    is_image,
    is_system,
    is_tar,
)
from pipeline.sources.paths import (
    SourceFiles,
    base_name,
    find_files,
    read_small,
    scan_each,
    select_split,
    sibling_address,
)
from pipeline.sources.tars import open_tar
from pipeline.tools.errors import MEDIUM_ERRORS, DamagedSource, UsageError
from pipeline.tools.jsonl import parse_json
from pipeline.tools.text import hide_credentials

SAMPLES = 4096
"""Most samples of a shard that are in memory at a time."""
LOOK, LOOK_ON = 64, 1 << 14
"""Members of a tar that are examined to detect the kind of a source; and of one in doubt, 0.4 s."""
LARGEST_MANIFEST = 64 << 20
"""Size limit of a manifest or a list of classes in bytes."""


class _LabelledImage(NamedTuple):
    """An image to list."""

    name: str
    offset: int
    size: int
    label: int | str | None
    """None where labels are not asked for."""
    title: str | None
    members: list[tuple[int, int]]
    """Offset and size of each field."""


@dataclass
class _ShardPart:
    """Images and rejects of some samples that follow each other in a shard."""

    address: str
    images: list[_LabelledImage] = field(default_factory=list)
    rejects: list[tuple[str, str]] = field(default_factory=list)
    repeated: int = 0
    """Number of images whose name occurred before in the shard."""
    repeated_example: str = ""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of files that are not used, by ending."""
    example: str = ""
    """Name of such a file."""
    fault: DamagedSource | None = None
    """Damage, from which on the shard cannot be read."""

    def reject(self, name: str, reason: str) -> None:
        """Add a member or a sample that cannot be packed."""
        self.rejects.append((f"{self.address}/{escape(name)}", reason))

    def reject_unfit(self, unfit: Sequence[tuple[str, str, UnfitSample]]) -> None:
        """Add unfit samples, each with its name and its key."""
        torn = find_torn((key, error) for _, key, error in unfit)
        for name, key, error in unfit:
            self.reject(name, TORN if key in torn else str(error))

    def ignore(self, files: Iterable[SampleFile]) -> None:
        """Count files that are not used."""
        for file in files:
            self.ignored[f".{file.ending.lower()}"] += 1
            self.example = self.example or f"{self.address}/{escape(file.name)}"

    def skip(self, member: Member) -> None:
        """Take note of a member that belongs to no sample."""
        if is_system(member.name) or not is_image(member.name):
            return
        if is_hidden(member.name):
            self.reject(member.name, HIDDEN)
        elif not member.regular:
            self.reject(member.name, describe_special(member))


def is_webdataset(source: str, split: str = "train") -> bool:
    """Return whether a source is WebDataset shards, by the first members of its tars.

    Tars of images alone, such as classes, are no shards. Tars without either do not count.

    Args:
        source: folder, tar, glob, brace range or address, as the user named it.
        split: `train` or `val`; chooses among the shards of a folder by their names.

    Raises:
        UsageError: a brace range that cannot be read, or shards and other tars of images beside
            each other.
        OSError: a store does not answer.
    """
    files = find_files(source, TAR)
    if files is None:
        return False
    try:
        addresses = select_split(files, split, source)
    except UsageError:  # classes, too, may be called `train`
        addresses = files.addresses
    shard = plain = None
    for address in addresses:
        labelled = _is_labelled(address, LOOK)
        if labelled:
            shard = shard or address
        elif labelled is not None:
            plain = plain or address
        if is_remote(source) and (shard or plain):  # only shards can be used from there
            break
    # All labels may lie behind all images.
    if plain is None or is_remote(source):
        return shard is not None
    if _is_labelled(plain, LOOK_ON):
        return True
    if shard is not None:
        raise UsageError(
            f"source {escape(source)} holds WebDataset shards ({escape(base_name(shard))}) and "
            f"tars of images without labels ({escape(base_name(plain))}); name the files that are "
            "meant, or move the others away"
        )
    return False


def _is_labelled(address: str, look: int) -> bool | None:
    """Return whether the first `look` members of a tar hold labels; None without images, too."""
    images, others = set[str](), set[str]()
    inner = False
    with suppress(DamagedSource), open_tar(address) as file:
        members = read_members(file, address, lenient=True)
        for place, member in enumerate(islice(members, look)):
            inner = inner or is_tar(member.name)
            for sample in group_samples([member]):
                key, kind, near = sample.key, sample.parts[0].kind, place < LOOK
                if kind in IMAGE_KINDS:
                    images.add(key)
                elif kind == "json" or (near and kind == "txt"):
                    others.add(key)
                # An image and a caption or a record are a sample, if without a label.
                known = key in images & others and (near or "/" not in key)
                if known or (kind == "cls" and (near or key in images)):
                    return True
    return False if images or inner else None


def scan_webdataset(
    source: str,
    writer: ListingWriter,
    split: str,
    classes: Sequence[str] | None,
    numbered: bool = False,
) -> Listing:
    """List the images of a source for which `is_webdataset` holds.

    Args:
        source: folder, tar, glob, brace range or address, as the user named it.
        writer: an empty listing, which the images are added to.
        split: `train` or `val`; chooses among the shards of a folder by their names.
        classes: class list of the training split if this is another split of the same set.
        numbered: `Listing.numbered` of the training split.

    Raises:
        UsageError: labels that do not fit together, or as `LabelMapper.finish`.
        OSError: a shard cannot be read; of a store, `Unreachable`.
    """
    files = find_files(source, TAR)
    if files is None:
        raise UsageError(f"source {hide_credentials(source)} names no shards")
    addresses, labels = _select_shards(files, source, split, classes, numbered, writer)
    titles: dict[int, str] = {}
    repeated, example = 0, ""
    scan_shard = partial(_scan_shard, fields=writer.fields, labelled=writer.labelled)
    for part in scan_each(addresses, scan_shard, is_remote(source)):
        _add_part(part, writer, labels, titles)
        writer.ignore(part.ignored, part.example)
        repeated, example = repeated + part.repeated, example or part.repeated_example
    if repeated:
        writer.notes.append(
            f"{repeated:,} {'image has' if repeated == 1 else 'images have'} the name of one "
            f"before in the same shard; each is a sample of its own (as {example})"
        )
    return labels.finish(writer, titles) if writer.labelled else writer.finish()


def _select_shards(
    files: SourceFiles,
    source: str,
    split: str,
    classes: Sequence[str] | None,
    numbered: bool,
    writer: ListingWriter,
) -> tuple[tuple[str, ...], LabelMapper]:
    """Return the shards of a split, and the classes that a file beside them lists."""
    first = files.addresses[0]
    text = read_small(sibling_address(first, "manifest.json"), LARGEST_MANIFEST)
    try:
        table = parse_json(text or b"{}")
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
            source, [*filter(None, lines)], classes, numbered=numbered
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
    known = set().union(*inside.values())
    for address in files.addresses:
        if base_name(address) not in known:
            writer.reject(hide_credentials(address), "no shard: the manifest beside it lacks it")
    return chosen, labels


def _add_part(
    part: _ShardPart, writer: ListingWriter, labels: LabelMapper, titles: dict[int, str]
) -> None:
    """Add a part of a shard to the listing, and the readable names of numbers to `titles`."""
    kept, classes = [], []
    for image in part.images:
        if image.label is None:
            kept.append(image)
            continue
        if (reason := labels.why_unfit(image.label)) is not None:
            part.reject(image.name, reason)
            continue
        classes.append(labels.find_class(image.label, f"{part.address}/{escape(image.name)}"))
        if isinstance(image.label, int) and image.title:
            titles.setdefault(image.label, image.title)
        kept.append(image)
    writer.add(
        writer.container("tar", part.address),
        classes if writer.labelled else "",
        [image.name for image in kept],
        [image.offset for image in kept],
        [image.size for image in kept],
        members=[image.members for image in kept],
    )
    for reject in part.rejects:
        writer.reject(*reject)
    if part.fault is not None:
        writer.add_fault(part.fault, part.address)


class _UntilFault:
    """The members of a tar as far as it can be read."""

    def __init__(self, members: Iterator[Member]) -> None:
        self._members = members
        self.fault: DamagedSource | None = None
        """Damage, from which on the tar cannot be read."""

    def __iter__(self) -> Iterator[Member]:
        try:
            yield from self._members
        except DamagedSource as error:
            self.fault = error


def _scan_shard(
    address: str, fields: Sequence[str] = (), labelled: bool = True
) -> Iterator[_ShardPart]:
    """Yield the samples of a shard, `SAMPLES` at a time, as far as it can be read."""
    try:
        file = open_tar(address)
    except DamagedSource as error:
        yield _ShardPart(address, fault=error)
        return
    with file:
        yield from _scan_samples(file, address, fields, labelled)


def _scan_samples(
    file: BinaryIO, address: str, fields: Sequence[str], labelled: bool
) -> Iterator[_ShardPart]:
    """Yield the samples of a shard, `SAMPLES` at a time."""
    part = _ShardPart(address)
    seen: set[int] = set()
    unfit: list[tuple[str, str, UnfitSample]] = []  # name and key of each
    titled = True  # False once the record beside a label has no readable name of the class

    read = partial(_read_label, file)
    members = _UntilFault(read_members(file, address, lenient=True))
    for sample in group_samples(members, lambda one: part.skip(one)):  # noqa: B023 - the last
        own = sample.without(fields) if fields else sample
        try:
            image = own.find_image()
            found = find_label(sample, read) if labelled else None
            others = [find_member(sample, name) for name in fields]
        except UnfitSample as error:
            names = _name_unfit(own, read, labelled)
            unfit += [(name, sample.key, error) for name in names]
            part.ignore(() if names else sample.parts)
            if len(unfit) >= SAMPLES * 16:
                part.reject_unfit(unfit)
                unfit = []
            continue
        label, title, used = None, None, [image, *others]
        if found is not None:
            label, title = found.label, found.title
            used.append(found.file)
            if titled and title is None:
                title, record = _read_title(sample, found, read)
                titled = record is None or title is not None
                used += [record] if record and title else []
        part.ignore(file for file in sample.parts if file not in used)
        name = image.name
        if hash(name) in seen:
            part.repeated += 1
            part.repeated_example = part.repeated_example or f"{address}/{escape(name)}"
            name = f"{name} (at byte {image.offset})"
        seen.add(hash(name))
        places = [(other.offset, other.size) for other in others]
        part.images.append(_LabelledImage(name, image.offset, image.size, label, title, places))
        if len(part.images) + len(part.rejects) >= SAMPLES:
            yield part
            part = _ShardPart(address)
    part.reject_unfit(unfit)
    part.fault = members.fault
    yield part


def _read_label(file: BinaryIO, offset: int, size: int) -> bytes:
    try:
        file.seek(offset)
        return file.read(size)
    except OSError as error:
        if error.errno not in MEDIUM_ERRORS:
            raise
        raise UnfitSample(f"its label cannot be read: {error.strerror}") from error


def _name_unfit(sample: Sample, read: Read, labelled: bool) -> list[str]:
    """Return the names under which an unfit sample is rejected; none if it is not meant as one."""
    images = [part.name for part in sample.parts if part.kind in IMAGE_KINDS]
    if images or is_meant(sample):
        return images or [sample.key]
    if not labelled:
        return []
    try:
        find_label(sample, read)
    except UnfitSample:
        return []
    return [sample.key]


def _read_title(
    sample: Sample, found: SampleLabel, read: Read
) -> tuple[str | None, SampleFile | None]:
    """Return the class name in the record beside a label, and the record if there is one."""
    for part in sample.parts:
        if part.kind == "json" and part != found.file and part.size <= MAX_LABEL_BYTES:
            with suppress(UnfitSample):  # its disk cannot read it
                return read_member_label(part, read).title, part
    return None, None
