"""Other members of a sample, masks among them, are packed with its image; sets without labels."""

from __future__ import annotations

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset.jpeg_header import ImageError
from pipeline.dataset.manifest import Manifest
from pipeline.packing import plan
from pipeline.packing.build import build
from pipeline.packing.chunks import prepare_mask
from pipeline.packing.plan import Sizing
from pipeline.packing.resize import prepare_image
from pipeline.stream.config import StreamConfig
from pipeline.throughput.dali_reader import DaliReader
from pipeline.tools.errors import DataError, DuetError, UsageError
from pipeline.verify import verify
from tests.helpers.foreign_shards import index
from tests.helpers.images import flip_bit, jpeg, options, packed, rows_of
from tests.helpers.tars import tar_of

COUNT = 24
PLAIN = {"mean": None, "colour": 0, "threads": 1, "dtype": "uint8"}
FIELDS = ("json", "txt", "depth.bin")
TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Turn that brings an image of each EXIF orientation upright, in Pillow's names."""


def make_values(sample: int) -> np.ndarray:
    """Numbers 0..20 in patches, uint8 [height, width]; sizes are odd, even, wide and high."""
    patches = np.random.default_rng(sample).integers(0, 21, (5, 6), dtype=np.uint8)
    size = (120 + 7 * (sample % 5), 90 + 11 * (sample % 7))
    return np.asarray(Image.fromarray(patches).resize(size, Image.Resampling.NEAREST))


def encode(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def encode_image(values: np.ndarray, orientation: int = 1) -> bytes:
    """An image of which each pixel is 12 times the number of its mask."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = Image.fromarray(values * 12).convert("RGB")
    return encode(grey, "JPEG", quality=98, subsampling=0, exif=exif)


def make_members(sample: int) -> dict[str, bytes]:
    mask = Image.fromarray(make_values(sample))
    if sample % 2:
        mask.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    return {
        "jpg": encode_image(make_values(sample)),
        "cls": b"%d" % (sample % 4),
        "json": json.dumps({"number": sample}).encode(),
        "txt": f"picture {sample} \u00fc".encode(),
        "depth.bin": bytes([sample]) * sample,
        "seg.png": encode(mask),
    }


@pytest.fixture(name="shards", scope="module")
def shards_with_members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for start in (0, 16):
        members = [
            (f"n{sample:03d}.{name}", content)
            for sample in range(start, min(start + 16, COUNT))
            for name, content in make_members(sample).items()
        ]
        tar_of(folder / f"train-{start:02d}.tar", members)
    return folder


@pytest.fixture(name="data", scope="module")
def set_with_members(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "data"
    packed(out, train=shards, fields=FIELDS, masks=("seg.png",), samples_per_shard=10, size=64)
    return out


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def list_stored(data: Path, **settings) -> list:
    """All samples of a set, as `Stream[id]` gives them."""
    with Stream(data, crop="resized", threads=1, **settings) as stream:
        return [stream[sample] for sample in range(stream.samples)]


def test_members_come_with_the_images_they_lay_beside(data):
    assert verify(data) == []
    stored = list_stored(data, fields=FIELDS)
    samples = [int(one.name.rpartition("/")[2][1:4]) for one in stored]
    assert sorted(samples) == list(range(COUNT))
    for sample, one in zip(samples, stored, strict=True):
        expected = make_members(sample)
        assert one.label == sample % 4
        assert one.fields["json"] == {"number": sample}
        assert one.fields["txt"].encode() == expected["txt"]
        assert one.fields["depth.bin"] == expected["depth.bin"]
    theirs = webdataset.WebDataset(
        [str(path) for path in sorted(data.glob("*.tar"))], shardshuffle=False
    )
    for one, other in zip(stored, theirs, strict=True):
        assert one.key == other["__key__"]
        assert one.fields["depth.bin"] == other["depth.bin"]
    with Stream(
        data,
        batch_size=COUNT,
        fields=("json",),
        masks=("seg.png",),
        crop="resized",
        size=32,
        seed=1,
    ) as stream:
        batch = next(stream)
    assert [row["number"] for row in batch.fields["json"]] == [
        samples[n] for n in batch.ids.tolist()
    ]
    assert batch.masks["seg.png"].shape == (COUNT, 32, 32)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 64},
        {"size": 64, "encoding": "raw"},
        {"size": 150, "fit": "shorter"},
        {"fit": "none"},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_masks_are_cut_and_resampled_with_their_images(shards, tmp_path, settings):
    packed(tmp_path / "d", train=shards, masks=("seg.png",), **settings)
    assert verify(tmp_path / "d", decode=True) == []
    for one in list_stored(tmp_path / "d", masks=("seg.png",)):
        mask = one.masks["seg.png"]
        assert mask.shape == one.pixels.shape[:2]
        values = Image.fromarray(make_values(int(one.name[-7:-4])))
        if settings.get("fit") is None:
            side = min(values.size)
            left, top = (values.width - side) // 2, (values.height - side) // 2
            values = values.crop((left, top, left + side, top + side))
        expected = values.resize(mask.shape[::-1], Image.Resampling.NEAREST)
        assert np.array_equal(mask, np.asarray(expected))
        seen = np.round(one.pixels[:, :, 0] / 12)  # by the image itself, but at borders of patches
        assert (seen == mask).mean() > 0.8


def test_masks_keep_their_palettes_and_untouched_ones_their_bytes(shards, data, tmp_path):
    packed(tmp_path / "d", train=shards, masks=("seg.png",), fit="none")
    for folder, same in ((data, False), (tmp_path / "d", True)):
        for one in list_stored(folder, fields=("seg.png",)):
            source = make_members(int(one.name[-7:-4]))["seg.png"]
            assert (one.fields["seg.png"] == source) == same
            palettes = [
                Image.open(io.BytesIO(png)).getpalette() for png in (one.fields["seg.png"], source)
            ]
            assert palettes[0] == palettes[1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fit", ["square", "none"])
def test_masks_are_turned_with_images_that_exif_turns(tmp_path, orientation, fit):
    """A mask may be of the image as shown or as stored: its size tells, or nothing does."""
    stored = make_values(3)  # 141x123
    turn = TURNS[orientation]
    upright = stored if turn is None else np.asarray(Image.fromarray(stored).transpose(turn))
    samples = {}
    for number, values in enumerate((stored, upright)):
        for name, content in (
            ("jpg", encode_image(stored, orientation)),
            ("cls", b"%d" % number),
            ("seg.png", encode(Image.fromarray(values))),
        ):
            samples[f"{number}.{name}"] = content
    shard = tar_of(tmp_path / "s" / "train-0.tar", samples)
    settings = {"masks": ("seg.png",), "fit": fit, **({"size": 64} if fit == "square" else {})}
    index(shard.parent, fields=("seg.png",))
    if orientation in (2, 3, 4):
        words = f"turned by EXIF orientation {orientation}, and its size does not tell"
        with pytest.raises(DuetError, match=words):
            packed(tmp_path / "d", train=shard, **settings)
        with (
            Stream(shard.parent, crop="resized", masks=("seg.png",)) as stream,
            pytest.raises(DataError, match=words),
        ):
            stream[0]
        return
    for one in list_stored(shard.parent, masks=("seg.png",)):  # where they lie
        assert np.array_equal(one.masks["seg.png"], upright)
    packed(tmp_path / "d", train=shard, **settings)
    for one in list_stored(tmp_path / "d", masks=("seg.png",)):
        seen = np.round(one.pixels[:, :, 0] / 12)
        assert (seen == one.masks["seg.png"]).mean() > 0.8
        if fit == "none":
            assert np.array_equal(one.masks["seg.png"], upright)


class Cut:
    """A pool that runs jobs from the last to the first, and is killed after some."""

    def __init__(self, left: int) -> None:
        self.left = left

    def run(self, task: Callable, jobs: Iterable) -> Iterator:
        for job in reversed(list(jobs)):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield task(job)


def test_a_killed_build_ends_with_the_same_members(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "SMALLEST_CHUNK", 5)
    settings = {"train": shards, "fields": FIELDS, "masks": ("seg.png",), "samples_per_shard": 7}
    packed(tmp_path / "whole", **settings)
    config = options(tmp_path / "cut", **settings)
    for left in (3, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            build(config, pool=Cut(left))
    with pytest.raises(
        UsageError, match=r"unfinished data set of fields \['json', 'txt', 'depth.bin'\], and"
    ):
        packed(tmp_path / "cut", **settings | {"fields": ("json",)})
    build(config, pool=Cut(100))
    assert everything(tmp_path / "cut") == everything(tmp_path / "whole")


def test_damaged_members_are_verified(data, tmp_path):
    copy = Path(shutil.copytree(data, tmp_path / "d"))
    row = np.load(copy / "train.field-txt.index.npy")[13]
    shard = copy / f"train-{rows_of(copy, 'train')['shard'][13]:06d}.tar"
    content = bytearray(shard.read_bytes())
    content[int(row["offset"])] ^= 1
    shard.write_bytes(content)
    assert [(one["sample"], one["reason"]) for one in verify(copy)] == [
        (13, "CRC-32 of its .txt differs")
    ]
    flip_bit(copy, "train", 2)
    assert len(verify(copy)) == 2
    (copy / "train.field-txt.index.npy").unlink()
    assert [one["file"] for one in verify(copy)] == [
        "train.field-txt.index.npy",
        "train-000000.tar",
        "train-000001.tar",
    ]


def test_a_sample_that_lacks_a_member_is_rejected_by_name(tmp_path):
    samples = {
        f"{n}.{name}": content for n in range(8) for name, content in make_members(n).items()
    }
    del samples["4.json"]
    samples["5.seg.png"] = encode(Image.fromarray(make_values(4)))
    samples["3.json"] = b"a picture"
    shard = tar_of(tmp_path / "s.tar", samples)
    settings = {"train": shard, "fields": ("json",), "masks": ("seg.png",)}
    with pytest.raises(DuetError, match=r"3 of 8 files"):
        packed(tmp_path / "d", **settings)
    assert packed(tmp_path / "e", **settings, max_rejects=0.6).rejected == 3
    rejects = [json.loads(line) for line in (tmp_path / "e/rejects.jsonl").read_text().splitlines()]
    assert sorted((row["name"].rpartition("/")[2], row["reason"]) for row in rejects) == [
        ("3.jpg", "its .json is no JSON: Expecting value: line 1 column 1 (char 0)"),
        ("4.jpg", "it has no .json"),
        ("5.jpg", "its .seg.png: it is 148x134, its image 120x145"),
    ]


def test_the_longest_name_of_a_field_is_stored(tmp_path):
    field = "a" * 87
    members = {"jpg": jpeg(1), field: b"x"}
    samples = {f"{n}.{name}": data for n in range(4) for name, data in members.items()}
    labels = {f"{n}.cls": b"%d" % (n % 2) for n in range(4)}
    shard = tar_of(tmp_path / "s.tar", dict(sorted({**samples, **labels}.items())))
    packed(tmp_path / "d", train=shard, fields=(field,))
    assert verify(tmp_path / "d", decode=True) == []


def test_values_beyond_the_palette_of_a_mask_are_kept(tmp_path):
    """255 often marks pixels to ignore, and has no color of its own."""
    values = np.zeros((80, 80), np.uint8)
    values[:40, :40], values[40:, 40:] = 2, 255
    mask = Image.fromarray(values)
    mask.putpalette(bytes(range(256)) * 3)
    png = encode(mask)
    start = png.index(b"PLTE") - 4
    short = b"PLTE" + bytes(range(9))
    chunk = struct.pack(">I", 9) + short + struct.pack(">I", zlib.crc32(short))
    members = {"jpg": jpeg(1, 80, 80), "seg.png": png[:start] + chunk + png[start + 780 :]}
    samples = {f"{n}.{name}": data for n in range(2) for name, data in members.items()}
    samples |= {"0.cls": b"0", "1.cls": b"1"}
    shard = tar_of(tmp_path / "s.tar", dict(sorted(samples.items())))
    packed(tmp_path / "d", train=shard, masks=("seg.png",), size=64)
    for one in list_stored(tmp_path / "d", masks=("seg.png",)):
        assert set(np.unique(one.masks["seg.png"])) == {0, 2, 255}


def make_folder(root: Path, spread: bool = True) -> Path:
    for sample in range(8):
        place = root / f"class{sample % 2}" if spread else root
        place.mkdir(parents=True, exist_ok=True)
        for name, content in make_members(sample).items():
            if name in ("jpg", "json", "seg.png"):
                (place / f"v1.{sample}.{name}").write_bytes(content)
    return root


def test_members_of_folders_lie_beside_their_images(tmp_path):
    source = make_folder(tmp_path / "s")
    settings = {"train": source, "fields": ("json",), "masks": ("seg.png",), "size": 64}
    assert packed(tmp_path / "d", **settings).rejected == 0
    for one in list_stored(tmp_path / "d", fields=("json",), masks=("seg.png",)):
        sample = one.fields["json"]["number"]
        assert one.name == f"class{sample % 2}/v1.{sample}.jpg"
        assert (np.round(one.pixels[:, :, 0] / 12) == one.masks["seg.png"]).mean() > 0.8
    (source / "class0/v1.0.jpg").unlink()
    (source / "class1/v1.3.json").unlink()
    packed(tmp_path / "e", **settings, max_rejects=0.5)
    rejects = [json.loads(line) for line in (tmp_path / "e/rejects.jsonl").read_text().splitlines()]
    assert {(Path(row["name"]).name, row["reason"]) for row in rejects} == {
        ("v1.0.json", "no image of its name is beside it"),
        ("v1.0.seg.png", "no image of its name is beside it"),
        ("v1.3.jpg", "it has no v1.3.json beside it"),
    }
    with pytest.raises(UsageError, match="come from folders of classes, WebDataset shards and"):
        packed(
            tmp_path / "f",
            train=tar_of(tmp_path / "c.tar", {"a/1.jpg": jpeg(1), "b/1.jpg": jpeg(2)}),
            fields=("json",),
        )


def write_parquet(path: Path, labelled: bool = True) -> Path:
    images, masks = (
        [{"bytes": make_members(n)[name], "path": None} for n in range(8)]
        for name in ("jpg", "seg.png")
    )
    columns = {
        "image": images,
        "caption": [f"picture {n}" for n in range(8)],
        "objects": [{"bbox": [[n, 1.5]], "id": [n]} for n in range(8)],
        "seg": masks,
        **({"label": [n % 2 for n in range(8)]} if labelled else {}),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def test_members_of_parquet_files_are_columns(tmp_path):
    source = write_parquet(tmp_path / "s" / "train.parquet")
    fields = ("caption.txt", "objects.json")
    packed(tmp_path / "d", train=source, fields=fields, masks=("seg.png",), size=64)
    assert verify(tmp_path / "d") == []
    for one in list_stored(tmp_path / "d", fields=fields, masks=("seg.png",)):
        sample = int(one.name[-6:])
        assert one.fields["caption.txt"] == f"picture {sample}"
        assert one.fields["objects.json"] == {"bbox": [[sample, 1.5]], "id": [sample]}
        assert (np.round(one.pixels[:, :, 0] / 12) == one.masks["seg.png"]).mean() > 0.8
    table = pq.read_table(source)
    both = table.append_column("caption.txt", pa.array([f"own {n}" for n in range(len(table))]))
    order = ["caption.txt", *table.column_names]
    pq.write_table(both.select(order), tmp_path / "both.parquet")
    packed(tmp_path / "f", train=tmp_path / "both.parquet", fields=("caption.txt",), size=64)
    texts = [
        one.fields["caption.txt"] for one in list_stored(tmp_path / "f", fields=("caption.txt",))
    ]
    assert all(text.startswith("own ") for text in texts)
    for name, words in (
        ("box.json", r"no column of the field 'box.json', 'box.json' or 'box'; its columns: "),
        (
            "objects",
            r"in column 'objects'; a field is .* by an ending .json any value: objects.json",
        ),
    ):
        with pytest.raises(UsageError, match=words):
            packed(tmp_path / "e", train=source, fields=(name,))


def make_unlabelled(kind: str, root: Path) -> Path:
    if kind == "folder":
        source = make_folder(root, spread=False)
        (source / "deep").mkdir()
        (source / "deep" / "more.jpg").write_bytes(jpeg(77))
        (source / "README.md").write_text("images")
        return source
    if kind == "parquet":
        return write_parquet(root / "images.parquet", labelled=False)
    members = {f"a/{n}.jpg": make_members(n)["jpg"] for n in range(9)}
    return tar_of(root / "images.tar", members)


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_images_without_labels_are_a_set_without_classes(tmp_path, kind):
    source = make_unlabelled(kind, tmp_path / "s")
    if kind == "folder":  # masks and records are not images
        for path in source.glob("v1.*.*[gn]"):
            if path.suffix != ".jpg":
                path.unlink()
    count = {"folder": 9, "tar": 9, "parquet": 8}[kind]
    data = tmp_path / "d"
    manifest = packed(data, train=source, labels=False, holdout=0.25, samples_per_shard=4, size=64)
    assert (manifest.classes, manifest.rejected) == ((), 0)
    assert Manifest.load(data) == manifest
    assert sum(split.samples for split in manifest.splits.values()) == count
    assert manifest.splits["val"].samples == 2
    assert verify(data, decode=True) == []
    with Stream(data, batch_size=4, **PLAIN, crop="center", size=32) as stream:
        batch = next(stream)
        assert (batch.labels.tolist(), stream.classes) == ([-1] * 4, ())
        assert "no classes" in repr(stream)
    with pytest.raises(UsageError, match="weights='balanced' needs classes, and this set has none"):
        Stream(data, weights="balanced", crop="center", size=32)
    with pytest.raises(UsageError, match=r"'x' is no class: this set has none"):
        Stream(data, where={"class": "x"}, crop="center", size=32)
    with pytest.raises(UsageError):
        packed(tmp_path / "e", train=source)
    with pytest.raises(UsageError, match=r"reader takes labels, too, and .* has none"):
        DaliReader(data, StreamConfig(batch_size=4, size=32, threads=1))


def test_labels_may_be_carried_as_a_field(shards, tmp_path):
    packed(tmp_path / "d", train=shards, labels=False, fields=("cls", "json"), size=64)
    assert verify(tmp_path / "d") == []
    for one in list_stored(tmp_path / "d", fields=("cls", "json")):
        assert (one.label, one.fields["cls"]) == (-1, one.fields["json"]["number"] % 4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fields": ("JSON",)}, "--fields JSON is no ending of up to 87 small letters"),
        ({"fields": ("_seg",)}, "--fields _seg is no ending of up to 87 small letters"),
        ({"fields": ("a" * 88,)}, "--fields a{88} is no ending of up to 87 small letters"),
        ({"fields": ("cls",)}, "--fields cls is the label"),
        ({"masks": ("jpg",)}, "--masks jpg is the ending of the image itself"),
        ({"fields": ("npy",), "encoding": "raw"}, "--fields npy is the ending of the image itself"),
        ({"fields": ("seg.png",), "masks": ("seg.png",)}, "have seg.png twice"),
        ({"masks": ("seg.npy",)}, "--masks seg.npy: a mask is a PNG"),
        ({"labels": False, "val": "v", "val_labels": "x"}, "--no-labels has none"),
    ],
)
def test_members_that_cannot_be_are_refused(tmp_path, settings, words):
    with pytest.raises(UsageError, match=words):
        packed(tmp_path / "d", train=tmp_path / "s", **settings)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_images_of_other_kinds_are_turned_with_their_masks(kind):
    stored = make_values(3)
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        settings = {"lossless": True} if kind == "WEBP" else {}
        image = encode(Image.fromarray(stored * 12).convert("RGB"), kind, exif=exif, **settings)
        upright = stored if turn is None else np.asarray(Image.fromarray(stored).transpose(turn))
        for mask in map(encode, map(Image.fromarray, (stored, upright))):
            if orientation in (2, 3, 4):
                with pytest.raises(ImageError, match="does not tell"):
                    prepare_mask(mask, image, Sizing("none"))
                continue
            found = Image.open(io.BytesIO(prepare_mask(mask, image, Sizing("none"))))
            seen = prepare_image(image, Sizing("none")).pixels[:, :, 0] // 12
            assert np.array_equal(np.asarray(found), seen)
