"""Files that a source names: a path or an address, a folder, a glob or a brace range.

/data/train-{000000..001280}.tar    s3://bucket/set/*.parquet    https://host/train-00.tar
"""

from __future__ import annotations

import glob
import io
import itertools
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache, partial
from typing import BinaryIO, NamedTuple, TypeVar, cast

import braceexpand

from pipeline.remote.answers import explain_refusal
from pipeline.remote.file import RemoteFile
from pipeline.remote.filesystem import (
    Client,
    RetryPolicy,
    Unreachable,
    check_address,
    is_remote,
    is_web,
    join_name,
    local_path,
    retry,
)
from pipeline.sources.names import is_archive, is_document, is_image
from pipeline.tools.errors import DuetError, UsageError
from pipeline.tools.text import hide_credentials
from pipeline.tools.watchdog import BackgroundCall

MOST_FILES = 1_000_000
THREADS = 8
"""Files of a store that are scanned at a time: one stream does not fill the network."""

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}

_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)")

T = TypeVar("T")
Item = TypeVar("Item")


class SourceFiles(NamedTuple):
    """Files that a source names, in the order in which they are read."""

    addresses: tuple[str, ...]
    """Absolute paths or addresses."""
    folder: str | None
    """The folder that was named; None if the files themselves were."""
    beside: tuple[str, ...] = ()
    """Other files and folders where the files lie, or above them in the folder that was named."""


def base_name(address: str) -> str:
    """Return the file name at the end of a path or an address."""
    return address.rstrip("/").rpartition("/")[2]


def sibling_address(address: str, name: str) -> str:
    """Return the path or address of file `name` in the same folder as the file at `address`."""
    return join_name(address.rstrip("/").rpartition("/")[0], name)


def strip_file_scheme(source: str) -> str:
    """Return the path that `file:///folder` names; any other source as it is."""
    return str(local_path(source)) if source.lower().startswith("file://") else source


def find_files(source: str, ending: str) -> SourceFiles | None:
    """Return the files with this ending (`.tar`) that a source names, or None if it names none.

    A folder names those in it, or else in its folder `data`, or else in its folders `train`,
    `val`, `validation`, `test`.

    Raises:
        UsageError: a brace range that cannot be read, or with a file that is missing; an address
            with nothing there.
        StoreError: the store does not answer.
    """
    source = strip_file_scheme(source)
    pattern = any(mark in source for mark in "{*?[")
    if is_remote(source):
        return _find_remote(source, ending, pattern)
    if os.path.isdir(source):  # noqa: PTH112 - Path.is_dir fails over a long range of names
        return _find_in_folders(os.path.abspath(source), ending, _list_local)
    if os.path.exists(source):  # noqa: PTH110
        named = source.lower().endswith(ending)
        return SourceFiles((os.path.abspath(source),), None) if named else None
    if not pattern:
        return None
    found = []
    for name in expand_braces(source):
        if (mask := _escape_existing(name, os.path.exists)) is not None:
            found += sorted(glob.glob(mask, recursive=True))  # noqa: PTH207 - any root
        elif os.path.exists(name) or not name.lower().endswith(ending):  # noqa: PTH110
            found.append(name)
        else:
            raise UsageError(f"source {source} names {name}, which does not exist; mend the range")
    return _select_files((os.path.abspath(name) for name in found), ending, None)


def select_split(files: SourceFiles, split: str, source: str) -> tuple[str, ...]:
    """Return the files of one split, by the words `train`, `val`, `test` in their names.

    All files are returned if none has such a word, or if the user named the files themselves and
    they are of one split.

    Raises:
        UsageError: the folder has files of other splits only.
    """
    inside = len(files.folder) + 1 if files.folder else None
    splits = [
        detect_split(base_name(address) if inside is None else address[inside:])
        for address in files.addresses
    ]
    known = sorted({name for name in splits if name})
    if not known or (files.folder is None and len(known) == 1 and None not in splits):
        return files.addresses
    safe = hide_credentials(source)
    if None in splits:
        other = base_name(files.addresses[splits.index(None)])
        raise UsageError(
            f"source {safe} has files of {' and '.join(known)}, and others such as {other}; "
            "name the files themselves"
        )
    # Some sets call their labelled second part "test".
    wanted = "test" if split == "val" and "val" not in known else split
    chosen = tuple(
        address for address, name in zip(files.addresses, splits, strict=True) if name == wanted
    )
    if not chosen:
        raise UsageError(
            f"source {safe} has files of {' and '.join(known)}, none of {split} "
            f"(such as {base_name(files.addresses[0])}); name the files themselves"
        )
    return chosen


def detect_split(name: str) -> str | None:
    """Return the split that a file (`train-00.tar`, `train/00.tar`) belongs to by its name."""
    for part in reversed(name.split("/")):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None


def open_file(address: str, policy: RetryPolicy | None = None) -> BinaryIO:
    """Open a file for reading at any place, not buffered.

    Raises:
        OSError: it cannot be opened; of a store, `Unreachable`.
        UsageError, SetupError: an address that cannot be used.
    """
    if is_remote(address):
        return cast(BinaryIO, RemoteFile(address, policy))
    return cast(BinaryIO, open(address, "rb", buffering=0))


def read_small(address: str, limit: int) -> bytes | None:
    """Return the content of a file of at most `limit` bytes; None if it is missing or longer."""
    try:
        with open_file(address, RetryPolicy(attempts=2, first_delay=0.2)) as file:
            if file.seek(0, io.SEEK_END) > limit:
                return None
            file.seek(0)
            return file.read()
    except (OSError, DuetError):
        return None


def scan_each(
    items: Iterable[Item], do: Callable[[Item], Iterator[T]], remote: bool
) -> Iterator[T]:
    """Yield what `do` yields for each item, in their order; items of a store several at a time.

    Of a store, what `do` yields is held in memory for `THREADS` items.
    """
    if not remote:
        yield from itertools.chain.from_iterable(map(do, items))
        return
    calls = (BackgroundCall(partial(lambda item: list(do(item)), item)) for item in items)
    running = deque(itertools.islice(calls, THREADS))
    while running:
        yield from running.popleft().result()
        running.extend(itertools.islice(calls, 1))


def _find_remote(source: str, ending: str, pattern: bool) -> SourceFiles | None:
    check_address(source, "source", chain=False)
    client = Client(source, lists=True)
    safe = hide_credentials(source)
    if pattern and (found := _expand_remote(source, client)) != [source]:
        return _select_files(found, ending, None)
    if client.path.lower().endswith(ending):
        return SourceFiles((source,), None)
    # Names of folders have dots, too: "imagenet-1.0", and the revision of "set@v1.2".
    if is_web(source) or any(
        is_kind(client.path) for is_kind in (is_image, is_archive, is_document)
    ):
        return None

    list_names = cache(partial(list_folder, client=client))
    if not list_names(source.rstrip("/")):
        raise UsageError(f"source {safe} is not there, or is empty; look for a slip in the address")
    return _find_in_folders(source.rstrip("/"), ending, list_names)


def list_folder(address: str, client: Client | None = None) -> list[str]:
    """Return the addresses of what is in a folder of a store; none if it is not there.

    Args:
        address: of the folder.
        client: of this store, which lists; by default one of its own.

    Raises:
        UsageError, SetupError: as `check_address`.
        Unreachable: the store does not answer, or refuses.
    """
    if client is None:
        check_address(address, "source", chain=False)
        client = Client(address, lists=True)

    def list_store() -> list[str]:
        try:
            names = client.system.ls(address, detail=False)
            return [client.system.unstrip_protocol(name) for name in names]
        except FileNotFoundError as error:
            if explain_refusal(error):  # nobody can tell whether there is something
                raise
            return []

    return retry(list_store, hide_credentials(address), RetryPolicy(), error=Unreachable)


def _expand_remote(source: str, client: Client) -> list[str]:
    """Return the addresses that a pattern names; the source alone if it is none after all."""
    safe, found = hide_credentials(source), []

    @cache
    def exists(name: str) -> bool:
        if is_web(source):  # it cannot be searched: brackets are part of a name
            return "*" not in base_name(name)
        return retry(
            lambda: bool(client.system.exists(name)), safe, RetryPolicy(), error=Unreachable
        )

    for name in expand_braces(source):
        mask = _escape_existing(name, exists)
        if mask is not None and is_web(source):
            raise UsageError(
                f"source {safe}: a web server cannot be searched; name the files with a brace "
                "range such as train-{000..146}.tar"
            )
        if mask is None:
            found.append(name)
            continue
        find = partial(lambda mask: client.system.glob(mask), mask)
        hits = retry(find, safe, RetryPolicy(), error=Unreachable)
        found += [client.system.unstrip_protocol(hit) for hit in sorted(hits)]
    return found


def _escape_existing(name: str, exists: Callable[[str], bool]) -> str | None:
    """Return a glob pattern in which names that exist as they are stand for themselves.

    Args:
        name: path or address; brackets of its host (`[::1]`) are no pattern.
        exists: tells whether there is a file or a folder of that very name.

    Returns:
        None if nothing in it is a pattern.
    """
    host = re.match(r"[^/]*://[^/]*/?", name)
    path = host[0] if host else ""
    parts, is_pattern = [path], False
    for part in re.split("(/)", name[len(path) :]):
        path += part
        if any(mark in part for mark in "*?["):
            is_pattern = is_pattern or not exists(path)
            part = part if is_pattern else glob.escape(part)
        parts.append(part)
    return "".join(parts) if is_pattern else None


def _list_local(folder: str) -> list[str]:
    with suppress(OSError):
        return [f"{folder}/{name}" for name in os.listdir(folder)]
    return []


def _find_in_folders(
    folder: str, ending: str, list_names: Callable[[str], list[str]]
) -> SourceFiles | None:
    inside = sorted(list_names(folder))
    found = _select_files(inside, ending, folder)
    for places in ({"data"}, set(_SPLIT_WORDS)):
        if found is None:
            parts = [name for name in inside if base_name(name) in places]
            below = itertools.chain.from_iterable(sorted(list_names(name)) for name in parts)
            found = _select_files(below, ending, folder)
            if found is not None:
                above = tuple(name for name in inside if name not in parts)
                found = found._replace(beside=above + found.beside)
    return found


def _select_files(names: Iterable[str], ending: str, folder: str | None) -> SourceFiles | None:
    chosen, beside = list[str](), list[str]()
    for name in names:
        fits = name.lower().endswith(ending) and not base_name(name).startswith(".")
        (chosen if fits else beside).append(name)
    return SourceFiles(tuple(chosen), folder, tuple(beside)) if chosen else None


def expand_braces(source: str) -> list[str]:
    """Expand `{a,b}` and `{000..146}`, as webdataset does.

    Raises:
        UsageError: too many names, or braces that cannot be read.
    """
    safe = hide_credentials(source)
    # The library writes a range out before it yields the first name.
    for first, last in _RANGE.findall(source):
        if len(first) > 12 or len(last) > 12 or abs(int(last) - int(first)) >= MOST_FILES:
            raise UsageError(f"source {safe} names more than {MOST_FILES:,} files")
    try:
        names = list(itertools.islice(braceexpand.braceexpand(source), MOST_FILES + 1))
    except ValueError as error:
        raise UsageError(f"source {safe}: {error}; mend the braces") from error
    if len(names) > MOST_FILES:
        raise UsageError(f"source {safe} names more than {MOST_FILES:,} files")
    return names
