"""docs/format.md is complete: a reader written from it alone delivers what `Stream` delivers."""

from __future__ import annotations

import ast
import io
import itertools
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import Stream
from pipeline.options import BuildConfig, WithdrawOptions
from pipeline.packing.additions import add_version
from pipeline.stream import order
from pipeline.stream.selection.record import Selection, make_order
from pipeline.withdraw import make_version
from tests.docs.pages import REPOSITORY
from tests.helpers import format_reader as other
from tests.helpers.images import InProcess, flip_bit, packed

PAGE = (REPOSITORY / "docs" / "format.md").read_text("utf-8")
SIZES = [6, 6, 4]


@pytest.fixture(scope="module")
def raw_data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "data"
    packed(out, train=image_folder / "val", samples_per_shard=6, encoding="raw")
    return out


def test_the_other_reader_has_no_code_of_ours():
    tree = ast.parse(Path(other.__file__).read_text("utf-8"))
    names = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert not names & {"pipeline", "model", "cluster", "tests"}
    assert "random" not in Path(other.__file__).read_text("utf-8").replace("random generators", "")


def vector(name: str) -> list[int]:
    """The ids of a test vector of the page."""
    found = re.search(rf"^{re.escape(name)} +([\d ]+)$", PAGE, re.M)
    assert found, name
    return [int(sample) for sample in found[1].split()]


def block_epoch(*args: Any) -> list[int]:
    return [sample for window in other.block_windows(*args) for sample in window]


def test_vectors_of_the_page(monkeypatch: pytest.MonkeyPatch):
    full, block = order.FullShuffle(SIZES, 7), order.BlockShuffle(SIZES, 7, window=2)
    for epoch in (0, 1):
        ids = vector(f"full, epoch {epoch}")
        assert ids == other.full_epoch(16, 7, epoch) == full.list_slots(16 * epoch, 16).ids.tolist()
        ids = vector(f"block, W = 2, epoch {epoch}")
        assert ids == block_epoch(SIZES, 7, epoch, 2)
        assert ids == block.list_slots(16 * epoch, 16).ids.tolist()
    seed = 2**40 + 7
    ids = vector("full, epoch 0, seed 2**40 + 7")
    assert ids == other.full_epoch(16, seed, 0)
    assert ids == order.FullShuffle(SIZES, seed).list_slots(0, 16).ids.tolist()
    monkeypatch.setattr(order, "PART", 8)
    ids = vector("full, epoch 0, 8 for 2**21")
    assert ids == other.full_epoch(16, 7, 0, part=8)
    assert ids == order.FullShuffle(SIZES, 7).list_slots(0, 16).ids.tolist()
    assert "2²¹" in PAGE


def test_draws_of_the_page():
    for k in (0, 6):
        assert f"word {k}" in PAGE.replace(" is ", " ")
        assert f"`{other.word(7, 1, 5, k):#018x}`" in PAGE
    assert other.crop_of(7, 1, 5) == (19, 8, False)
    assert "left 19, top 8, not mirrored" in PAGE
    color = ", ".join(f"{value:.6f}".replace("-", "−") for value in other.color_of(7, 1, 5))
    assert color in PAGE
    ids = [other.word(7, 1, 5, 7 + t) % 16 for t in range(4)]
    assert f"damaged id 5: {', '.join(map(str, ids))}." in PAGE
    full = order.FullShuffle(SIZES, 7)
    assert ids == [full.choose_substitute(16, 5, turn) for turn in range(4)]


@pytest.mark.parametrize("seed", [0, 3, 2**33, 2**63 - 1])
def test_many_orders(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(order, "PART", 100)
    sizes = [25, 100, 3, 60, 72]
    ids = order.FullShuffle(sizes, seed).list_slots(260, 260).ids.tolist()
    assert ids == other.full_epoch(260, seed, 1, part=100)
    ids = order.BlockShuffle(sizes, seed, window=3).list_slots(0, 260).ids.tolist()
    assert ids == block_epoch(sizes, seed, 0, 3)


@pytest.mark.parametrize("seed", [3, 2**63 - 1])
def test_selected_weighted_and_mixed_orders(seed: int):
    kept = np.arange(16) % 3 != 1
    ids = np.flatnonzero(kept)
    selection = Selection(identities=("a",), shards=((6, 6, 4),), kept=kept)
    found = make_order(selection, seed, "full").list_slots(len(ids), len(ids)).ids
    assert found.tolist() == ids[other.full_epoch(len(ids), seed, 1)].tolist()
    weights = np.random.default_rng(seed % 97).random(16)
    selection = Selection(identities=("a",), shards=((6, 6, 4),), weights=weights / weights.max())
    found = make_order(selection, seed, "full").list_slots(0, 100).ids.tolist()
    assert found == [other.weighted_id(seed, p, weights.tolist()) for p in range(100)]
    selection = Selection(identities=("a", "b"), shards=((6, 6), (3, 4)), shares=(0.7, 0.3))
    found = make_order(selection, seed, "full").list_slots(0, 1200).ids.tolist()
    assert found == other.mixture_ids(seed, [12, 7], ["0.7", "0.3"], 1200)


def test_parts_of_a_split(tiny_data: Path):
    shares = {"train": 0.5, "val": 0.3, "test": 0.2}
    for name in shares:
        settings = {"split_by": shares, "split_seed": 11, "batch_size": 48, "once": True}
        with Stream(tiny_data, split=name, size=8, threads=1, **settings) as stream:
            batch = next(stream)
        found = batch.ids[batch.weights > 0].tolist()
        assert found == [k for k in range(48) if other.part_of(11, k, shares) == name]


def test_members_are_those_of_the_page(tiny_data: Path):
    reader = other.FormatReader(tiny_data, "train")
    first = 0
    for number, shard in enumerate(reader.shards):
        idx = (tiny_data / shard["name"].replace(".tar", ".idx")).read_text().splitlines()
        assert idx[0] == f"v1.2 {shard['samples']}"
        with tarfile.open(tiny_data / shard["name"]) as tar:
            members = tar.getmembers()
            names = [
                f"{number:06d}_{place:05d}.{ending}"
                for place in range(shard["samples"])
                for ending in ("cls", "jpg")
            ]
            assert [member.name for member in members] == names
            assert {member.mtime for member in members} == {0}
            for place in range(shard["samples"]):
                cls, jpg = members[2 * place : 2 * place + 2]
                words = [f"cls {cls.offset_data} {cls.size} {cls.name}",
                         f"jpg {jpg.offset_data} {jpg.size} {jpg.name}"]  # fmt: skip
                assert idx[place + 1] == " ".join(words)
                label, image = (tar.extractfile(member).read() for member in (cls, jpg))
                assert int(label) == reader.label(first + place)
                assert image == reader.image(first + place)
        first += shard["samples"]


@pytest.mark.parametrize("window", [None, 2])
def test_the_other_reader_delivers_what_the_stream_delivers(raw_data: Path, window: int | None):
    """Ids, labels and pixels, over an epoch's border, of two ranks with uneven slices."""
    reader, batch, seed = other.FormatReader(raw_data, "train"), 15, 11
    settings = {"shuffle": "full"} if window is None else {"shuffle": "block", "window": window}
    slots = list(itertools.islice(reader.slots(seed, window), 2 * batch))
    for rank, (first, last) in enumerate([(0, 7), (7, 15)]):
        with Stream(
            raw_data, batch_size=batch, seed=seed, position=batch, rank=rank, world_size=2,
            threads=1, **settings,
        ) as stream:  # fmt: skip
            got = next(stream)
        expected = slots[batch + first : batch + last]
        assert got.ids.tolist() == [sample for _, sample in expected]
        assert got.labels.tolist() == [reader.label(sample) for _, sample in expected]
        assert got.names == [reader.name(sample) for _, sample in expected]
        pixels = np.stack([reader.pixels(sample, seed, epoch) for epoch, sample in expected])
        np.testing.assert_allclose(got.images.numpy(), pixels, rtol=0, atol=1e-4)


def test_a_damaged_sample_is_replaced_as_the_page_says(raw_data: Path, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    for path in raw_data.iterdir():
        (data / path.name).write_bytes(path.read_bytes())
    reader, seed = other.FormatReader(raw_data, "train"), 5
    slots = list(itertools.islice(reader.slots(seed), 20))
    flip_bit(data, "train", slots[3][1])
    with Stream(data, batch_size=20, seed=seed, threads=1) as stream:
        got = next(stream)
    due = slots[3][1]
    chosen = next(one for one in reader.substitutes(seed, 0, due) if one != due)
    assert got.replaced.tolist() == [place == 3 for place in range(20)]
    assert got.ids[3] == chosen
    pixels = reader.pixels(chosen, seed, 0, due)
    np.testing.assert_allclose(got.images[3].numpy(), pixels, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"size": 40}, {"fit": "none"}, {"fit": "shorter", "size": 40}]
)
def test_sizes_are_where_the_page_has_them(image_folder: Path, tmp_path: Path, settings: Any):
    packed(tmp_path / "data", train=image_folder / "val", **settings)
    reader = other.FormatReader(tmp_path / "data", "train")
    for sample in range(len(reader.rows)):
        with Image.open(io.BytesIO(reader.image(sample))) as image:
            assert reader.size(sample) == (image.height, image.width)
    assert reader.rows.dtype.itemsize == (28 if "fit" in settings else 24)
    side = 40 if settings == {"size": 40} else 256
    assert reader.stats["mean_picture"].shape == (side, side, 3)


def test_the_page_says_where_the_files_of_each_version_are(image_folder, tmp_path):
    """Version 2 has more images, version 3 lacks one that was purged: version 1 lacks it, too."""
    data, source = tmp_path / "data", image_folder / "val"
    packed(data, train=source, samples_per_shard=6, size=32)
    first = other.FormatReader(data, "train")
    gone = [n for n in range(len(first.rows)) if first.name(n) == "cat/001.jpg"]
    config = {"out": str(data), "samples_per_shard": 6}
    add_version(BuildConfig(add=str(image_folder / "train"), **config), pool=InProcess())
    (tmp_path / "keys").write_text("cat/001.jpg\n")
    options = WithdrawOptions(data=str(data), keys=tmp_path / "keys", purge=True, workers=1)
    make_version(options, pool=InProcess())
    readers = [other.FormatReader(data, "train", number) for number in (1, 2, 3)]
    assert [len(reader.rows) for reader in readers] == [20, 68, 66]
    assert [len(reader.withdrawn) for reader in readers] == [1, 2, 0]
    assert readers[0].withdrawn == set(gone)
    for reader in (*readers, other.FormatReader(data, "train")):
        for sample in set(range(len(reader.rows))) - reader.withdrawn:
            assert reader.image(sample)
    with pytest.raises(AssertionError):
        readers[0].image(*gone)
