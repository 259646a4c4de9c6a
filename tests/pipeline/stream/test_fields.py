"""Keys, names, other members of a sample, masks and labels of one's own come with its image."""

from __future__ import annotations

import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from pipeline.batches import Stream
from pipeline.stream.augment import draw, draw_regions
from pipeline.stream.order import FullShuffle
from pipeline.verify import verify
from tests.helpers.foreign_shards import index, make_image
from tests.helpers.images import rows_of

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
