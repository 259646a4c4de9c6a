"""One encoded image of any kind -> RGB pixels of the size to store -> a JPEG.

Prepared as the paper's section 2 says: "Given a rectangular image, we first rescaled the image such
that the shorter side was of length 256, and then cropped out the central 256x256 patch from the
resulting image." The crop comes first here, and the resampling kernel is antialiased bicubic, which
also enlarges. In order:

    read_header     `jpeg_header`: size and kind; limits are checked before anything is decoded
    jpeg_path       plain JPEGs: libjpeg-turbo, then torch's resampling on bytes
    pillow_path     every other format, and JPEGs that libjpeg-turbo refuses or warns about
    to_srgb         color profile -> sRGB; on the small image, where it costs a fraction
    turn_upright    EXIF orientation
    encode          pixels -> JPEG

The JPEG path is twice as fast as Pillow on both steps. Torch's resampling is derived from Pillow's:
same kernel, same integer arithmetic but for the precision of the weights, so that a value differs
by at most 2 levels (in 0.3 % of the values by 1), and the bytes are the same with AVX-512, AVX2 or
neither. Pillow is told the formats by name, so that nothing reaches a decoder that starts programs
or reads files (EPS, PDF).
"""

from __future__ import annotations

import io
import logging
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, UnidentifiedImageError

from pipeline.dataset.images import (
    ORIENTATION,
    Pixels,
    Size,
    Undecodable,
    decode_image,
    read_exif_orientation,
    turn_upright,
    valid_orientation,
)
from pipeline.dataset.jpeg_header import (
    MAX_BYTES,
    MAX_OTHER_BYTES,
    ImageError,
    JpegHeader,
    check_size,
    limit_time,
    read_header,
)
from pipeline.options import Chroma
from pipeline.packing.formats import MAX_PROFILE, open_image
from pipeline.packing.plan import SQUARE, Sizing

JPEG = b"\xff\xd8"
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
SCRATCH = 4 * 2**20
"""Bytes of decoded images that are put in the same place each time, where the cache has them."""
BAND = 2**20
"""Values of a deep image that are converted at once."""
MOST_FRACTION = 1.1
"""Largest value of an image of fractions: white is 1, and resampling may have gone beyond it."""
BITS, PHOTOMETRIC, SAMPLE_FORMAT, SIGNED = 258, 262, 339, 2
"""Numbers of TIFF's tags, and the sample format of signed numbers."""
SAME_LEVELS = 1
"""Levels by which a profile may move a colour and still count as sRGB."""
ACCURATE = 96
"""Quality from which on libjpeg-turbo's own interface, which simplejpeg uses, is accurate."""
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}

_stderr = threading.Lock()
logging.getLogger("PIL").setLevel(logging.CRITICAL + 1)  # what is wrong with an image is a reason


class PreparedImage(NamedTuple):
    """An image as it is to be stored."""

    pixels: Pixels
    """uint8 [h, w, 3], RGB."""
    jpeg: bytes | None = None
    """The JPEG of these pixels, if the image was one and stays as it is."""


def prepare_image(data: bytes, sizing: Sizing, min_side: int = 8) -> PreparedImage:
    """Decode an image and bring it to size; arguments, steps and errors of `decode_square`.

    With fit `none` a plain JPEG that decodes without a warning stays as it is: its profile is not
    applied, and it is turned by whoever decodes it.
    """
    if len(data) > MAX_BYTES:
        raise ImageError(f"{len(data)} bytes are more than an image may have ({MAX_BYTES})")
    header = read_header(data)
    if header is not None:
        check_size(header.width, header.height, min_side)
        sizing.resize(header.height, header.width)
        if header.plain and sizing.fit == "none" and (kept := _keep_jpeg(data, header)):
            return kept
        if header.plain and (pixels := jpeg_path(data, header, sizing)) is not None:
            return PreparedImage(pixels)
    return PreparedImage(pillow_path(data, min_side, sizing))


def _keep_jpeg(data: bytes, header: JpegHeader) -> PreparedImage | None:
    """Return a plain JPEG as it is, or None where decoders may not agree on it."""
    try:
        if (read_exif_orientation(header.exif) or 1) != read_orientation(
            header
        ):  # XMP, which DALI does not read
            return None
        return PreparedImage(decode_image(data, size=None), data)
    except (Undecodable, MemoryError):
        return None


def read_frame(image: bytes) -> tuple[int, Size]:
    """Return the orientation of an image, and its height and width before it is turned."""
    if (header := read_header(image)) is not None:
        return read_orientation(header), (header.height, header.width)
    with open_image(image) as found:
        turn, size = _read_orientation(found), (found.height, found.width)
        # Pillow tells the size of a TIFF as it is shown.
        return turn, size[::-1] if found.format == "TIFF" and turn >= 5 else size


def decode_square(data: bytes, min_side: int = 8) -> Pixels:
    """Decode an image and return its central square, 256x256.

    EXIF orientation is honoured; grey, CMYK, palette, 16-bit and transparent images (on white)
    become RGB, and colour profiles sRGB. Of an animation it is the first frame.

    Args:
        data: an image of a format in `formats`.
        min_side: smaller images, in pixels of their shorter side, are refused.

    Returns:
        uint8 [256, 256, 3], RGB, 0..255.

    Raises:
        ImageError: no image, truncated, too small, or beyond the limits in `jpeg_header`.
    """
    return prepare_image(data, SQUARE, min_side).pixels


def encode(pixels: Pixels, quality: int, chroma: Chroma = "4:2:0") -> bytes:
    """Return a baseline JPEG of uint8 [h, w, 3]; `quality` is 1..100.

    The cosine transform is the accurate one. simplejpeg, the quicker encoder, takes it from
    quality 96 on only; its fast one would cost 0.3 dB at 95 (0.6 at 4:4:4).
    """
    if quality < ACCURATE:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=chroma)
        return file.getvalue()
    return bytes(
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels),
            quality=quality,
            colorspace="RGB",
            colorsubsampling=chroma.replace(":", ""),
            fastdct=False,  # its rounding would cost 0.3 dB
        )
    )


def jpeg_path(data: bytes, header: JpegHeader, sizing: Sizing = SQUARE) -> Pixels | None:
    """Return a plain JPEG brought to size, or None where its decoder refuses or warns.

    Args:
        data: the JPEG.
        header: of it; `plain`, and of a size that may be decoded.
        sizing: the size.

    Returns:
        uint8 [h, w, 3], sRGB.

    Raises:
        ImageError: its data ends before the image does.
    """
    profile = header.profile
    if profile is not None and header.components == 1:
        return None  # what a grey profile says of greys is lost in RGB
    factor = sizing.choose_reduction(min(header.width, header.height))
    height, width = -(-header.height // factor), -(-header.width // factor)
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            min_height=height,
            min_width=width,
            min_factor=factor,
            buffer=_scratch.decoded if 3 * height * width <= SCRATCH else None,
        )
    except ValueError as error:
        if "premature end" in str(error).lower():  # Pillow would make it up in grey
            raise ImageError(f"truncated: {error}") from error
        return None
    except MemoryError:
        return None
    size = sizing.resize(header.height, header.width)  # of the whole image, not of the reduced one
    small = resample(pixels, sizing, size)
    return turn_upright(pixels_to_srgb(small, profile), read_orientation(header))


class _Scratch(threading.local):
    """Each thread's memory for the image in hand."""

    def __init__(self) -> None:
        self.decoded = np.empty(SCRATCH, np.uint8)
        self.cut = np.empty(SCRATCH, np.uint8)


_scratch = _Scratch()


def resample(pixels: Pixels, sizing: Sizing = SQUARE, size: Size | None = None) -> Pixels:
    """Return uint8 [h, w, 3] brought to size; by default the central square, [256, 256, 3].

    A square is cut out first: what lies beside it is not resampled. `size` is the height and width
    to come, where the pixels are a reduced image; None: what `sizing` makes of theirs.
    """
    square = cut_square(pixels) if sizing.fit == "square" else pixels
    size = size or sizing.resize(*square.shape[:2])
    if size == square.shape[:2]:
        return square.copy()  # what is decoded next lies where this does
    if square.size > SCRATCH:
        square = np.require(square, requirements=["C", "W"])  # torch warns of what is read-only
    elif not (square.flags.c_contiguous and square.flags.writeable):
        copy = _scratch.cut[: square.size].reshape(square.shape)
        np.copyto(copy, square)
        square = copy
    import torch  # here: the process that plans a build does without it

    # [1, 3, h, w] in channels-last order without a copy: torch has a path of its own for it.
    planes = torch.from_numpy(square)[None].permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(planes, size, mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).contiguous().numpy()


def cut_square(pixels: Pixels) -> Pixels:
    """Return the central square of [height, width, channels], as a view."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def pillow_path(data: bytes, min_side: int, sizing: Sizing = SQUARE) -> Pixels:
    """Return an image (the first frame) brought to size, uint8 [h, w, 3], sRGB.

    Raises:
        ImageError: no image, truncated, too small, or too large to be one.
    """
    if data[:2] in (b"P1", b"P2", b"P3"):
        raise ImageError("a PNM whose pixels are written as text")
    if data[:2] != JPEG and len(data) > MAX_OTHER_BYTES:
        raise ImageError(f"{len(data)} bytes are more than it may have ({MAX_OTHER_BYTES})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF, large images: not the user's matter
            with limit_time(), open_image(data, min_side) as image:
                check_size(*image.size, min_side)
                _check_tiles(image)
                with _silence_stderr() if image.format == "TIFF" else nullcontext():
                    return _crop_and_resample(image, sizing)
    except ImageError:
        raise
    # Pillow's decoders raise what they please on damaged input; whatever it is, it is this file.
    except Exception as error:
        raise ImageError(describe_error(error)) from error


def _check_tiles(image: Image.Image) -> None:
    """Refuse an image in more pieces than it has rows or tiles: each starts a decoder."""
    pieces = len(getattr(image, "tile", ()))
    if pieces > 2 * image.height + image.width * image.height // 64 + 1000:
        raise ImageError(f"{pieces} strips or tiles in {image.width}x{image.height} pixels")


@contextmanager
def _silence_stderr() -> Iterator[None]:
    """Keep libtiff from writing its complaints to the process's stderr; it cannot be asked to."""
    with _stderr, open(os.devnull, "wb") as nowhere:
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _crop_and_resample(image: Image.Image, sizing: Sizing) -> Pixels:
    height, width = sizing.resize(image.height, image.width)
    factor = sizing.choose_reduction(min(image.size))
    if image.format == "JPEG" and factor > 1:
        image.draft(None, (image.width // factor, image.height // factor))
    scale = _read_scale(image)
    image.load()  # a TIFF is turned upright by it
    turned = _read_orientation(image)
    profile = image.info.get("icc_profile") or None
    if sizing.fit == "square":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    elif (image.width < image.height) != (width < height):  # a TIFF that was turned upright
        height, width = width, height
    small = _to_resamplable(image, scale).resize((width, height), Image.Resampling.BICUBIC)
    if small.mode != "RGBA":
        return turn_upright(np.asarray(to_srgb(small, profile)), turned)
    colours = to_srgb(small.convert("RGB"), profile)
    white = Image.new("RGB", small.size, "white")
    return turn_upright(np.asarray(Image.composite(colours, white, small.getchannel("A"))), turned)


class _Scale(NamedTuple):
    """Meaning of the values of a deep grey image; it follows from its type, not from its pixels."""

    white: float
    """Value of white; black is 0."""
    inverted: bool
    """True if 0 is white."""


def _read_scale(image: Image.Image) -> _Scale | None:
    """Return the scale of a grey image of more than 8 bits; None for other images.

    The transparent value of a PNG is brought to the depth in which Pillow holds the pixels.

    Raises:
        ImageError: whole numbers of 32 bits, which have no scale.
    """
    clear, tiles = image.info.get("transparency"), getattr(image, "tile", ())
    raw = tiles[0].args if tiles else None
    if raw == "RGB;16B" and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    elif raw in ("L;2", "L;4") and isinstance(clear, int):
        image.info["transparency"] = clear * (85 if raw == "L;2" else 17)
    if not image.mode.startswith(("I", "F")):
        return None
    tags = getattr(image, "tag_v2", {})
    inverted = tags.get(PHOTOMETRIC) == 0
    if image.mode == "F":
        return _Scale(1, inverted)
    bits = tags.get(BITS, (16,))[0]  # a PNG has 16, and Pillow brings a PGM to 16
    if bits > 16:
        raise ImageError(f"whole numbers of {bits} bits, whose white is unknown; save it with 16")
    return _Scale(2 ** (bits - (tags.get(SAMPLE_FORMAT, (1,))[0] == SIGNED)) - 1, inverted)


def _to_resamplable(image: Image.Image, scale: _Scale | None) -> Image.Image:
    """Return the image in a mode that can be resampled: L, RGB, RGBA or CMYK."""
    if scale is not None:
        return _to_eight_bits(image, scale)
    if "A" in image.mode.upper() or "transparency" in image.info:
        return image.convert("RGBA")
    if image.mode == "1":
        return image.convert("L")
    return image if image.mode in {"L", "RGB", "CMYK"} else image.convert("RGB")


def _to_eight_bits(image: Image.Image, scale: _Scale) -> Image.Image:
    """Return deep grey as L, or RGBA where a value is transparent; in bands.

    Raises:
        ImageError: fractions beyond 1, which is white.
    """
    values = np.asarray(image)
    rows = max(1, BAND // max(1, image.width))
    out = np.empty(values.shape, np.uint8)
    for top in range(0, image.height, rows):
        band = values[top : top + rows].astype(np.float64)
        if scale.white == 1 and band.max(where=np.isfinite(band), initial=0) > MOST_FRACTION:
            raise ImageError("fractions beyond 1, whose white is unknown; save it with 16 bits")
        scaled = np.nan_to_num(band * (255 / scale.white), posinf=255, neginf=0)
        out[top : top + rows] = scaled.clip(0, 255).round()
    grey = Image.fromarray(255 - out if scale.inverted else out)
    if (clear := image.info.get("transparency")) is None:
        return grey
    alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.merge("RGBA", (grey, grey, grey, alpha))


def describe_error(error: Exception) -> str:
    """Return in one line why a decoder refuses an image."""
    if isinstance(error, UnidentifiedImageError):
        return "no image: its bytes are of no known format"
    if isinstance(error, Image.DecompressionBombError):
        return f"decompression bomb: {error}"
    if isinstance(error, MemoryError):
        return "too large: there is not enough memory to decode it"
    text = str(error) or type(error).__name__
    if "truncated" in text.lower() and not text.startswith("truncated"):
        return f"truncated: {text}"
    return text


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the RGB image in sRGB of one in L, RGB or CMYK; a broken profile is ignored."""
    transform = None if profile is None else _make_transform(profile, image.mode)
    if transform is not None:
        with suppress(ImageCms.PyCMSError, ValueError):
            converted = ImageCms.applyTransform(image, transform)
            assert converted is not None  # it is not in place
            return converted
    return image.convert("RGB")


def pixels_to_srgb(pixels: Pixels, profile: bytes | None) -> Pixels:
    """Return uint8 [h, w, 3] in sRGB; itself where the profile says so, is none, or is broken."""
    if profile is None or _make_transform(profile, "RGB") is None:
        return pixels
    return np.asarray(to_srgb(Image.fromarray(pixels), profile))


@lru_cache(maxsize=32)
def _make_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way to sRGB; None where there is nothing to do, or the profile will not do.

    Many a profile is sRGB under another name: it is told by what it does to a cube of colours.
    """
    if len(profile) > MAX_PROFILE:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != _SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
        if mode == "RGB":
            steps = np.arange(0, 256, 15, dtype=np.uint8)
            cube = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(len(steps), -1, 3)
            moved = ImageCms.applyTransform(Image.fromarray(cube), transform)
            if np.abs(np.asarray(moved).astype(int) - cube).max() <= SAME_LEVELS:
                return None
        return transform
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def read_orientation(header: JpegHeader) -> int:
    """Return 1..8 from the Exif data of a JPEG, or else its XMP, as Pillow does; 1 is upright."""
    if (orientation := read_exif_orientation(header.exif, strict=False)) is not None:
        return orientation
    found = _XMP_ORIENTATION.search(header.xmp)
    return valid_orientation(int(found[1])) if found else 1


def _read_orientation(image: Image.Image) -> int:
    """Return 1..8 from the metadata of an image that Pillow has opened; 1 if they are damaged."""
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        return 1  # its decoder has turned it, by the header of the image; Exif says nothing there
    try:
        return valid_orientation(image.getexif().get(ORIENTATION))
    except ImageError:
        raise  # the time is over
    except Exception:  # as above
        return 1
