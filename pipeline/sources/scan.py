"""Detects the kind of a source and lists its images."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pipeline.dataset.tar import escape
from pipeline.remote.filesystem import is_remote
from pipeline.sources.folders import (
    add_flat_folder,
    add_flat_tar,
    add_folder,
    find_loose_in_folder,
    find_loose_in_tar,
    list_folder,
    read_labels,
)
from pipeline.sources.imagenet import find_titles, is_kit_name
from pipeline.sources.listing import Listing, ListingWriter, is_image
from pipeline.sources.parquet import is_parquet, scan_parquet
from pipeline.sources.tars import add_class_tar, add_tar
from pipeline.sources.webdataset import is_webdataset, scan_webdataset
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.text import hide_credentials

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")

SplitName = Literal["train", "val"]

_FOLDERS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "validation"),
}


def scan(
    source: str,
    scratch: Path,
    *,
    split: SplitName,
    classes: Sequence[str] | None = None,
    labels: str | None = None,
    numbered: bool = False,
) -> Listing:
    """List the images of a source without opening them.

    Args:
        source: a folder, tar, parquet file, or set of shards, as in the package's docstring;
            local, or an address.
        scratch: folder for the files of this listing alone.
        split: part to list if the source holds several.
        classes: class list of the training split, if this is another split of the same set;
            without it the sorted class names of `source` become the list.
        labels: file with the classes of unsorted images; by default searched beside them.
        numbered: `Listing.numbered` of the training split.

    Raises:
        UsageError: nothing there, no classes, a class without images, an unknown class, no
            labels where some are needed, or an archive that cannot be read.
    """
    source = source.removeprefix("file://")
    writer = ListingWriter(scratch, source)
    try:
        if (listing := _scan_labelled(source, writer, split, classes, numbered)) is not None:
            return _refuse_labels(listing, labels)
        if is_remote(source):
            raise UsageError(
                f"source {escape(hide_credentials(source))} is an address, but not of parquet "
                "files or WebDataset shards; fetch it first, and name the local copy"
            )
        path = find_split(Path(source), split)
        # What lies in the part may be of another kind than what lies around it.
        if path != Path(source):
            listing = _scan_labelled(str(path), writer, split, classes, numbered)
        if listing is not None:
            return _refuse_labels(listing, labels)
        return _scan_local(path, writer, classes, labels)
    except DuetError:  # a store that does not answer is an OSError, too
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # that is our own folder, where the listing is written
        raise UsageError(
            f"source {escape(source)} cannot be listed: {escape(str(error.filename or source))} "
            f"fails ({error.strerror or error}); mend it"
        ) from error


def find_other_split(source: str) -> str | None:
    """Return the validation part of a training source, for a hint; None if it has none."""
    path = Path(source.removeprefix("file://"))
    try:
        train, val = find_split(path, "train"), find_split(path, "val")
    except (UsageError, OSError):
        return None
    return None if train == val else str(val)


def find_split(source: Path, split: SplitName) -> Path:
    """Return the folder or tar of one split, where a source holds several; else the source.

    Raises:
        UsageError: the source does not exist, or holds only the other split.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise UsageError(
            f"source {escape(str(source))} does not exist; name a folder or a tar of images"
        )
    kaggle = (source / "Data" / "CLS-LOC", source / "ILSVRC" / "Data" / "CLS-LOC")
    source = next(filter(Path.is_dir, kaggle), source)
    inside = list_folder(source)
    found = {
        name: [
            *(entry for entry in inside.files if entry == f"ILSVRC2012_img_{name}.tar"),
            *(entry for entry in folders if entry in inside.folders),
        ]
        for name, folders in _FOLDERS.items()
    }
    # A class may well be called "train", but not beside nothing else than a "val" or a "test".
    others = set(inside.folders) - {*_FOLDERS["train"], *_FOLDERS["val"], "test"}
    tars = [name for name in inside.files if name.startswith("ILSVRC2012_img_")]
    if not all(found.values()) and (others or not any(found.values())) and not tars:
        return source
    if not found[split]:
        raise UsageError(
            f"source {escape(str(source))} has no {split}: it holds "
            f"{', '.join(map(escape, sorted({*inside.folders, *tars})))}; name the folder or tar "
            f"of the {split} images"
        )
    return source / found[split][0]


def _scan_labelled(
    source: str,
    writer: ListingWriter,
    split: SplitName,
    classes: Sequence[str] | None,
    numbered: bool,
) -> Listing | None:
    """List a source of parquet files or WebDataset shards; None if it is neither."""
    if is_parquet(source):
        return scan_parquet(source, writer, split, classes, numbered)
    if is_webdataset(source):
        return scan_webdataset(source, writer, split, classes, numbered)
    return None


def _scan_local(
    source: Path, writer: ListingWriter, classes: Sequence[str] | None, labels: str | None
) -> Listing:
    """List folders and tars."""
    is_tar = source.is_file()
    loose = find_loose_in_tar(source) if is_tar else find_loose_in_folder(source)
    titles: dict[str, str] = {}
    if loose is not None:
        truth = read_labels(source, loose, labels)
        titles = truth.titles
        (add_flat_tar if is_tar else add_flat_folder)(source, truth, writer)
        listing = writer.finish(truth.classes if classes is None else classes)
    else:
        (add_tar if is_tar else _add_classes)(source, writer)
        listing = _refuse_labels(writer.finish(classes), labels)
    titles = titles or find_titles(source, listing.classes)
    if not titles:
        return listing
    return replace(listing, titles=tuple(titles.get(name, name) for name in listing.classes))


def _add_classes(source: Path, writer: ListingWriter) -> None:
    """Add a folder that holds a folder or a tar per class."""
    inside = list_folder(source)
    folders = [name for name in inside.folders if not is_kit_name(name)]
    tars = [name for name in inside.files if name.endswith(".tar") and not is_kit_name(name)]
    for name in inside.files:
        if is_image(name):
            raise UsageError(
                f"image {escape(f'{source}/{name}')} lies outside a class; "
                "put it into a folder named as its class"
            )
    for name in inside.other:  # all images of a class may be behind it
        raise UsageError(
            f"{escape(f'{source}/{name}')} is a link that leads nowhere, or a device; "
            "mend or remove it"
        )
    if not folders and not tars:
        if packed := [name for name in inside.files if name.endswith(COMPRESSED)]:
            raise UsageError(
                f"{escape(f'{source}/{packed[0]}')} is compressed; unpack it to a .tar first "
                "(images do not get smaller)"
            )
        raise UsageError(
            f"source {escape(str(source))} is empty; "
            "it needs a folder (or a tar) of images per class"
        )
    both = set(folders) & {name.removesuffix(".tar") for name in tars}
    if both:
        raise UsageError(
            f"class {min(both)!r} is both a folder and a tar in source {escape(str(source))}"
            "; merge them"
        )
    for name in sorted([*folders, *tars], key=lambda name: name.removesuffix(".tar")):
        class_name = name.removesuffix(".tar") if name in tars else name
        writer.need_class(class_name)
        add = add_class_tar if name in tars else add_folder
        add(source / name, class_name, writer)


def _refuse_labels(listing: Listing, labels: str | None) -> Listing:
    """Refuse labels given by the user for images that have labels of their own."""
    if labels is not None:
        raise UsageError(
            f"source {escape(listing.source)} says itself of which class its images are; "
            f"leave --val-labels {escape(labels)} out"
        )
    return listing
