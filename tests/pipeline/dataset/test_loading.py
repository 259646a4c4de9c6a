"""Hostile files beside the shards, with hashes that fit them, are refused in one line where they
are loaded, or change nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.index import INDEX_DTYPE, MOST_IMAGE_BYTES, load_index
from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import open_dataset
from pipeline.remote.local import LocalDataset
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import DamagedFile, DataError, DuetError
from pipeline.tools.files import is_plain_name
from pipeline.verify import verify
from tests.helpers.images import rows_of
from tests.helpers.resealed_data import edit_manifest, reseal, sha

MANY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NUMBERS = st.sampled_from(
    [-1, 0, 1, 4, 77, 99, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 10**20, 0.5, 1e300, True]
)
TEXTS = st.sampled_from(["", "..", "/etc", "a\0b", "a/b", "\ud800", "x" * 300, "train", "\n"])
VALUES = st.one_of(NUMBERS, TEXTS, st.just(float("nan")), st.none(), st.just([]), st.just({}),
                   st.just([[1, 2]]), st.just({"a": {}}))  # fmt: skip


def open_all(data: Path) -> list[np.ndarray]:
    """Load everything, as a stream does, and read every sample; return the labels of all splits."""
    open_dataset(data)
    manifest = Manifest.load(data)
    statistics = Statistics.load(data, manifest)
    assert all(np.isfinite(array).all() for array in vars(statistics).values())
    labels = []
    for split in manifest.splits:
        reader = ShardReader(LocalDataset(data), split)
        ids = np.arange(len(reader))
        assert reader.buffer_size(ids) <= sum(shard.bytes for shard in reader.shards)
        _, damaged = reader.read(ids)
        assert all("\n" not in str(damage) for damage in damaged.values())
        labels.append(reader.read_labels(ids))
        reader.close()
    return labels


def refuse(data: Path) -> str:
    """Return the line with which `open_all` refuses; "" if it does not."""
    try:
        open_all(data)
    except DuetError as error:
        said, code = str(error), error.exit_code
    else:
        return ""
    assert len(said.splitlines()) == 1
    assert len(said) < 1000
    assert code in (2, 4)
    return said


def keep(data: Path) -> dict[str, bytes]:
    small = (path for path in data.iterdir() if path.suffix in (".json", ".npy", ".npz"))
    return {path.name: path.read_bytes() for path in small}


def restore(data: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (data / name).write_bytes(content)


def places(table: object, place: tuple = ()) -> list[tuple]:
    """Return the path of every value in a table of JSON."""
    parts = table.items() if isinstance(table, dict) else enumerate(table)
    found = []
    for key, value in parts:
        found.append((*place, key))
        if isinstance(value, dict | list):
            found += places(value, (*place, key))
    return found


@MANY
@given(st.data())
def test_a_manifest_without_a_digest_that_says_anything_is_a_line(data, draw):
    files = keep(data)
    table = json.loads(files["manifest.json"])
    table.pop("manifest_sha256")
    place = draw.draw(st.sampled_from(places(table)))
    value = draw.draw(VALUES)

    def change(table: dict) -> None:
        for key in place[:-1]:
            table = table[key]
        table[place[-1]] = value

    edit_manifest(data, change)
    said = refuse(data)
    found = verify(data)
    assert bool(said) <= bool(found)  # verify sees all that loading refuses
    assert all("\n" not in one["reason"] for one in found)
    restore(data, files)


@settings(MANY, max_examples=25)
@given(
    st.sampled_from(INDEX_DTYPE.names),
    st.sampled_from([0, 1, 3, 4, 77, 99, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1]),
    st.integers(0, 47),
)
def test_an_index_with_any_row_is_a_line_or_damage(data, field, value, sample):
    files = keep(data)
    rows = np.array(rows_of(data, "train"))
    before = rows.copy()
    rows[field][sample] = np.array(value).astype(INDEX_DTYPE[field])
    np.save(data / "train.index.npy", rows)
    reseal(data)
    said = refuse(data)
    assert ("train.index.npy" in said and f"sample {sample}: " in said) or said == ""
    assert bool(verify(data)) == bool(rows.tobytes() != before.tobytes())
    restore(data, files)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("label", -1, "sample 12: its label -1 is outside the classes, 0 to 3"),
        ("label", 99, "sample 12: its label 99 is outside the classes"),
        ("shard", 77, "sample 12: the index has it in shard 77"),
        ("size", 2**32 - 1, "sample 12: the shard ends before it does"),
        ("offset", 2**64 - 1, "sample 12: the shard ends before it does"),
        ("size", 0, "sample 12: its image has 0 bytes"),
    ],
)
def test_a_row_that_cannot_be_is_named_with_its_sample(data, field, value, words):
    rows = np.array(rows_of(data, "train"))
    rows[field][12] = value
    np.save(data / "train.index.npy", rows)
    reseal(data)
    assert words in refuse(data)


def test_an_index_of_another_shape_or_size_is_refused(data):
    rows = np.array(rows_of(data, "train"))
    for other in (rows.reshape(2, -1), rows[:-1], rows["label"], rows[0], rows[:0]):
        np.save(data / "train.index.npy", other)
        reseal(data)
        assert "train.index.npy cannot be read (it is n" in refuse(data)
        assert [one["file"] for one in verify(data)] == ["train.index.npy"]
    with (data / "train.index.npy").open("wb") as file:
        np.savez(file, rows=rows)
    reseal(data)
    assert "train.index.npy cannot be read" in refuse(data)


def test_an_image_larger_than_any_is_refused_whatever_its_shard(data):
    rows = np.array(rows_of(data, "train"))
    rows["size"][12] = MOST_IMAGE_BYTES + 1
    np.save(data / "train.index.npy", rows)
    reseal(data)
    edit_manifest(data, lambda table: table["splits"]["train"]["shards"][1].update(bytes=2**60))
    assert "sample 12: its image has 16,777,217 bytes" in refuse(data)


def test_rows_are_checked_in_blocks_that_end_inside_shards(data, monkeypatch):
    monkeypatch.setattr("pipeline.dataset.index.BLOCK", 7)
    manifest = Manifest.load(data)
    rows = rows_of(data, "train").copy()
    assert load_index(data, "train", manifest).tobytes() == rows.tobytes()
    for sample in (0, 6, 7, 9, 10, 47):
        other = rows.copy()
        other["shard"][sample] += 1
        np.save(data / "train.index.npy", other)
        split = replace(manifest.splits["train"], index_sha256=sha(data / "train.index.npy"))
        with pytest.raises(DamagedFile, match=f"sample {sample}: "):
            load_index(data, "train", replace(manifest, splits={"train": split}))


@pytest.mark.parametrize("name", ["mean_picture", "channel_mean", "eigenvalues", "covariance"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1e300, 1e300])
def test_statistics_with_any_number_are_refused(data, name, value):
    with np.load(data / "stats.npz") as file:
        arrays = dict(file)
    with np.errstate(over="ignore"):
        arrays[name].flat[0] = value
    np.savez(data / "stats.npz", **arrays)
    reseal(data)
    assert "stats.npz cannot be read (" in refuse(data)
    assert [one["file"] for one in verify(data)] == ["stats.npz"]


def test_statistics_that_unpack_to_more_than_they_are_are_refused(data):
    with np.load(data / "stats.npz") as file:
        arrays = dict(file)
    np.savez_compressed(data / "stats.npz", **arrays, more=np.zeros(2**23))
    reseal(data)
    assert "unpacked, it has more than" in refuse(data)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version":' * 9_000, "9" * 5000, "1e999", "{}"])
def test_json_that_is_no_manifest_is_a_line(data, text):
    (data / "manifest.json").write_text(text)
    assert "manifest.json cannot be read (" in refuse(data)
    assert [one["file"] for one in verify(data)] == ["manifest.json"]


def test_a_manifest_carries_a_digest_of_itself_and_older_ones_do_not(data):
    sound = Manifest.load(data)
    assert Manifest.parse(sound.text(), "it") == sound
    (data / "manifest.json").write_text(json.dumps(json.loads(sound.text()), sort_keys=True))
    assert Manifest.load(data) == sound  # whatever the order of its keys
    edit_manifest(data, lambda table: table.update(seed=9))
    assert Manifest.load(data) == replace(sound, seed=9)  # made before there were digests
    table = json.loads(sound.text())
    for key, value in (("seed", 9), ("sources", {}), ("plan", "x"), ("quality", 50)):
        with pytest.raises(DataError, match="its bytes are not those that were written"):
            Manifest.parse(json.dumps(table | {key: value}).encode(), "it")


def test_a_plain_name_is_that_of_a_file_in_the_folder():
    assert all(map(is_plain_name, ("a.tar", "a b", "ü", "a" * 255, "\udcff.tar")))
    odd = (
        "",
        ".",
        "..",
        "/a",
        "a/b",
        "../a",
        ".a",
        "a\0",
        "a" * 256,
        "ü" * 128,
        "\ud800",
        "\udc00",
        7,
        None,
    )
    assert not any(map(is_plain_name, odd))


def test_sets_with_and_without_digest_have_the_same_shards(tiny_data, tmp_path):
    copy = Path(shutil.copytree(tiny_data, tmp_path / "old"))
    edit_manifest(copy, lambda table: None)
    for old, new in zip(open_all(copy), open_all(tiny_data), strict=True):
        assert np.array_equal(old, new)
