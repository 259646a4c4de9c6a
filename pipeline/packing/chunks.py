"""Stage one: a run of source images -> images of their size, encoded, hashed and counted.

A chunk is two files in the build's work folder: `NNNNNN.bin`, the encoded images end to end, each
followed by the other members of its sample, and `NNNNNN.npz`, their places, hashes, rejects and
pixel sums. The `.npz` is written last and marks the chunk as done.
"""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, count, groupby
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from PIL import Image

from pipeline.dataset.image_stats import Sums
from pipeline.dataset.images import SIZE, Pixels, decode_mask, encode_npy, turn_upright
from pipeline.dataset.jpeg_header import (
    MAX_CPU_SECONDS,
    ImageError,
    limit_process,
    limit_time,
    to_one_line,
)
from pipeline.dataset.members import MEMBER_DTYPE, MOST_MEMBER_BYTES, Members, describe_large
from pipeline.options import BuildConfig
from pipeline.packing.duplicates import perceptual_hash
from pipeline.packing.known import KnownImages
from pipeline.packing.plan import BuildPlan, ChunkPlan, Sizing, mean_side
from pipeline.packing.resize import (
    PreparedImage,
    cut_square,
    describe_error,
    encode,
    prepare_image,
    read_frame,
    resample,
)
from pipeline.remote.filesystem import StoreError
from pipeline.remote.target import WORK, Target
from pipeline.sources import Container, SourceReader, Unreadable, open_reader
from pipeline.tools.errors import DuetError
from pipeline.tools.files import describe_foreign
from pipeline.tools.jsonl import parse_json
from pipeline.tools.processes import Crash, call_isolated

FOLDER = f"{WORK}/chunks"

HASH_BYTES = 32
GROUP, GROUP_BYTES = 16, 16 << 20
"""Images that take each step together, and the bytes in memory that end a group sooner. One image
at a time, the code of every step would be fetched into the processor's cache again."""

PACKED_DTYPE = np.dtype(
    [
        ("packed", "?"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc", "<u4"),
        ("hash", "u1", HASH_BYTES),
        ("width", "<u2"),
        ("height", "<u2"),
    ]
)
"""An image of a chunk: whether it could be packed, and then its byte range in the `.bin`, the
CRC-32 of those bytes, its perceptual hash, and its size in pixels."""


@dataclass(frozen=True)
class ChunkJob:
    """One chunk to pack, with everything that a worker on any node needs."""

    target: Target
    number: int
    options: BuildConfig
    containers: tuple[Container, ...]
    rows: npt.NDArray[np.void]
    """`sources.listing.ROW_DTYPE`; their containers count in `containers`."""
    names: tuple[str, ...]
    trains: npt.NDArray[np.bool_]
    """bool [n]; whether the pixels of each image count in the statistics."""
    members: npt.NDArray[np.void]
    """`sources.listing.MEMBER_PLACE` [n, fields]: places of the other members of each sample."""
    known: KnownImages | None = None
    """Images that are not packed again."""
    careful: bool = False
    """Decode each image in a process of its own: a process died on this chunk."""


@dataclass(frozen=True)
class ChunkDone:
    """Result of packing one chunk, as the driver receives it."""

    images: int
    rejected: int


@dataclass(frozen=True)
class PackedChunk:
    """The `.npz` of a chunk, read back."""

    packed: npt.NDArray[np.void]
    """`PACKED_DTYPE` [n]"""
    reasons: dict[int, str]
    """Place in the chunk -> reason for rejecting that image."""
    sums: Sums
    members: Members
    """`MEMBER_DTYPE` [n, fields]: byte ranges in the `.bin`, and CRC-32s."""


class SourceSample(NamedTuple):
    """Bytes of a sample as its source has them."""

    image: bytes
    members: dict[str, bytes]
    """Content of each field."""


class PreparedSample(NamedTuple):
    """An image as it is to be stored, and the other members of its sample."""

    image: PreparedImage
    members: dict[str, bytes]


Found = TypeVar("Found", SourceSample | str, PreparedSample | str)
"""A sample, or the reason why it is rejected."""


class ChunkError(Exception):
    """Files of some chunks are missing or damaged; they must be packed again."""

    def __init__(self, *numbers: int) -> None:
        super().__init__(*numbers)
        self.numbers = numbers


def chunk_data_name(number: int) -> str:
    """Return the name of the file with the images of a chunk."""
    return f"{FOLDER}/{number:06d}.bin"


def chunk_facts_name(number: int) -> str:
    """Return the name of the file with the facts of a chunk."""
    return f"{FOLDER}/{number:06d}.npz"


def make_chunk_job(
    plan: BuildPlan,
    part: ChunkPlan,
    options: BuildConfig,
    target: Target,
    known: KnownImages | None = None,
) -> ChunkJob:
    """Return the job that packs one chunk of the plan."""
    listing = plan.listings[part.listing]
    rows = np.array(listing.rows[part.start : part.stop])
    used, rows["container"] = np.unique(rows["container"], return_inverse=True)
    first = plan.first_rows[part.listing]
    return ChunkJob(
        target=target,
        number=part.number,
        options=options,
        containers=tuple(listing.containers[place] for place in used),
        rows=rows,
        names=tuple(listing.names[place] for place in range(part.start, part.stop)),
        trains=~plan.held_out[first + part.start : first + part.stop],
        members=np.array(listing.members[part.start : part.stop]),
        known=known,
    )


class FetchedFacts(NamedTuple):
    """The `.npz` of a chunk or a shard, and the sizes of the files that it describes."""

    content: bytes
    """Content of the `.npz`; empty if it is missing."""
    sizes: list[int | None]
    """Size of each file in bytes; None if it is missing."""


def fetch_facts(target: Target, name: str, about: Sequence[str]) -> FetchedFacts:
    """Read an `.npz`, and the sizes of the files `about`; safe to call from several threads.

    Raises:
        StoreError: the store does not answer.
    """
    try:
        return FetchedFacts(target.read(name), [target.size(file) for file in about])
    except StoreError:
        raise
    except OSError:
        return FetchedFacts(b"", [])


def parse_chunk(fetched: FetchedFacts, number: int, images: int, fields: int = 0) -> PackedChunk:
    """Return a chunk of so many images and fields.

    Only one thread may do this: NumPy parses its headers as Python, and of that CPython 3.11 keeps
    count in one place for all threads.

    Raises:
        ChunkError: it is missing or damaged, or its images are.
    """
    try:
        with np.load(io.BytesIO(fetched.content)) as arrays:
            sums = Sums(0)
            sums.images = int(arrays["pictures"])
            sums.image_sum, sums.outer = arrays["picture"], arrays["outer"]
            chunk = PackedChunk(
                packed=arrays["packed"],
                reasons=dict(parse_json(arrays["reasons"].tobytes())),
                sums=sums,
                members=arrays["members"] if fields else np.zeros((images, 0), MEMBER_DTYPE),
            )
        whole = chunk.packed.dtype == PACKED_DTYPE and len(chunk.packed) == images
        whole &= chunk.members.dtype == MEMBER_DTYPE and chunk.members.shape == (images, fields)
        size = sum(int(part["size"].sum(dtype=np.int64)) for part in (chunk.packed, chunk.members))
        if whole and fetched.sizes == [size]:
            return chunk
    except Exception as error:  # NumPy's reader raises anything on a damaged header
        raise ChunkError(number) from error
    raise ChunkError(number)


def pack_chunk(job: ChunkJob) -> ChunkDone:
    """Read, resize, encode and measure the images of a chunk; runs in a worker process.

    Raises:
        OSError: a container disappeared, or the target cannot be written.
        DuetError: with `careful`, an image's process was killed from outside.
    """
    import torch  # here: the process that plans a build does without it

    torch.set_num_threads(1)  # a core for each worker of the pool
    packed = np.zeros(len(job.rows), PACKED_DTYPE)
    members = np.zeros(job.members.shape, MEMBER_DTYPE)
    reasons: dict[int, str] = {}
    options, offset, places = job.options, 0, count()
    sums = Sums(mean_side(options))
    with job.target.create(chunk_data_name(job.number), durable=False) as file:
        for group in _group(_read_pixels(job)):
            samples: list[tuple[int, PreparedSample]] = []
            for found, place in zip(group, places, strict=False):
                if isinstance(found, str):
                    reasons[place] = found
                else:
                    samples.append((place, found))
            squares = [_central_square(sample.image.pixels) for _, sample in samples]
            contents = [_encode(sample.image, options) for _, sample in samples]
            hashes = [np.frombuffer(perceptual_hash(square), np.uint8) for square in squares]
            counted = []
            for (place, sample), square, data, image_hash in zip(
                samples, squares, contents, hashes, strict=True
            ):
                if job.known and (reason := job.known.find(job.target, data, image_hash)):
                    reasons[place] = reason
                    continue
                pixels = sample.image.pixels
                if job.trains[place]:
                    counted.append(pixels if options.fit == "square" else square)
                file.write(data)
                height, width = pixels.shape[:2]
                crc = isal_zlib.crc32(data)
                packed[place] = (True, offset, len(data), crc, image_hash, width, height)
                offset += len(data)
                for number, content in enumerate(sample.members.values()):
                    file.write(content)
                    members[place, number] = offset, len(content), isal_zlib.crc32(content)
                    offset += len(content)
            for pixels in counted:
                sums.add(pixels)
    others: dict[str, Any] = {"members": members} if members.size else {}
    with job.target.create(chunk_facts_name(job.number), durable=False) as file:
        np.savez(
            file,
            packed=packed,
            reasons=np.frombuffer(json.dumps(list(reasons.items())).encode(), np.uint8),
            pictures=np.uint32(sums.images),
            picture=sums.image_sum.astype(np.uint32),  # a chunk has far fewer than 2**24 images
            outer=sums.outer,
            **others,
        )
    return ChunkDone(len(packed), len(reasons))


def _group(found: Iterable[Found]) -> Iterator[list[Found]]:
    """Yield the samples of a chunk, and the reasons of rejects among them, in groups."""
    group: list[Found] = []
    held = 0
    for one in found:
        group.append(one)
        held += _count_bytes(one)
        if len(group) == GROUP or held >= GROUP_BYTES:
            yield group
            group, held = [], 0
    yield group


def _count_bytes(found: SourceSample | PreparedSample | str) -> int:
    """Return the bytes of a sample in memory."""
    if isinstance(found, str):
        return 0
    image = found.image
    held = len(image) if isinstance(image, bytes) else image.pixels.nbytes + len(image.jpeg or b"")
    return held + sum(map(len, found.members.values()))


def _central_square(pixels: Pixels) -> Pixels:
    """Return the 256x256 pixels by which images of any size are compared."""
    return pixels if pixels.shape[:2] == (SIZE, SIZE) else resample(pixels)


def _encode(image: PreparedImage, options: BuildConfig) -> bytes:
    if options.encoding == "raw":
        return encode_npy(image.pixels)
    return image.jpeg or encode(image.pixels, options.quality, options.chroma)


def _read_pixels(job: ChunkJob) -> Iterator[PreparedSample | str]:
    """Yield each image of a chunk with its members, or the reason why it is rejected."""
    for found in chain.from_iterable(_group(_read_samples(job))):
        if isinstance(found, str):
            yield found
        elif job.careful:
            yield _decode_isolated(found, job)
        else:
            yield _decode(found, job.options)


def _decode(sample: SourceSample, options: BuildConfig) -> PreparedSample | str:
    sizing, what = Sizing(options.fit, options.size), ""
    try:
        with limit_process():
            image = prepare_image(sample.image, sizing, options.min_side)
            members = dict(sample.members)
            for name in options.masks:
                what = f"its .{name}: "
                members[name] = prepare_mask(sample.members[name], sample.image, sizing)
            for name in options.fields:
                what = f"its .{name} is no JSON: "
                if name.rpartition(".")[2] == "json":
                    parse_json(members[name])
            return PreparedSample(image, members)
    except (ImageError, ValueError) as error:
        return f"{what}{to_one_line(error)}"
    except Exception as error:  # any error of a decoder rejects this image only
        return f"{what}cannot be decoded: {to_one_line(error) or type(error).__name__}"


def _decode_isolated(sample: SourceSample, job: ChunkJob) -> PreparedSample | str:
    """Decode an image in a process of its own, which may crash."""
    try:
        return call_isolated(_decode, sample, job.options)
    except Crash as crash:
        if crash.from_outside:
            raise DuetError(
                f"the process that packs chunk {job.number} was killed twice (out of memory?); "
                "run the same command again, with fewer --workers"
            ) from crash
        if crash.signal == signal.SIGVTALRM:
            return f"decoding it takes more than {MAX_CPU_SECONDS} s"
        return f"its decoder crashed ({crash})"


def _read_samples(job: ChunkJob) -> Iterator[SourceSample | str]:
    """Read the encoded images and their members, container by container."""
    fields = job.options.members
    images = zip(job.names, job.rows, job.members, strict=True)
    for number, group in groupby(images, key=lambda image: image[1]["container"]):
        found = list(group)
        wanted = [(name, int(row["size"])) for name, row, _ in found]
        with closing(open_reader(job.containers[number], fields=fields, wanted=wanted)) as reader:
            for name, row, places in found:
                try:
                    data = reader.read(name, int(row["place"]), int(row["size"]))
                    if (foreign := describe_foreign(data)) is not None:
                        yield f"no image: it is {foreign}"
                        continue
                    members = {
                        field: _read_member(reader, field, name, *place)
                        for field, place in zip(fields, places.tolist(), strict=True)
                    }
                    yield SourceSample(data, members)
                except Unreadable as error:
                    yield str(error)


def prepare_mask(mask: bytes, image: bytes, sizing: Sizing) -> bytes:
    """Return a mask cut, resampled to the nearest pixel and turned as its image is.

    Args:
        mask: a PNG as `decode_mask` takes it.
        image: the image, which `prepare_image` takes.
        sizing: the size.

    Returns:
        A PNG with the same values, and the same palette; itself where nothing changes.

    Raises:
        ImageError: it is no mask of this image; the message says why.
    """
    try:
        with limit_time():
            turn, stored = read_frame(image)
            shown = stored[::-1] if turn >= 5 else stored
            upright = decode_mask(mask, shown, turn)
            with Image.open(io.BytesIO(mask), formats=["PNG"]) as found:
                if sizing.fit == "none" and (found.height, found.width) == shown:
                    return mask
                palette = found.getpalette() if found.mode == "P" else None
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise what they please on damaged input
        raise ImageError(describe_error(error)) from error
    # Cut where the image is, which is turned last: a square's margins may differ by a pixel.
    pixels = turn_upright(upright, {6: 8, 8: 6}.get(turn, turn))
    if sizing.fit == "square":
        pixels = cut_square(pixels)
    height, width = sizing.resize(*pixels.shape[:2])
    small = Image.fromarray(pixels[:, :, 0]).resize((width, height), Image.Resampling.NEAREST)
    out = Image.fromarray(turn_upright(np.asarray(small)[:, :, None], turn)[:, :, 0])
    file = io.BytesIO()
    if palette is not None:  # Pillow cuts values to the bits that the length of a palette needs
        out.putpalette(palette + [0] * (3 * (int(pixels.max()) + 1) - len(palette)))
    out.save(file, "PNG")
    return file.getvalue()


def _read_member(reader: SourceReader, field: str, name: str, place: int, size: int) -> bytes:
    """Return the content of a member of the image `name`.

    Raises:
        Unreadable: it cannot be read, or is too large; the message names it.
    """
    try:
        content = reader.read_member(field, name, place, size)
    except Unreadable as error:
        raise Unreadable(f"its .{field}: {error}") from error
    if len(content) > MOST_MEMBER_BYTES:
        raise Unreadable(describe_large(field, len(content)))
    return content
