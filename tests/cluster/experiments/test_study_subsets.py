"""Parts of a data set: the right images, of the right classes, and nothing else."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cluster.experiments.study.config import DataSubset
from cluster.experiments.study.subsets import make_subset
from pipeline.dataset.manifest import Manifest
from pipeline.tools.errors import DataError, UsageError
from tests.helpers.images import flip_bit, packed, rows_of


def stored(data, split):
    """Label and pixels of every image, as Pillow has them."""
    rows = rows_of(data, split)
    found = []
    for row in rows:
        content = (data / f"{split}-{row['shard']:06d}.tar").read_bytes()
        content = content[row["offset"] : row["offset"] + row["size"]]
        pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), np.float64)
        found.append((int(row["label"]), pixels))
    return found


def raw(data):
    """Bytes of every training image of a raw set."""
    shard = (data / "train-000000.tar").read_bytes()
    return [shard[r["offset"] : r["offset"] + r["size"]] for r in rows_of(data, "train")]


@pytest.fixture(scope="module")
def part(tiny_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("parts") / "second"
    return make_subset(
        str(tiny_data), DataSubset(classes=(0.5, 1.0), per_class=5, val_per_class=2), out
    )


def test_it_has_so_many_images_of_these_classes(part):
    manifest = Manifest.load(part)
    assert manifest.classes == ("cat", "dog")
    for split, each in (("train", 5), ("val", 2)):
        labels = rows_of(part, split)["label"].tolist()
        assert sorted(labels) == [0] * each + [1] * each
    assert not part.with_name("second.source").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_its_images_are_those_of_the_set_the_first_of_each_class(part, tiny_data, split):
    originals = stored(tiny_data, split)
    each = {"train": 5, "val": 2}[split]
    for label in (0, 1):
        expected = [pixels for own, pixels in originals if own == label + 2][:each]
        matches = set()
        for own, pixels in stored(part, split):
            if own == label:
                gaps = [np.abs(pixels - other).mean() for other in expected]
                assert min(gaps) < 3  # encoded twice
                matches.add(int(np.argmin(gaps)))
        assert len(matches) == each


def test_raw_parts_hold_pixels_and_can_be_cut_again(tiny_data, tmp_path):
    first = make_subset(str(tiny_data), DataSubset(per_class=3, encoding="raw"), tmp_path / "raw")
    assert Manifest.load(first).encoding == "raw"
    again = make_subset(str(first), DataSubset(per_class=2, encoding="raw"), tmp_path / "again")
    originals, taken = (set(raw(data)) for data in (first, again))
    assert (len(originals), len(taken)) == (12, 8)
    assert taken < originals


def test_a_part_has_the_size_of_the_set_that_it_is_of(image_folder, tmp_path):
    folders = {split: image_folder / split for split in ("train", "val")}
    small = tmp_path / "small"
    packed(small, **folders, size=32, encoding="raw")
    subset = DataSubset(classes=(0.0, 1.0), per_class=2, val_per_class=2, encoding="raw")
    part = make_subset(str(small), subset, tmp_path / "part")
    assert Manifest.load(part).image_size == 32
    assert set(raw(part)) <= set(raw(small))  # the very pixels


def test_what_is_there_is_not_made_again(part, tiny_data):
    before = (part / "manifest.json").stat().st_mtime_ns
    same = DataSubset(classes=(0.5, 1.0), per_class=5, val_per_class=2)
    assert make_subset(str(tiny_data), same, part) == part
    assert (part / "manifest.json").stat().st_mtime_ns == before


def test_another_part_is_not_taken_for_the_one_that_is_there(part, tiny_data):
    with pytest.raises(UsageError, match="is another part, or of other data"):
        make_subset(
            str(tiny_data), DataSubset(classes=(0.5, 1.0), per_class=6, val_per_class=2), part
        )


def test_a_part_of_a_single_class_is_refused(tiny_data, tmp_path):
    with pytest.raises(UsageError, match=r"of 4 are 1; a part needs two at least"):
        make_subset(str(tiny_data), DataSubset(classes=(0, 0.3)), tmp_path / "one")


def test_a_damaged_image_is_told(data, tmp_path):
    flip_bit(data, "train", *range(48))
    with pytest.raises(DataError, match=r"CRC-32 differs; a study wants sound images"):
        make_subset(str(data), DataSubset(), tmp_path / "part")
