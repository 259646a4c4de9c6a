"""Keys, names, other members of a sample, masks and labels of one's own come with its image."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset.images import decode_mask
from pipeline.dataset.members import TextTable, escape_line, save_texts
from pipeline.stream.augment import draw, draw_regions
from pipeline.stream.fields import find_parser
from pipeline.stream.order import FullShuffle
from pipeline.tools.errors import DamagedFile, DataError, UsageError
from pipeline.verify import verify
from tests.helpers.foreign_shards import index, make_image
from tests.helpers.http_servers import Server
from tests.helpers.images import rows_of
from tests.helpers.resealed_data import edit_manifest, sha

COUNT = 20  # in shards of 8
FIELDS = ("json", "txt", "cls", "npy", "depth.bin")
PLAIN = {"mean": None, "colour": 0, "threads": 2, "dtype": "uint8"}


def make_mask(sample: int) -> np.ndarray:
    """A mask of numbers 0..20 in patches, uint8 [256, 256]."""
    patches = np.random.default_rng(sample).integers(0, 21, (13, 11), dtype=np.uint8)
    return np.asarray(Image.fromarray(patches).resize((256, 256), Image.Resampling.NEAREST))


def encode_mask(mask: np.ndarray, palette: bool) -> bytes:
    image, file = Image.fromarray(mask), io.BytesIO()
    if palette:
        image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(file, "PNG")
    return file.getvalue()


def make_members(sample: int) -> dict[str, object]:
    array = np.arange(sample, sample + 6, dtype=np.float32).reshape(2, 3)
    return {
        "jpg": make_image(sample),
        "cls": sample % 4,
        "json": {"caption": f"Nummer {sample} \u00e4", "box": [sample, 1.5]},
        "txt": f"picture {sample} \u00fc\n",
        "npy": array,
        "depth.bin": bytes([sample]) * sample,
        "Seg.png": encode_mask(make_mask(sample), palette=sample % 2 == 0),
    }


@pytest.fixture(name="made", scope="module")
def shards_with_members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("members")
    with webdataset.ShardWriter(str(folder / "train-%02d.tar"), maxcount=8, verbose=0) as writer:
        for sample in range(COUNT):
            key = f"train/{'long ' * 30 * (sample == 3)}n{sample:05d}"
            writer.write({"__key__": key, **make_members(sample)})
    index(folder, fields=(*FIELDS, "seg.png"))
    return folder


@pytest.fixture(name="foreign")
def copy_of_made(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "d"))


def webdatasets(folder: Path) -> list[dict]:
    """The samples as webdataset gives them, in stored order."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False).decode())


def take(data: Path, batches: int = 1, **settings) -> list:
    settings = {"batch_size": COUNT, "seed": 4, "threads": 2} | settings
    with Stream(data, **settings) as stream:
        return [next(stream) for _ in range(batches)]


def test_keys_and_fields_are_webdatasets(made):
    expected = webdatasets(made)
    for batch in take(made, 3, fields=FIELDS, batch_size=7):
        assert list(batch.fields) == list(FIELDS)
        for place, sample in enumerate(batch.ids.tolist()):
            other = expected[sample]
            assert batch.keys[place] == other["__key__"]
            for name in ("json", "txt", "cls", "depth.bin"):
                assert batch.fields[name][place] == other[name]
            assert np.array_equal(batch.fields["npy"][place], other["npy"])
            assert batch.fields["npy"][place].dtype == np.float32
        assert batch.names is None
        assert batch.masks == {}
    assert verify(made) == []


def test_sets_of_ours_have_keys_by_place_and_names_of_files(tiny_data, image_folder):
    (batch,) = take(tiny_data)
    rows = rows_of(tiny_data, "train")
    for sample, key, name, label in zip(
        batch.ids.tolist(), batch.keys, batch.names, batch.labels.tolist(), strict=True
    ):
        assert key == f"{rows['shard'][sample]:06d}_{sample % 10:05d}"
        assert (image_folder / "train" / name).is_file()
        assert name.split("/")[0] == ("apple", "bird", "cat", "dog")[label]
    with Stream(tiny_data, once=True, batch_size=48, crop="center") as stream:
        assert len(set(next(stream).names)) == 48


def test_a_batch_travels_with_its_keys(made):
    (batch,) = take(made, fields=("json",), masks=("seg.png",))
    other = pickle.loads(pickle.dumps(batch.to("cpu")))
    assert (other.keys, other.names, other.fields) == (batch.keys, None, batch.fields)
    assert torch.equal(other.masks["seg.png"], batch.masks["seg.png"])


def test_worlds_and_restarts_have_the_same_members(made):
    settings = {"fields": ("json",), "masks": ("seg.png",), "crop": "resized", "size": 64}
    whole = take(made, 4, **settings)
    for world in (2, 3):
        ranks = [
            take(made, 2, **settings, rank=rank, world_size=world, position=2 * COUNT, threads=1)
            for rank in range(world)
        ]
        for batch, parts in zip(whole[2:], zip(*ranks, strict=True), strict=True):
            assert batch.fields["json"] == [one for part in parts for one in part.fields["json"]]
            assert batch.keys == [one for part in parts for one in part.keys]
            masks = torch.cat([part.masks["seg.png"] for part in parts])
            assert torch.equal(batch.masks["seg.png"], masks)


@pytest.mark.parametrize("crop", ["random", "center", "whole", "resized"])
def test_masks_are_cut_and_flipped_with_their_images(made, crop):
    size = (96, 160)
    (batch,) = take(made, masks=("seg.png",), crop=crop, size=size, **PLAIN)
    masks = batch.masks["seg.png"]
    assert masks.dtype == torch.uint8
    assert masks.shape == (COUNT, *((256, 256) if crop == "whole" else size))
    slots = FullShuffle([8, 8, 4], 4).list_slots(0, COUNT)
    regions = draw_regions(4, slots.turns, slots.ids, (256, 256), (0.08, 1.0), (3 / 4, 4 / 3))
    draws = draw(4, slots.turns, slots.ids, border=(0, 0) if crop == "resized" else (160, 96))
    for place, sample in enumerate(batch.ids.tolist()):
        expected = make_mask(sample)
        top, left = (draws.y[place], draws.x[place]) if crop == "random" else (80, 48)
        if crop == "resized":
            (top, left), (height, width) = regions.start[place], regions.shape[place]
            box = Image.fromarray(expected[top : top + height, left : left + width])
            expected = np.asarray(box.resize((160, 96), Image.Resampling.NEAREST))
        elif crop != "whole":
            expected = expected[top : top + 96, left : left + 160]
        if crop in ("random", "resized") and draws.flip[place]:
            expected = expected[:, ::-1]
        assert np.array_equal(masks[place], expected)


def test_an_augmentation_has_masks_beside_it(made):
    def darken(images, draw):
        return images * draw.uniform("dark", 0.5, 1.0)

    plain, augmented = (
        take(made, masks=("seg.png",), augment=augment)[0] for augment in (None, darken)
    )
    assert torch.equal(plain.masks["seg.png"], augmented.masks["seg.png"])
    assert not torch.equal(plain.images, augmented.images)


def damage_member(folder: Path, sample: int, field: str) -> None:
    """Flip a bit of a member of a training sample."""
    row = np.load(folder / f"train.field-{field}.index.npy")[sample]
    shard = folder / f"train-{rows_of(folder, 'train')['shard'][sample]:02d}.tar"
    with shard.open("r+b") as file:
        file.seek(int(row["offset"]))
        (byte,) = file.read(1)
        file.seek(int(row["offset"]))
        file.write(bytes([byte ^ 1]))


def test_a_damaged_member_replaces_its_sample(foreign, tmp_path):
    damage_member(foreign, 5, "json")
    damage_member(foreign, 11, "seg.png")
    settings = {"fields": ("json", "txt"), "masks": ("seg.png",)}
    (found,) = take(foreign, **settings, quarantine=tmp_path / "q.jsonl")
    assert found.replaced.sum() == 2
    assert not {5, 11} & set(found.ids.tolist())
    for sample, table in zip(found.ids.tolist(), found.fields["json"], strict=True):
        assert table["box"][0] == sample
    listed = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert {(row["sample"], row["key"], row["reason"]) for row in listed} == {
        (5, "train/n00005", "its .json: CRC-32 differs"),
        (11, "train/n00011", "its .seg.png: CRC-32 differs"),
    }
    (plain,) = take(foreign)  # what is not asked for is not read
    assert not plain.replaced.any()
    with pytest.raises(DataError, match=r"train sample \d+ .*: its \.json: CRC-32 differs; duet"):
        take(foreign, fields=("json",), strict=True)
    assert [(one["sample"], one["reason"]) for one in verify(foreign)] == [
        (5, "CRC-32 of its .json differs"),
        (11, "CRC-32 of its .seg.png differs"),
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encode_mask(make_mask(0)[:100], palette=False), "it is 256x100, its image 256x256"),
        (b"no PNG", "cannot identify image file"),
        (encode_mask(np.zeros((256, 256, 3), np.uint8), palette=False), "its pixels are RGB"),
    ],
)
def test_a_mask_that_is_none_replaces_its_sample(tmp_path, content, reason):
    with webdataset.TarWriter(str(tmp_path / "train-0.tar"), encoder=False) as writer:
        for n in range(4):
            mask = content if n == 2 else encode_mask(make_mask(n), palette=False)
            members = {"jpg": make_image(n), "cls": b"%d" % (n % 2), "seg.png": mask}
            writer.write({"__key__": f"{n}", **members})
    index(tmp_path, fields=("seg.png",))
    with Stream(tmp_path, batch_size=4, masks=("seg.png",)) as stream:
        assert 2 not in next(stream).ids.tolist()
        assert reason in stream.damaged[2].reason
        with pytest.raises(DataError, match="train sample 2"):
            stream[2]


def test_a_field_that_a_sample_lacks_is_refused_by_name(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "train-0.tar"), encoder=False) as writer:
        for n in range(4):
            members = {"jpg": make_image(n), "cls": b"%d" % (n % 2)}
            writer.write({"__key__": f"k{n}", **members, **({"json": b"{}"} if n != 3 else {})})
    outcome = index(tmp_path, fields=("json",))
    assert outcome.manifest is None
    assert [str(bad) for bad in outcome.bad] == ["train-0.tar key k3: it has no .json"]
    assert index(tmp_path, fields=("json",), skip_bad=True).manifest.rejected == 1
    assert take(tmp_path, batch_size=3, fields=("json",))[0].fields == {"json": [{}, {}, {}]}
    with pytest.raises(UsageError, match=r"no field 'txt' \(it has json\); run duet index-shards"):
        Stream(tmp_path, fields=("txt",))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"fields": "json"}, r"fields is 'json'; it takes endings"),
        ({"fields": None}, r"fields is None; it takes endings"),
        ({"fields": ("../x",)}, "it takes endings in small letters"),
        ({"masks": ("seg.jpg",)}, "masks has 'seg.jpg'; a mask is a PNG"),
    ],
)
def test_fields_that_cannot_be_are_refused(made, settings, words):
    with pytest.raises(ValueError, match=words):
        Stream(made, **settings)


@pytest.mark.parametrize(
    "array",
    [
        np.float64(2.5),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.asfortranarray(np.arange(24, dtype="c8").reshape(2, 3, 4)),
        np.array(["a\u00e4", "b"]),
        np.zeros((0, 3), bool),
        np.arange(3, dtype=np.uint8),
    ],
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), None])
def test_arrays_are_numpys(array, version):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), version)
    found = find_parser("box.npy")(file.getvalue())
    assert found.dtype == np.asarray(array).dtype
    np.testing.assert_array_equal(found, array)
    for content in (b"", b"no array", file.getvalue()[:70], b"x" + file.getvalue()):
        with pytest.raises(ValueError, match=r"no \.npy"):
            find_parser("npy")(content)


def test_a_member_that_cannot_be_parsed_is_no_damage_of_the_set(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "train-0.tar"), encoder=False) as writer:
        for n in range(2):
            writer.write({"__key__": f"{n}", "jpg": make_image(n), "cls": b"%d" % n, "json": b"{"})
    index(tmp_path, fields=("json",))
    assert verify(tmp_path) == []
    words = r"its \.json: it cannot be used .*; its bytes are as they were packed; mend it at its"
    with pytest.raises(DataError, match=words):
        take(tmp_path, batch_size=2, fields=("json",), strict=True)
    with Stream(tmp_path, fields=("json",)) as stream, pytest.raises(DataError, match=words):
        stream[1]


def test_labels_of_ones_own(tiny_data, tmp_path):
    count = 48
    values = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    np.save(tmp_path / "labels.npy", values)
    for labels in (values, values[:, 0], torch.arange(count), tmp_path / "labels.npy"):
        with Stream(tiny_data, batch_size=20, labels=labels) as stream:
            batch = next(stream)
            expected = np.load(labels) if isinstance(labels, Path) else np.asarray(labels)
            assert np.array_equal(batch.labels.numpy(), expected[batch.ids.numpy()])
            assert batch.labels.dtype == (
                torch.int64 if expected.ndim == 1 and expected.dtype == np.int64 else torch.float32
            )
            assert np.array_equal(stream[7].label, expected[7])
    (batch,) = take(tiny_data, labels=None)
    assert batch.labels.tolist() == [-1] * COUNT
    for labels, words in (
        (values[:9], r"labels have the shape \[9, 3\]; the split has 48 samples, and takes \[48\]"),
        (np.ma.array(values, mask=values > 1), r"labels has masked values; say what they stand"),
        (values > 0, r"labels are bool; give float32 or int64"),
        (tmp_path / "none.npy", r"labels .*none\.npy cannot be read \(No such file"),
    ):
        with pytest.raises(UsageError, match=words):
            Stream(tiny_data, labels=labels)


def test_one_sample_is_read_by_key_name_or_id(made, tiny_data):
    with Stream(made, fields=FIELDS, masks=("seg.png",)) as stream:
        for sample in (0, 3, 19):
            key = webdatasets(made)[sample]["__key__"]
            one = stream[key]
            assert (one.id, one.key, one.name, one.label) == (sample, key, None, sample % 4)
            assert one.pixels.shape == (256, 256, 3)
            assert np.array_equal(one.masks["seg.png"], make_mask(sample))
            assert one.fields["json"] == make_members(sample)["json"]
            assert stream[sample].key == key
        for key in ("n00003", "train/n0000", "", "a\nb", "\ud800", 20, -1):
            with pytest.raises(KeyError) as caught:
                stream[key]
            assert "\n" not in str(caught.value)
    with Stream(tiny_data) as stream:
        next(stream)
        one = stream["000002_00007"]
        assert (one.id, one.key) == (27, "000002_00007")
        assert stream[one.name].id == 27
        for key in (1.0, None, b"0"):
            with pytest.raises(KeyError, match="is no key, file name or id of a sample"):
                stream[key]
        for key in ("000002_00010", "000005_00000", "0000002_00007"):
            with pytest.raises(KeyError, match="has no sample"):
                stream[key]
    with pytest.raises(ValueError, match="was closed"):
        stream[0]


def test_keys_of_sets_indexed_before_come_from_the_tars(foreign):
    with Stream(foreign, once=True, batch_size=COUNT, crop="center") as stream:
        expected = next(stream).keys
    edit_manifest(foreign, lambda table: table["splits"]["train"].pop("tables"))
    for path in foreign.glob("train.keys.*"):
        path.unlink()
    with Stream(foreign, once=True, batch_size=COUNT, crop="center") as stream:
        assert next(stream).keys == expected
        assert stream["train/n00007"].id == 7


def test_a_key_that_two_samples_have_is_refused(tmp_path):
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"train-{shard}.tar"), encoder=False) as writer:
            for n in range(2):
                members = {"jpg": make_image(2 * shard + n), "cls": b"%d" % n}
                writer.write({"__key__": f"{n}", **members})
    index(tmp_path)
    with Stream(tmp_path, batch_size=2) as stream, pytest.raises(KeyError, match=r"\[1, 3\]"):
        stream["1"]


def test_a_line_of_millions_is_found_without_reading_them(tmp_path, monkeypatch):
    """A table is opened and asked for a line by a few pages, however many lines it has."""
    count = 14_000_000
    folder = tmp_path / "tables"
    folder.mkdir()
    few = 1000
    texts = [f"class/{n:07d}\n\\.jpg" for n in range(few)]
    save_texts(folder, "train", "names", few, map(escape_line, texts))
    table = TextTable(folder, "train", "names", few)
    ids = np.array([0, 1, 999, 500, 0])
    assert table.read(ids) == [texts[n] for n in ids]
    assert list(table.find(texts[999])) == [999]
    assert list(table.find(texts[0])) == [0]
    assert list(table.find("class/")) == []
    # Two sparse files of the size of 14 million lines: reading them through would show.
    line = escape_line("x" * 30)
    with (folder / "val.names.txt").open("wb") as file:
        file.truncate(count * len(line))
        for place in (0, 7_000_000, count - 1):
            file.seek((place or 1) * len(line) - 1)
            file.write(b"\n" + line if place else line[-1:])
        file.seek(0)
        file.write(line)
    np.save(folder / "val.names.index.npy", np.arange(1, count + 1, dtype="<u8") * len(line))
    before = resident_pages()
    table = TextTable(folder, "val", "names", count)
    assert table.read(np.array([0, 7_000_000, count - 1])) == ["x" * 30] * 3
    assert resident_pages() - before < 1 << 22
    with pytest.raises(DamagedFile, match="line 6 is not where it should be"):
        table.read(np.array([5]))


def resident_pages() -> int:
    """Bytes of files that this process has mapped and read."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * 4096


def test_sets_of_a_mixture_have_members_of_their_own(made, foreign):
    data = {made: 0.5, foreign: 0.5}
    with Stream(data, batch_size=COUNT, fields=("json",), masks=("seg.png",)) as stream:
        batch = next(stream)
        assert max(batch.ids.tolist()) >= COUNT
        for place, sample in enumerate(batch.ids.tolist()):
            assert batch.fields["json"][place]["box"][0] == sample % COUNT
            assert batch.keys[place].endswith(f"n{sample % COUNT:05d}")
        assert batch.names is None
        assert np.array_equal(stream[COUNT + 5].masks["seg.png"], make_mask(5))
        with pytest.raises(KeyError, match=r"'train/n00005' more than once; give an id, as \[5, "):
            stream["train/n00005"]
        with pytest.raises(KeyError, match="has no sample 'none'"):
            stream["none"]


def test_a_store_gives_tables_when_they_are_asked_for(made, tmp_path):
    cache = tmp_path / "cache"
    with Server(made) as server:
        with Stream(server.address, batch_size=COUNT, cache=cache) as stream:
            batch = next(stream)
            assert not list(cache.glob("*/train.keys.*"))
            assert sorted(batch.keys) == sorted(one["__key__"] for one in webdatasets(made))
            assert len(list(cache.glob("*/train.keys.*"))) == 2
            later = next(stream)
        assert len(later.keys) == COUNT
        for path in cache.glob("*/train.keys.*"):
            path.unlink()
        with Stream(server.address, batch_size=COUNT, cache=cache) as stream:
            batch = next(stream)
        with pytest.raises(UsageError, match=r"ask for batch\.keys before it is closed"):
            batch.keys  # noqa: B018 - it is looked up
        assert not list(cache.glob("*/train.field-*"))
        with Stream(server.address, batch_size=COUNT, cache=cache, fields=("txt",)) as stream:
            batch = next(stream)
            for sample, text in zip(batch.ids.tolist(), batch.fields["txt"], strict=True):
                assert text == make_members(sample)["txt"]


def test_tables_are_verified(foreign, tiny_data):
    before = foreign.joinpath("train.keys.txt").read_bytes()
    (foreign / "train.keys.txt").write_bytes(before.replace(b"n00004", b"n00044"))
    assert [(one["file"], one["reason"]) for one in verify(foreign)] == [
        ("train.keys.txt", "SHA-256 differs from the manifest")
    ]
    digest = sha(foreign / "train.keys.txt")
    edit_manifest(
        foreign,
        lambda table: table["splits"]["train"]["tables"].update({"keys.txt": digest}),
    )
    assert [(one["sample"], one["reason"]) for one in verify(foreign)] == [
        (4, "its key is train/n00004 in the tar and train/n00044 in the table")
    ]
    edit_manifest(
        foreign,
        lambda table: table["splits"]["train"]["tables"].update({"../x.txt": digest}),
    )
    with pytest.raises(DamagedFile, match=r"has a table '\.\./x\.txt' that none can have"):
        Stream(foreign)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_masks_of_few_bits_keep_their_numbers(depth):
    numbers = np.arange(32).reshape(4, 8) % 2**depth
    bits = (numbers[:, :, None] >> np.arange(depth - 1, -1, -1)) & 1
    rows = np.packbits(bits.reshape(4, -1).astype(np.uint8), axis=1)

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + crc

    header = struct.pack(">IIBBBBB", 8, 4, depth, 0, 0, 0, 0)  # PNG specification, 11.2.2
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(parts)
    assert np.array_equal(decode_mask(png, (4, 8))[:, :, 0], numbers)


def test_a_batch_that_was_sent_and_moved_keeps_keys_and_names(tiny_data):
    with Stream(tiny_data, batch_size=5, threads=1) as stream:
        batch = next(stream)
        sent = pickle.loads(pickle.dumps(batch)).to("cpu")
    assert (sent.keys, sent.names) == (batch.keys, batch.names)
    assert len(sent.keys) == 5
