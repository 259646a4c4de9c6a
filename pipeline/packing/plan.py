"""Settings of a build, and its plan: the split, label and place of every image, none opened yet."""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from pipeline.dataset.images import SIZE, Fit, Size
from pipeline.dataset.jpeg_header import MAX_PIXELS, ImageError
from pipeline.dataset.tar import escape
from pipeline.options import BuildConfig
from pipeline.remote.filesystem import is_remote, is_web
from pipeline.sources import Listing, Reject, SplitName, find_other_splits, scan
from pipeline.sources.listing import ROWS_AT_A_TIME
from pipeline.tools.errors import UsageError
from pipeline.tools.text import hide_credentials

CHUNKS = 32
"""Number of chunks of a small set: enough to keep all workers busy."""

SMALLEST_CHUNK, LARGEST_CHUNK = 64, 1024
"""Images in a chunk: enough that its statistics (0.8 MB) are little beside it, and few enough
that a worker that is killed loses seconds."""

FORMAT = 1
"""Version of the files that a build resumes from, and of its pixels, order and hashes; files of
another version cannot be mixed with them."""

UNLIKE_OUTPUT = (
    "out", "train", "val", "val_labels", "test", "test_labels", "max_rejects",
    "strict", "workers", "json", "add", "split", "replace", "new_classes", "retry_rejects",
)  # fmt: skip
"""Settings that change no byte of a shard, except through the images they name."""

Places = npt.NDArray[np.uint32]
"""Rows of images: 4 bytes each, for up to 4 billion of them."""

LEAST_KEPT = 8
"""JPEGs are decoded at 1/2, 1/4 or 1/8 only as long as this many times the pixels of the side
remain to which they are resampled.

Below that the scaled transform is no antialiased bicubic any more: on ImageNet originals, with 2
times as many pixels left, the image's PSNR falls from 58 to 37 dB, with 4 times to 42 dB.
"""
LONGEST = 65_500
"""Most pixels of a stored image's longer side, as of a JPEG."""
MOST_ASPECT = 20
"""Most times that the longer side of an image may have the shorter one's pixels, where it is
brought to a shorter side: of 40x4000, 300x30000 would be stored."""


class Sizing(NamedTuple):
    """Size to which images are brought."""

    fit: Fit = "square"
    """square: the central square, `size` on a side; shorter: `size` on the shorter side; none: as
    they are."""
    size: int = SIZE

    def resize(self, height: int, width: int) -> Size:
        """Return height and width of what an image of this size becomes.

        Raises:
            ImageError: too large.
        """
        if self.fit == "square":
            return self.size, self.size
        new, shorter = (height, width), min(height, width)
        if self.fit == "shorter":
            new = round(height * self.size / shorter), round(width * self.size / shorter)
            if max(height, width) > MOST_ASPECT * shorter:
                raise ImageError(
                    f"too long: {width}x{height} would be stored as {new[1]}x{new[0]}; its sides "
                    f"may differ by {MOST_ASPECT} times"
                )
        if max(new) > LONGEST or new[0] * new[1] > MAX_PIXELS:
            raise ImageError(f"too long: {width}x{height} would be stored as {new[1]}x{new[0]}")
        return new

    def choose_reduction(self, side: int) -> int:
        """Return the power of two by which a JPEG of this shorter side is decoded smaller."""
        factor = 1
        while self.fit != "none" and factor < 8 and side // (2 * factor) >= LEAST_KEPT * self.size:
            factor *= 2
        return factor


SQUARE = Sizing()


def mean_side(options: BuildConfig) -> int:
    """Return height and width of the mean image in pixels: 256 where images differ in size."""
    return options.size if options.fit == "square" else SIZE


@dataclass(frozen=True)
class ChunkPlan:
    """A chunk: rows `start` to `stop` of a listing, which follow each other in the source."""

    number: int
    listing: int
    start: int
    stop: int


@dataclass(frozen=True)
class BuildPlan:
    """The place of every image. Rows count through all listings, training first."""

    listings: tuple[Listing, ...]
    """Images of the training source, and of the validation and test source if there is one."""
    orders: dict[str, Places]
    """Per split the rows of its images in stored order, shuffled over the whole split."""
    held_out: npt.NDArray[np.bool_]
    """bool [n]: True for each row that is not trained on."""
    fingerprint: str
    """SHA-256 over everything that decides the bytes of the set but the content of the images."""
    notes: tuple[str, ...]
    """Sentences about what is not used, or read otherwise than a user may expect."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is a place in this list."""
        return self.listings[0].classes

    @property
    def images(self) -> int:
        """Number of images in all splits."""
        return sum(map(len, self.listings))

    @property
    def first_rows(self) -> list[int]:
        """The row of the first image of each listing."""
        return [0, *np.cumsum([len(listing) for listing in self.listings])[:-1].tolist()]

    def parts(self) -> Iterator[ChunkPlan]:
        """Cut all listings into chunks, in the order of their rows."""
        number = 0
        for place, listing in enumerate(self.listings):
            size = min(LARGEST_CHUNK, max(SMALLEST_CHUNK, -(-self.images // CHUNKS)))
            for start in range(0, len(listing), size):
                yield ChunkPlan(number, place, start, min(start + size, len(listing)))
                number += 1

    def name(self, row: int) -> str:
        """Return the full name of an image, for messages."""
        listing, place = self._find(row)
        return listing.full_name(place)

    @cached_property
    def _prefixes(self) -> list[list[str]]:
        return [_prefix_containers(listing) for listing in self.listings]

    def list_names(self, rows: Places) -> Iterator[str]:
        """Yield the names of images relative to their source: `cats/1.jpg`, `n0.tar/n0_1.JPEG`."""
        firsts, prefixes = self.first_rows, self._prefixes
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            some = rows[start : start + ROWS_AT_A_TIME]
            of_listing = np.searchsorted(firsts, some, side="right") - 1
            for number, row in zip(of_listing.tolist(), some.tolist(), strict=True):
                listing, place = self.listings[number], row - firsts[number]
                container = int(listing.rows["container"][place])
                yield prefixes[number][container] + listing.names[place]

    @property
    def rejected(self) -> int:
        """Number of files skipped by the scans."""
        return sum(listing.rejected for listing in self.listings)

    @property
    def lost(self) -> int:
        """Number of images behind the faults of damaged sources beyond one for each fault."""
        return sum(listing.lost for listing in self.listings)

    def make_reject(self, row: int, reason: str) -> Reject:
        """Return the reject of an image."""
        listing, place = self._find(row)
        return listing.make_reject(place, reason)

    def _find(self, row: int) -> tuple[Listing, int]:
        firsts = self.first_rows
        number = bisect.bisect_right(firsts, row) - 1
        return self.listings[number], row - firsts[number]


def make_plan(options: BuildConfig, scratch: Path) -> BuildPlan:
    """Scan the sources and shuffle their images.

    Args:
        options: the settings.
        scratch: local folder for the listings, needed as long as the plan is used.

    Raises:
        UsageError: a source that cannot work.
    """
    kind: dict[str, Any] = {"fields": options.members, "labelled": options.labels}
    kind["strict"] = options.strict
    listings = [scan(options.train, scratch / "train", split="train", **kind)]
    _refuse_empty_class(listings[0])
    first = np.arange(len(listings[0]), dtype=np.uint32)
    held = choose_held_out(listings[0], options.holdout, options.seed)
    split = {"train": first[~held]} | ({"val": first[held]} if options.holdout else {})
    for name, source in list_other_sources(options).items():
        listing = scan(
            source,
            scratch / name,
            split=name,
            classes=listings[0].classes if options.labels else None,
            labels=options.find_labels(name),
            numbered=listings[0].numbered,
            **kind,
        )
        split[name] = np.arange(len(listing), dtype=np.uint32) + np.uint32(len(held))
        held = np.concatenate([held, np.ones(len(listing), bool)])
        listings.append(listing)
    return BuildPlan(
        listings=tuple(listings),
        orders={
            name: np.random.default_rng([options.seed, *name.encode()]).permutation(rows)
            for name, rows in split.items()
        },
        held_out=held,
        fingerprint=compute_fingerprint(options, listings),
        notes=tuple(_collect_notes(options, listings)),
    )


def list_other_sources(options: BuildConfig) -> dict[SplitName, str]:
    """Return the sources of the splits beside the training's."""
    named: dict[SplitName, str | None] = {"val": options.val, "test": options.test}
    return {name: source for name, source in named.items() if source is not None}


def _collect_notes(options: BuildConfig, listings: Iterable[Listing]) -> Iterator[str]:
    for listing in listings:
        yield from listing.notes
    others = find_other_splits(options.train)
    named = {name: escape(hide_credentials(address)) for name, address in others.items()}
    if options.val is None and not options.holdout and "val" in named:
        yield (
            f"{named['val']} is not packed; give --val "
            f"{escape(hide_credentials(options.train))}, too, to pack it for validation"
        )
    # Shards of a source without "val" are validated on its "test".
    as_val = "val" not in named and options.val == options.train
    if options.test is None and "test" in named and not as_val:
        yield f"{named['test']} is not packed; to evaluate on it, name it by --test"


def _refuse_empty_class(listing: Listing) -> None:
    """Refuse training images that lack a class of their list, before hours of packing."""
    counts = np.zeros(len(listing.classes), np.int64)
    for start in range(0, len(listing) if listing.classes else 0, ROWS_AT_A_TIME):
        labels = listing.rows["label"][start : start + ROWS_AT_A_TIME]
        counts += np.bincount(labels, minlength=len(counts))
    if len(empty := np.flatnonzero(counts == 0)):
        others = f" and {len(empty) - 1:,} more" if len(empty) > 1 else ""
        raise UsageError(
            f"class {listing.classes[empty[0]]!r} (number {empty[0]}){others} of source "
            f"{hide_credentials(listing.source)} has no images; add some, or number the classes "
            "that have images from 0 on, without gaps"
        )


def describe_holdout(share: float, source: str) -> str:
    """Return the source of a validation split that is a share of the training source."""
    short = f"{share:g}"
    return f"{short if float(short) == share else share} of {source}"


def read_holdout(sources: Mapping[str, str]) -> float:
    """Return the share that `describe_holdout` wrote among the sources of the splits; 0: none."""
    train, val = sources.get("train"), sources.get("val", "")
    text = val.partition(" ")[0]
    with suppress(ValueError):
        share = float(text)
        if 0 < share < 1 and train is not None and val == f"{text} of {train}":
            return share
    return 0.0


def choose_held_out(listing: Listing, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose validation images of each class at random; each class keeps one in either split.

    Args:
        listing: the training source.
        share: of its images, 0 to below 1; 0: none.
        seed: of the build.

    Raises:
        UsageError: a class has one image.
    """
    if not share:
        return np.zeros(len(listing), np.bool_)
    labels = np.maximum(listing.rows["label"], 0)  # without classes, all are of one
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=len(listing.classes))
    held = np.zeros(len(labels), np.bool_)
    for label, stop in enumerate(np.cumsum(counts)):
        places = by_class[stop - counts[label] : stop]
        if len(places) < 2:
            raise UsageError(
                f"--holdout needs two images a class; {_describe_class(listing, label)} of "
                f"{hide_credentials(listing.source)} has {len(places)}: add images, remove the "
                "class, or give validation images with --val in place of --holdout"
            )
        count = min(len(places) - 1, max(1, round(len(places) * share)))
        held[np.random.default_rng([seed, label]).permutation(places)[:count]] = True
    return held


def _describe_class(listing: Listing, label: int) -> str:
    return f"class {listing.classes[label]!r}" if listing.classes else "the only one"


def compute_fingerprint(options: BuildConfig, listings: list[Listing]) -> str:
    """Hash settings and listings; the same names in another folder give the same hash."""
    digest = hashlib.sha256()
    for listing in listings:
        digest.update(_to_json_line([len(listing), *listing.classes]))
        for kind, address in listing.containers:
            digest.update(_to_json_line([kind, _relative_address(address, listing.source)]))
        columns = (listing.rows, listing.names.ends, listing.names.text, listing.members)
        for column in columns:
            for start in range(0, len(column), ROWS_AT_A_TIME):
                digest.update(column[start : start + ROWS_AT_A_TIME].tobytes())
    digest.update(_to_json_line([FORMAT, output_settings(options)]))
    return digest.hexdigest()


def describe_format() -> list[int]:
    """Return the versions and sizes that a build must share with the chunks it resumes from."""
    return [FORMAT, CHUNKS, SMALLEST_CHUNK, LARGEST_CHUNK]


def output_settings(options: BuildConfig) -> dict[str, Any]:
    """Return the settings on which the bytes of the set depend."""
    settings = {key: value for key, value in asdict(options).items() if key not in UNLIKE_OUTPUT}
    settings |= {name: list(settings[name]) for name in ("fields", "masks")}  # as JSON has them
    for name in (
        "size",
        "fit",
        "fields",
        "masks",
        "labels",
    ):  # a build that has none of them is what it was before them
        if settings[name] in (getattr(BuildConfig, name), []):
            del settings[name]
    if options.test is not None:
        settings["test"] = True  # the same listing may be that of another split
    return settings


def _prefix_containers(listing: Listing) -> list[str]:
    """Return what stands before the names of each container's images, relative to the source."""
    local = [one.address for one in listing.containers if not is_remote(one.address)]
    root = os.path.abspath(listing.source)
    if local and not all(os.path.join(one, "").startswith(os.path.join(root, "")) for one in local):
        root = os.path.commonpath(list(map(os.path.dirname, local)))  # of a glob
    prefixes, top = [], f"{listing.source.rstrip('/')}/"
    for one in listing.containers:
        name = hide_credentials(one.address)
        if not is_remote(one.address):
            name = os.path.relpath(one.address, root)
        elif one.kind == "folder":
            name = hide_credentials(f"{one.address}/".removeprefix(top).rstrip("/") or ".")
            name = unquote(name) if is_web(one.address) else name
        prefixes.append("" if name == "." else f"{name.rstrip('/')}/")
    return prefixes


def _relative_address(address: str, source: str) -> str:
    """Return the path of a container relative to its source."""
    if is_remote(address):
        return address
    root = os.path.abspath(source)
    return os.path.relpath(address, root) if address.startswith(root) else address


def _to_json_line(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode(errors="surrogatepass") + b"\n"
