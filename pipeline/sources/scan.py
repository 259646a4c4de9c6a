"""Detects the kind of a source and lists its images."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from pipeline.dataset.samples import UnknownClasses
from pipeline.dataset.tar import escape
from pipeline.remote.filesystem import is_remote
from pipeline.sources.folders import (
    ARCHIVES,
    FolderContents,
    add_flat_folder,
    add_flat_tar,
    add_folder,
    check_files,
    choose_split,
    find_image_below,
    find_loose_in_folder,
    find_loose_in_tar,
    list_folder,
    read_labels,
)
from pipeline.sources.imagenet import PATCHES, find_titles, is_kit_name, is_list_name
from pipeline.sources.listing import Listing, ListingWriter
from pipeline.sources.names import (
    HIDDEN,
    IMAGE_ENDINGS,
    PARQUET,
    TAR,
    is_archive,
    is_document,
    is_system,
    is_tar,
)
from pipeline.sources.parquet import is_parquet, scan_parquet
from pipeline.sources.paths import (
    SourceFiles,
    base_name,
    detect_split,
    find_files,
    strip_file_scheme,
)
from pipeline.sources.store_folders import scan_store_folders
from pipeline.sources.tars import add_class_tar, add_tar
from pipeline.sources.webdataset import is_webdataset, scan_webdataset
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.text import hide_credentials

SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)


def scan(
    source: str,
    scratch: Path,
    *,
    split: SplitName,
    classes: Sequence[str] | None = None,
    labels: str | None = None,
    numbered: bool = False,
    fields: Sequence[str] = (),
    labelled: bool = True,
    strict: bool = False,
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
        fields: other members of each sample, which are listed with it.
        labelled: False for images without classes: all in or below a folder, in tars, or in parquet
            files.
        strict: refuse a tar, a parquet file, a row group or a folder that is damaged; else it is
            skipped from the fault on, as a reject and a note.

    Raises:
        UsageError: nothing there, no classes, a class without images, an unknown class, no
            labels where some are needed, or damage that leaves nothing.
    """
    source = strip_file_scheme(source)
    writer = ListingWriter(scratch, source, fields, labelled, strict)
    try:
        return _scan_any(source, writer, split, classes, labels, numbered)
    except UsageError as error:
        if writer.kind is None:
            raise
        if isinstance(error, UnknownClasses):
            message = f"{error}; the source was taken for {writer.kind}"
            raise UnknownClasses(message, error.names) from error
        raise UsageError(f"{error}; the source was taken for {writer.kind}") from error
    except DuetError:  # a store that does not answer is an OSError, too
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise  # that is our own folder, where the listing is written
        raise UsageError(
            f"source {escape(source)} cannot be listed: {escape(str(error.filename or source))} "
            f"fails ({error.strerror or error}); mend it"
        ) from error


def _scan_any(
    source: str,
    writer: ListingWriter,
    split: SplitName,
    classes: Sequence[str] | None,
    labels: str | None,
    numbered: bool,
) -> Listing:
    if (listing := _scan_labelled(source, writer, split, classes, numbered)) is not None:
        return _refuse_labels(listing, labels)
    if is_remote(source):
        if (listing := scan_store_folders(source, writer, split, classes)) is not None:
            return _refuse_labels(listing, labels)
        raise UsageError(
            f"source {escape(hide_credentials(source))} is an address, but not of parquet "
            "files with images, nor of WebDataset shards (a .tar whose first samples have a .cls "
            "or .json), nor of a folder that is listed there; fetch it first, and name the local "
            "copy"
        )
    path = find_split(Path(source), split)
    if split == "train" and (path.parent / PATCHES).is_file():
        writer.notes.append(
            f"{escape(str(path.parent))}/{PATCHES} is not applied: the images that it replaces are "
            "packed as they are"
        )
    if not writer.labelled and path.is_dir():
        writer.kind = "a folder of images without labels"
        add_folder(path, "", writer)
        return writer.finish()
    # What lies in the part may be of another kind than what lies around it.
    if path != Path(source):
        if path.is_dir():
            inside = list_folder(path.parent)
            starts = "ILSVRC2012_", "ILSVRC2010_"
            archives = {name for name in inside.files if name.startswith(starts)}
            _check_files(path.parent, inside, archives, writer)
        if (listing := _scan_labelled(str(path), writer, split, classes, numbered)) is not None:
            return _refuse_labels(listing, labels)
    return _scan_local(path, writer, classes, labels)


def find_other_splits(source: str) -> dict[str, str]:
    """Return a file or folder of the "val" and "test" part beside a source's "train", for hints."""
    source, others = strip_file_scheme(source), ("val", "test")
    try:
        for ending in (TAR, PARQUET):
            files = find_files(source, ending)
            if files is None:
                continue
            split_of = {}
            for address in reversed(files.addresses):
                inside = address.rfind("/") if files.folder is None else len(files.folder)
                split_of[detect_split(address[inside + 1 :])] = address
            if "train" in split_of and not split_of.keys().isdisjoint(others):
                return {name: split_of[name] for name in others if name in split_of}
        if is_remote(source) or (train := find_split(Path(source), "train")) == Path(source):
            return {}
        beside = list_folder(train.parent)
    except (DuetError, OSError):
        return {}
    tests = [one for one in beside.files if one.startswith(tuple(f"{one}test" for one in ARCHIVES))]
    tests += [name for name in beside.folders if name == "test"]
    found = {"test": str(train.parent / tests[0])} if tests else {}
    with suppress(UsageError):
        found["val"] = str(find_split(Path(source), "val"))
    return found


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
    name = choose_split(inside, split, str(source))
    return source if name is None else source / name


def _scan_labelled(
    source: str,
    writer: ListingWriter,
    split: SplitName,
    classes: Sequence[str] | None,
    numbered: bool,
) -> Listing | None:
    """List a source of parquet files or WebDataset shards; None if it is neither."""
    parquet, shards = find_files(source, PARQUET), find_files(source, TAR)
    in_parquet = is_parquet(source)
    in_shards = is_webdataset(source, split) if writer.labelled else shards is not None
    if in_parquet and in_shards and parquet and shards:
        raise _mixed_error(
            source,
            f"parquet files with images ({base_name(parquet.addresses[0])})",
            f"WebDataset shards ({base_name(shards.addresses[0])})",
        )
    if not in_shards and parquet and not in_parquet:  # without images; they are refused by name
        alone = is_remote(source) or find_image_below(Path(source), (*IMAGE_ENDINGS, TAR)) is None
        in_parquet = alone
    if not in_shards and not in_parquet:
        return None
    writer.kind = "WebDataset shards" if in_shards else "parquet files"
    if files := shards if in_shards else parquet:
        _check_beside(source, files, writer, split)
    return (scan_webdataset if in_shards else scan_parquet)(
        source, writer, split, classes, numbered
    )


def _check_beside(source: str, files: SourceFiles, writer: ListingWriter, split: SplitName) -> None:
    """Reject or refuse what lies beside shards or parquet files and is no known bystander.

    Raises:
        UsageError: an archive, or a folder with images: they may be of the same set.
    """
    for address in files.beside:
        name = base_name(address)
        if is_system(name) or is_list_name(name):
            continue
        if not is_remote(address) and Path(address).is_dir():
            if image := find_image_below(Path(address)):
                first = base_name(files.addresses[0])
                raise _mixed_error(source, f"{writer.kind} ({first})", f"a folder with {image}")
        elif name.lower().endswith((TAR, PARQUET)) or is_document(name):
            continue  # neither shards nor with images, or it would be of another kind
        elif not is_archive(name):
            writer.reject(
                hide_credentials(address), f"it lies beside {writer.kind}, and is not read"
            )
        elif detect_split(name) in (None, split):
            raise UsageError(
                f"{escape(hide_credentials(address))} lies beside {writer.kind}, and is an archive "
                "that is not read; unpack it to a .tar if it is one of them, else move it away"
            )


def _mixed_error(source: str, *kinds: str) -> UsageError:
    return UsageError(
        f"source {escape(hide_credentials(source))} holds {' and '.join(map(escape, kinds))}; name "
        "the files or the folder that are meant, or move the others away"
    )


def _scan_local(
    source: Path, writer: ListingWriter, classes: Sequence[str] | None, labels: str | None
) -> Listing:
    """List folders and tars."""
    if not writer.labelled:
        raise UsageError(f"source {escape(str(source))} is neither a folder, nor a tar or parquet")
    one_tar = source.is_file()
    loose = find_loose_in_tar(source) if one_tar else find_loose_in_folder(source)
    titles: dict[str, str] = {}
    if writer.fields and (loose is not None or one_tar):
        raise _fields_error(source, writer)
    if loose is not None:
        truth = read_labels(source, loose, labels)
        titles, writer.kind = truth.titles, "unsorted images with a list of their labels"
        (add_flat_tar if one_tar else add_flat_folder)(source, truth, writer)
        listing = writer.finish(truth.classes if classes is None else classes)
    else:
        writer.kind = "a tar of classes"
        (add_tar if one_tar else _add_classes)(source, writer)
        listing = _refuse_labels(writer.finish(classes), labels)
    titles = titles or find_titles(source, listing.classes)
    if not titles:
        return listing
    return replace(listing, titles=tuple(titles.get(name, name) for name in listing.classes))


def _fields_error(source: Path, writer: ListingWriter) -> UsageError:
    return UsageError(
        f"source {escape(str(source))} has no .{writer.fields[0]} beside each image; other members "
        "come from folders of classes, WebDataset shards and parquet files"
    )


def _add_classes(source: Path, writer: ListingWriter) -> None:
    """Add a folder that holds a folder or a tar per class."""
    writer.kind = "a folder of classes"
    inside = list_folder(source)
    tars = {name for name in inside.files if is_tar(name) and not is_kit_name(name)}
    _check_files(source, inside, tars, writer)
    places = [(name, name) for name in inside.folders if not is_kit_name(name)]
    places += [(name[: -len(TAR)], name) for name in tars]
    if tars and writer.fields:
        raise _fields_error(source, writer)
    if not places:
        raise UsageError(
            f"source {escape(str(source))} is empty; "
            "it needs a folder (or a tar) of images per class"
        )
    counts = Counter(class_name for class_name, _ in places)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise UsageError(
            f"class {min(twice)!r} is both a folder and a tar (or two tars) in source "
            f"{escape(str(source))}; merge them"
        )
    for class_name, name in sorted(places):
        writer.need_class(class_name)
        add = add_class_tar if name in tars else add_folder
        add(source / name, class_name, writer)


def _check_files(
    source: Path, inside: FolderContents, used: Collection[str], writer: ListingWriter
) -> None:
    """Reject or refuse the files of a folder of classes, or of splits, that are neither.

    Raises:
        UsageError: an image, an archive or a hidden folder with images: a class may be behind it.
    """
    check_files(str(source), inside.files, used, writer)
    for name in inside.hidden:
        path = source / name
        if path.is_dir() and find_image_below(path):
            raise UsageError(
                f"folder {escape(str(path))} begins with a dot, so it is no class; rename it if "
                "it is one, else move it away"
            )
        if not path.is_dir():
            writer.reject(str(path), HIDDEN)
    for name in inside.other:  # all images of a class may be behind it
        raise UsageError(
            f"{escape(f'{source}/{name}')} is a link that leads nowhere, or a device; "
            "mend or remove it"
        )


def _refuse_labels(listing: Listing, labels: str | None) -> Listing:
    """Refuse labels given by the user for images that have labels of their own."""
    if labels is not None:
        raise UsageError(
            f"source {escape(listing.source)} says itself of which class its images are; "
            f"leave --val-labels {escape(labels)} out"
        )
    return listing
