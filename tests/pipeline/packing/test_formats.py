"""AVIF, HEIC, JPEG XL and JPEG 2000: packed where their decoders are installed."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.dataset.jpeg_header import MAX_PIXELS, ImageError
from pipeline.packing import formats
from pipeline.packing.formats import read_jxl_size
from pipeline.packing.plan import Sizing
from pipeline.packing.resize import decode_square, prepare_image, read_frame
from tests.helpers.images import folder_per_class, packed, pixels
from tests.helpers.parquets import write as write_parquet
from tests.helpers.source_images import profile, psnr, saved
from tests.helpers.tars import tar_of

pillow_heif = pytest.importorskip("pillow_heif", reason="the extra `formats` is not installed")
pytest.importorskip("pillow_jxl", reason="the extra `formats` is not installed")
pillow_heif.register_heif_opener()

KINDS = {
    "AVIF": ("avif", {"quality": 95, "subsampling": "4:4:4"}),
    "HEIF": ("heic", {"quality": 95, "chroma": 444}),
    "JXL": ("jxl", {"quality": 98}),
    "JPEG2000": ("jp2", {}),
}
ORIENTATION = 0x112


def save(image: Image.Image, kind: str, **more) -> bytes:
    return saved(image, kind, **(KINDS[kind][1] | more))


@pytest.fixture(scope="module", name="base")
def an_image() -> Image.Image:
    return Image.fromarray(pixels(5, 300, 280))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_the_image(kind, base):
    expected = decode_square(saved(base, "PNG"))
    assert psnr(decode_square(save(base, kind)), expected) > 38
    grey = decode_square(save(base.convert("L"), kind))
    assert psnr(grey, decode_square(saved(base.convert("L"), "PNG"))) > 38
    clear = base.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(base.size))
    assert psnr(decode_square(save(clear, kind)), decode_square(saved(clear, "PNG"))) > 35


@pytest.mark.parametrize("kind", ["HEIF", "JXL", "JPEG2000"])
def test_deep_grey_becomes_eight_bits(kind, base):
    grey = base.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    expected = decode_square(saved(grey, "PNG"))
    if kind == "JXL":  # its writer says that deep values are linear, and its profile does
        value = np.arange(256) / 255
        table = np.where(value < 0.0031308, 12.92 * value, 1.055 * value ** (1 / 2.4) - 0.055)
        expected = (255 * table).round().astype(np.uint8)[expected]
    assert psnr(decode_square(save(deep, kind)), expected) > 35


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_colors_of_a_profile_become_srgb(kind, base):
    icc = profile(1.0)
    expected = decode_square(saved(base, "PNG", icc_profile=icc))
    assert psnr(expected, decode_square(saved(base, "PNG"))) < 25
    assert psnr(decode_square(save(base, kind, icc_profile=icc)), expected) > 30


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_images_are_turned_once(kind, turn, base):
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    tag = {"exif": exif.tobytes()}
    wide = base.crop((0, 0, 300, 260))
    data = save(wide, kind, **tag)
    assert psnr(decode_square(data), decode_square(saved(wide, "PNG", **tag))) > 38
    shown = prepare_image(data, Sizing("none")).pixels.shape[:2]
    assert shown == ((300, 260) if turn > 4 else (260, 300))
    found, (height, width) = read_frame(data)
    assert ((width, height) if found > 4 else (height, width)) == shown


TURNED = bytes.fromhex(
    "ff0ad8310be40400158802005404b59f200000152aa38c1bbc9cebf9f24387c5b48deb0c6db56d610963b3bd"
    "304898a0005210833510c918890becbab674d73c960902ccd943b80675551181fc5bccfa3e9c899e163869fc"
    "c79f210236c7d1ab7862f380cdd40930fdd008d74370d6ac3d9619ed3397caef0b4ec3ed43207f5db6c37149"
    "866ef3f5d2f7827ff2207b159649b076df80868505a7db3168e0fe7085331703b24fbb045cee850090f00dc3"
    "b93a00b080eb0ef113f77aca1b21e1c532e200dca9900299889999f132c68c31e665664ec618674051040014"
    "20ce16cf01c6f56d927429e57046bfba845be8c527f9f3ea90ca6883f155f3c597179e3666e71acb9ce73c61"
    "18510e8d58a1ec06034a63f8417e922cc10c388506e8aaec50b000"
)
"""A JPEG XL of 80x60, left half green and right half red, whose header says orientation 6."""


def test_a_jpeg_xl_is_turned_by_its_header_and_not_by_exif(base):
    found = decode_square(TURNED)
    assert found[5, 128].tolist() == pytest.approx([20, 200, 20], abs=6)
    assert found[-5, 128].tolist() == pytest.approx([200, 30, 30], abs=6)
    assert read_frame(TURNED) == (1, (80, 60))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = save(base, "JXL", exif=exif.tobytes())
    assert psnr(decode_square(data), decode_square(saved(base, "PNG"))) > 38


def test_a_jpeg_inside_a_jpeg_xl_is_turned_by_its_exif(base, tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    base.save(tmp_path / "a.jpg", quality=95, exif=exif.tobytes())
    with Image.open(tmp_path / "a.jpg") as image:
        data = saved(image, "JXL", lossless_jpeg=True)
    expected = decode_square((tmp_path / "a.jpg").read_bytes())
    assert np.abs(decode_square(data).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (80, 60), (256, 256), (257, 300), (320, 180)])
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_a_jpeg_xl_is_read_from_its_header(size, container):
    data = saved(Image.new("RGB", size), "JXL", use_container=container)
    assert read_jxl_size(data) == size


@given(st.binary(max_size=64), st.sampled_from([b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"]))
def test_any_header_is_a_size_or_a_reason(data, head):
    try:
        width, height = read_jxl_size(head + data)
    except ImageError:
        return
    assert min(width, height) >= 0


def test_a_jpeg_xl_that_is_too_large_is_not_decoded(monkeypatch):
    # 2**18 squared, by a side of 18 bits and ratio 1:1; nothing follows.
    side = (1 << 18) - 1
    bits = 0 | 2 << 1 | side << 3 | 1 << 21
    data = b"\xff\x0a" + bits.to_bytes(10, "little")
    assert read_jxl_size(data) == (1 << 18, 1 << 18)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ImageError, match=f"more than {MAX_PIXELS // 10**6} megapixels"):
        decode_square(data)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_and_damaged_images_end_in_a_reason(kind, base):
    data = save(base, kind)
    random = np.random.default_rng(0)
    for number in range(6):
        damaged = bytearray(data[: len(data) * (number + 2) // 8])
        damaged[random.integers(12, 200)] ^= 255
        with suppress(ImageError):  # and nothing else
            decode_square(bytes(damaged))
    with pytest.raises(ImageError):
        decode_square(data[:40])


@pytest.mark.parametrize(
    ("kind", "name"),
    [("AVIF", "AVIF"), ("HEIF", "HEIC"), ("JXL", "JPEG XL"), ("JPEG2000", "JPEG 2000")],
)
def test_without_its_decoder_an_image_names_the_extra(kind, name, base, monkeypatch):
    monkeypatch.setattr(formats, "_is_there", lambda kind: False)
    wanted = rf"^{name}, whose decoder is not installed: pip install .*\[formats\]"
    with pytest.raises(ImageError, match=wanted):
        decode_square(save(base, kind))
    assert decode_square(saved(base, "PNG")).shape == (256, 256, 3)  # others are as before


def test_a_decoder_that_cannot_be_imported_is_none(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    assert not formats._is_there.__wrapped__(formats._JXL)


def test_every_kind_of_source_knows_their_names(tmp_path, base):
    """A folder, tars, parquet and shards of these images are packed."""
    files = {KINDS[kind][0]: save(base, kind) for kind in KINDS}
    names = [f"{name}/{n}.{ending}" for name in "ab" for n, ending in enumerate(files)]
    bodies = dict(zip(names, [*files.values()] * 2, strict=True))
    for name, data in bodies.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    tar_of(tmp_path / "all.tar", bodies)
    shard = []
    for number, (name, data) in enumerate(bodies.items()):
        ending = name.rpartition(".")[2].upper()
        shard += [(f"{number}.{ending}", data), (f"{number}.cls", name[:1].encode())]
    tar_of(tmp_path / "shard.tar", shard)
    write_parquet(tmp_path / "p.parquet", list(bodies.values()), [n // 4 for n in range(8)])
    for source in ("folder", "all.tar", "shard.tar", "p.parquet"):
        manifest = packed(tmp_path / f"data-{source}", train=tmp_path / source)
        assert (manifest.splits["train"].samples, manifest.rejected) == (8, 0), source
    assert manifest.libraries["pillow-heif"] == pillow_heif.__version__


def test_a_folder_without_a_decoder_lists_its_images(tmp_path, base, monkeypatch):
    source = folder_per_class(tmp_path / "s", 2)
    (source / "cat/x.heic").write_bytes(save(base, "HEIF"))
    monkeypatch.setattr(formats, "_is_there", lambda kind: False)
    manifest = packed(tmp_path / "data", train=source, max_rejects=0.2)
    assert (manifest.splits["train"].samples, manifest.rejected) == (8, 1)
    text = (tmp_path / "data/rejects.jsonl").read_text()
    assert "x.heic" in text
    assert "[formats]" in text


def test_decoders_run_in_one_thread():
    for kind in (formats._AVIF, formats._HEIF, formats._JXL):
        assert formats._is_there(kind)
    from PIL import AvifImagePlugin
    from pillow_jxl import JpegXLImagePlugin

    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1
    assert pillow_heif.options.DECODE_THREADS == 1
    assert JpegXLImagePlugin.DECODE_THREADS == 0


def test_an_unknown_brand_is_no_image():
    data = (24).to_bytes(4, "big") + b"ftypisom" + bytes(4) + b"mp42mp41" + bytes(400)
    with pytest.raises(ImageError, match="no known format"):
        decode_square(data)
