"""Lists folders of images in a store: a folder per class, read where they lie.

s3://bucket/train/CLASS/*.jpg    gs://...    hf://datasets/OWNER/NAME/...    https://host/train/

Each folder is one listing, which the store gives in pages; several are asked for at a time. In
memory are the names of these folders. A web server is taken by the links of its index pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import unquote

from pipeline.dataset.tar import escape
from pipeline.remote.answers import is_permanent
from pipeline.remote.filesystem import (
    Client,
    RetryPolicy,
    Unreachable,
    check_address,
    is_web,
    join_name,
    retry,
)
from pipeline.sources.folders import FolderContents, check_files, choose_split, select_images
from pipeline.sources.listing import WHOLE_FILE, Listing, ListingWriter
from pipeline.sources.names import HIDDEN, is_archive, is_image, is_system
from pipeline.sources.paths import scan_each
from pipeline.tools.errors import UsageError
from pipeline.tools.text import hide_credentials


class StoreFolderPart(NamedTuple):
    """One folder of a class."""

    address: str
    inside: FolderContents
    sizes: dict[str, int]
    """Bytes of each file, so far as the store tells."""


def scan_store_folders(
    source: str, writer: ListingWriter, split: str, classes: Sequence[str] | None
) -> Listing | None:
    """List the images of a folder in a store.

    Args:
        source: address, as the user named it.
        writer: an empty listing, which the images are added to.
        split: `train` or `val`, if the folder has one for each.
        classes: class list of the training split if this is another split of the same set.

    Returns:
        None if nothing is listed there, as of most web servers.

    Raises:
        UsageError: as `ListingWriter.finish`; files that may be a class and are not read.
        Unreachable: the store does not answer.
    """
    check_address(source, "source", chain=False)
    client = Client(source, lists=True)
    top = ListedFolder(client, source.rstrip("/"), client.path.rstrip("/"))
    found = top.list()
    if not found.inside.folders and not found.inside.files:
        return None
    if (name := choose_split(found.inside, split, hide_credentials(source))) is not None:
        top = top.enter(name)
        found = top.list()
    if not writer.labelled:
        writer.kind = "a folder of images without labels"
        for part in top.walk():
            _add_part(part, "", writer)
        return writer.finish()
    writer.kind = "a folder of classes in a store"
    check_files(hide_credentials(top.address), found.inside.files, (), writer)
    for name in found.inside.hidden:
        writer.reject(f"{hide_credentials(top.address)}/{name}", HIDDEN)
    if not found.inside.folders:
        raise UsageError(
            f"source {escape(hide_credentials(top.address))} has no folders; it needs one of "
            "images for each class"
        )
    for name in found.inside.folders:
        writer.need_class(name)

    def walk_class(name: str) -> Iterator[tuple[str, StoreFolderPart]]:
        return ((name, part) for part in top.enter(name).walk())

    for name, part in scan_each(found.inside.folders, walk_class, remote=True):
        _add_part(part, name, writer)
    return writer.finish(classes)


class ListedFolder(NamedTuple):
    """A folder in a store."""

    client: Client
    address: str
    path: str
    """Its path in the file system."""

    def enter(self, name: str) -> ListedFolder:
        """Return a folder in this one."""
        names = (join_name(folder, name) for folder in (self.address, self.path))
        return ListedFolder(self.client, *names)

    def walk(self) -> Iterator[StoreFolderPart]:
        """Yield the folders in this one before itself, each once, in the order of their names."""
        found = self.list()
        for name in found.inside.folders:
            yield from self.enter(name).walk()
        yield found

    def list(self) -> StoreFolderPart:
        """Return what lies in the folder.

        Raises:
            Unreachable: the store does not answer.
        """
        safe = hide_credentials(self.address)
        entries = retry(self._request, safe, RetryPolicy(), error=Unreachable)
        inside, sizes = FolderContents([], [], [], []), dict[str, int]()
        for name, is_folder, size in sorted(entries):
            if is_system(name):
                continue
            if name[0] == ".":
                if is_folder or is_image(name) or is_archive(name):
                    inside.hidden.append(name)
            elif is_folder:
                inside.folders.append(name)
            else:
                inside.files.append(name)
                sizes[name] = WHOLE_FILE if size is None else size
        return StoreFolderPart(self.address, inside, sizes)

    def _request(self) -> set[tuple[str, bool, int | None]]:
        """Return name, whether it is a folder, and size of each entry, as the store lists them."""
        try:
            entries = self.client.system.ls(self.path, detail=True)
        except FileNotFoundError:
            return set()
        except Exception as error:
            if is_web(self.path) and is_permanent(error):  # it shows nobody what it has
                return set()
            raise
        finally:
            # Listings that the file system keeps would grow with the set.
            with suppress(FileNotFoundError):
                self.client.system.invalidate_cache(self.path)
        found, start = set(), f"{self.path}/"
        for entry in entries:
            full, is_folder = str(entry["name"]), entry["type"] == "directory"
            name = full.removeprefix(start).rstrip("/")
            if is_web(self.path):
                # Links of an index: to sort it, to the folder above, to elsewhere.
                if not full.startswith(start) or "?" in name or "#" in name:
                    continue
                is_folder, name = full.endswith("/"), unquote(name)
            # An object of the folder's own name marks a folder that was made by hand.
            if full.rstrip("/") != self.path and "/" not in name and name not in ("", ".", ".."):
                found.add((name, is_folder, entry.get("size")))
        return found


def _add_part(part: StoreFolderPart, class_name: str, writer: ListingWriter) -> None:
    """Add the images of a folder."""
    safe = hide_credentials(part.address)
    for name in part.inside.hidden:
        writer.reject(f"{safe}/{name}", HIDDEN)
    if images := select_images(safe, part.inside.files, writer):
        writer.add(
            writer.container("folder", part.address),
            class_name,
            images,
            sizes=[part.sizes[name] for name in images],
        )
