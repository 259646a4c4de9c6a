"""Lists folders of images: a folder per class, or an unsorted folder or tar with its ground truth.

No image is opened and, where the file system tells folders from files, no file is examined:
fourteen million files are listed at the speed at which the kernel names them.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pipeline.dataset.tar import escape, read_members
from pipeline.sources.imagenet import (
    GIVE_LABELS,
    GroundTruth,
    find_ground_truth,
    is_kit_name,
    is_list_name,
    parse_image_name,
    read_ground_truth,
    strip_ending,
)
from pipeline.sources.listing import WHOLE_FILE, ListingWriter
from pipeline.sources.names import (
    HIDDEN,
    IMAGE_ENDINGS,
    NO_FILE,
    NO_IMAGE,
    PARQUET,
    TAR,
    describe_no_image,
    is_archive,
    is_document,
    is_hidden,
    is_image,
    is_system,
    is_tar,
    member_name,
)
from pipeline.sources.tars import ImageBuffer, get_class, open_tar, select_files
from pipeline.tools.errors import SYSTEM_ERRORS, DamagedSource, UsageError, summarize_error

_SPLIT_FOLDERS = {
    "train": ("train", "training"), "val": ("val", "validation"), "test": ("test",),
}  # fmt: skip
ARCHIVES = ("ILSVRC2012_img_", "ILSVRC2010_images_")
"""Beginnings of the names of ILSVRC's archives; the split follows."""


class FolderContents(NamedTuple):
    """Names in one folder, each list sorted, without those that systems and tools leave."""

    folders: list[str]
    files: list[str]
    other: list[str]
    """Broken links, devices, pipes and sockets, which are never opened."""
    hidden: list[str]
    """Images, archives and folders that begin with a dot."""


def list_folder(folder: str | Path) -> FolderContents:
    """Return the names in `folder`; a link counts as its target.

    Raises:
        UsageError: it cannot be read.
    """
    inside = FolderContents([], [], [], [])
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_system(entry.name):
                    continue
                try:
                    if entry.name[0] == ".":
                        if is_image(entry.name) or is_archive(entry.name) or entry.is_dir():
                            inside.hidden.append(entry.name)
                    elif entry.is_file():
                        inside.files.append(entry.name)
                    elif entry.is_dir():
                        inside.folders.append(entry.name)
                    else:
                        inside.other.append(entry.name)
                except OSError:  # a link to itself, or into a folder without permission
                    inside.other.append(entry.name)
    except OSError as error:
        raise _folder_error(folder, error) from error
    for names in inside:
        names.sort()  # the order of a file system is arbitrary
    return inside


def add_folder(folder: Path, class_name: str, writer: ListingWriter) -> None:
    """Add the images below `folder`, in a container for each folder that holds any."""
    for path, inside in _walk(os.path.abspath(folder), writer):
        images = select_images(path, inside.files, writer)
        for name in inside.other:
            writer.reject(f"{path}/{name}", NO_FILE)
        for name in inside.hidden:
            writer.reject(f"{path}/{name}", HIDDEN)
        if images:
            writer.add(writer.container("folder", path), class_name, images)


def choose_split(inside: FolderContents, split: str, source: str) -> str | None:
    """Return the folder or tar of one split in a folder that holds several; None if it holds none.

    Args:
        inside: content of the folder.
        split: `train`, `val` or `test`.
        source: the folder, for messages.

    Raises:
        UsageError: it holds only other splits.
    """
    found = {
        name: [
            *(one for one in inside.files if one in {f"{start}{name}.tar" for start in ARCHIVES}),
            *(entry for entry in folders if entry in inside.folders),
        ]
        for name, folders in _SPLIT_FOLDERS.items()
    }
    # A class may well be called "train", but not beside nothing else than a "val" or a "test".
    others = set(inside.folders) - {*itertools.chain(*_SPLIT_FOLDERS.values())}
    tars = [name for name in inside.files if name.startswith(ARCHIVES)]
    pair = found["train"], found["val"]
    if not all(pair) and (others or not any(pair)) and not tars:
        return None
    if not found[split]:
        raise UsageError(
            f"source {escape(source)} has no {split}: it holds "
            f"{', '.join(map(escape, sorted({*inside.folders, *tars})))}; name the folder or tar "
            f"of the {split} images"
        )
    return found[split][0]


def check_files(
    source: str, files: Iterable[str], used: Collection[str], writer: ListingWriter
) -> None:
    """Reject or refuse the files of a folder of classes, or of splits, that are neither.

    Args:
        source: the folder, for messages.
        files: names of its files.
        used: those that are a class or a split.
        writer: takes the rejects.

    Raises:
        UsageError: an image or an archive: a class may be behind it.
    """
    for name in files:
        if is_image(name):
            raise UsageError(
                f"image {escape(f'{source}/{name}')} lies outside a class; "
                "put it into a folder named as its class"
            )
        if name in used or is_list_name(name) or is_document(name):
            continue
        if is_archive(name):
            raise UsageError(
                f"{escape(f'{source}/{name}')} is an archive that is not looked into, or "
                "compressed; unpack it to a .tar first if it is a class (images do not get "
                "smaller), else move it away"
            )
        writer.reject(f"{source}/{name}", NO_IMAGE)


def select_images(path: str, files: list[str], writer: ListingWriter) -> list[str]:
    """Return the images among the files of a folder that have all their members beside them."""
    endings = tuple(f".{field}" for field in writer.fields)
    members = {name for name in files if name.endswith(endings)}
    images, used = [], set[str]()
    for name in files:
        if name in members:
            continue
        if is_image(name):
            beside = [member_name(name, field) for field in writer.fields]
            used.update(beside)
            if lacking := [one for one in beside if one not in members]:
                writer.reject(f"{path}/{name}", f"it has no {lacking[0]} beside it")
            else:
                images.append(name)
        elif not writer.labelled and is_document(name):
            writer.ignore(Counter([f".{name.rpartition('.')[2]}"]), f"{path}/{name}")
        else:
            writer.reject(f"{path}/{name}", describe_no_image(name))
    for name in sorted(members - used):
        writer.reject(f"{path}/{name}", "no image of its name is beside it")
    return images


def find_image_below(
    folder: Path, endings: tuple[str, ...] = (*IMAGE_ENDINGS, TAR, PARQUET)
) -> str | None:
    """Return the path of a file in or below a folder that is, or may hold, an image; or None."""
    for path, inside in _walk(os.path.abspath(folder)):
        for name in inside.files:
            if name.lower().endswith(endings):
                return f"{path}/{name}"
    return None


def _walk(top: str, writer: ListingWriter | None = None) -> Iterator[tuple[str, FolderContents]]:
    """Yield each folder once, subfolders before their parent.

    Raises:
        DamagedSource: a folder cannot be read, and there is no writer to note it.
    """
    # A link to the source or above it would bring the images of other classes in.
    above = {*Path(top).resolve().parents, *Path(top).parents}
    seen = {_read_identity(str(folder)) for folder in above}
    todo: list[tuple[str, FolderContents | None]] = [(top, None)]
    while todo:
        path, inside = todo.pop()
        if inside is not None:
            yield path, inside
            continue
        try:
            if (identity := _read_identity(path)) in seen:  # a link that leads back up
                continue
            seen.add(identity)
            inside = list_folder(path)
        except DamagedSource as error:
            if writer is None:
                raise
            writer.add_fault(error, path)
            continue
        todo.append((path, inside))
        todo += [(f"{path}/{name}", None) for name in reversed(inside.folders)]


def _read_identity(path: str) -> tuple[int, int]:
    try:
        status = Path(path).stat()
    except OSError as error:
        raise _folder_error(path, error) from error
    return status.st_dev, status.st_ino


def _folder_error(folder: str | Path, error: OSError) -> DamagedSource:
    """Return the error for a folder.

    Raises:
        OSError: `error` says nothing about it.
    """
    if error.errno in SYSTEM_ERRORS:
        raise error
    name, why = str(error.filename or folder), summarize_error(error)
    message = f"folder {escape(name)} cannot be read ({why}); mend it"
    return DamagedSource(message, name, 0, f"the folder cannot be read: {why}")


_NO_CLASS = frozenset(
    {"", "val", "validation", "test"}
    | {f"{start}{name}" for start in ARCHIVES for name in ("val", "test")}
)
"""Names of folders in a tar of validation or test images that are no classes."""


def find_loose_in_folder(folder: Path) -> str | None:
    """Return the first image of a folder that holds images and no folder or tar of a class."""
    inside = list_folder(folder)
    tars = filter(is_tar, inside.files)
    if not all(map(is_kit_name, (*inside.folders, *tars))):
        return None
    return next(filter(is_image, inside.files), None)


def find_loose_in_tar(tar: Path) -> str | None:
    """Return the first image of a tar if it lies in no folder of a class."""
    with suppress(DamagedSource), open_tar(str(tar)) as file:
        for member in read_members(file, str(tar), lenient=True):
            name = member.name
            if not member.regular or is_hidden(name) or is_system(name):
                continue
            if is_tar(name):
                return None
            if is_image(name):
                folder = get_class(name)
                known = folder == "" or (folder in _NO_CLASS and parse_image_name(name) is not None)
                return name if known else None
    return None


def add_flat_folder(folder: Path, truth: GroundTruth, writer: ListingWriter) -> None:
    """Add the images of a folder with the classes that `truth` has for them."""
    found = ImageBuffer(writer, "folder", os.path.abspath(folder))
    inside = list_folder(folder)
    for name in inside.other:
        found.reject(name, NO_FILE)
    for name in inside.hidden:
        found.reject(name, HIDDEN)
    names = (name for name in inside.files if name != truth.file.name and not is_list_name(name))
    _add_labelled(((name, 0, WHOLE_FILE) for name in names), found, truth)


def add_flat_tar(tar: Path, truth: GroundTruth, writer: ListingWriter) -> None:
    """Add the images of a tar with the classes that `truth` has for them."""
    found = ImageBuffer(writer, "tar", os.path.abspath(tar))
    with open_tar(found.address) as file:
        members = read_members(file, found.address, lenient=True)
        files = select_files(members, found)
        _add_labelled((member[:3] for member in files), found, truth)


def read_labels(source: Path, image: str, labels: str | None) -> GroundTruth:
    """Return the labels of unsorted images, from a file given by the user or found beside them.

    Args:
        source: folder or tar.
        image: name of one of the images.
        labels: value of --val-labels or --test-labels.

    Raises:
        UsageError: there are no labels, or they cannot be parsed.
    """
    if labels is not None:
        return read_ground_truth(Path(labels), image)
    if (numbered := parse_image_name(image)) is None:
        raise UsageError(
            f"image {escape(f'{source}/{image}')} lies outside a class; put it into a folder "
            f"named as its class, or {GIVE_LABELS}"
        )
    if (found := find_ground_truth(source, image)) is None:
        kind = "validation" if numbered.part == "val" else "test"
        raise UsageError(
            f"{kind} set {escape(str(source))} has no ground truth in or beside it; {GIVE_LABELS}"
        )
    return found


def _add_labelled(
    files: Iterable[tuple[str, int, int]], found: ImageBuffer, truth: GroundTruth
) -> None:
    """Add files (name, place, size) of one container.

    Raises:
        UsageError: none of them has a label, or a ground truth has fewer lines than images.
    """
    labels, list_name = truth.labels, escape(str(truth.file))
    missing = dict.fromkeys(labels)  # in order
    with found.until_fault():
        for name, place, size in files:
            key = strip_ending(name)
            if not is_image(name):
                found.reject(name, describe_no_image(name))
            elif key in labels:
                found.add(labels[key], name, place, size)
                missing.pop(key, None)
            else:
                numbered = parse_image_name(name)
                if truth.stem and numbered is not None and numbered.stem == truth.stem:
                    raise UsageError(
                        f"labels {list_name} have {len(labels):,} lines, and {escape(name)} is "
                        f"image {numbered.number:,} of {escape(found.address)}; give the whole file"
                    )
                found.reject(name, f"no label: {list_name} has none for it")
    if not found.writer.images:
        found.writer.faults.refuse()
        raise UsageError(
            f"labels {list_name} name none of the images of {escape(found.address)}, but "
            f"such as {escape(next(iter(labels)))}; {GIVE_LABELS}"
        )
    for key in missing:
        found.reject(key, f"no image: {list_name} has a label for it")
