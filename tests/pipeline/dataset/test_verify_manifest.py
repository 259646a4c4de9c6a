"""Manifests, statistics and lists that cannot be are found, whatever their hashes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipeline.dataset.manifest import Manifest
from pipeline.tools.errors import DataError, UsageError
from pipeline.verify import verify
from tests.helpers.resealed_data import SHARD, edit_manifest, reseal


def without_finite(arrays: dict[str, np.ndarray]) -> None:
    arrays["channel_mean"][1] = np.nan


def of_other_shape(arrays: dict[str, np.ndarray]) -> None:
    arrays["covariance"] = np.zeros((2, 2))


def upside_down(arrays: dict[str, np.ndarray]) -> None:
    arrays["eigenvalues"] = arrays["eigenvalues"][::-1]


def of_another_mean(arrays: dict[str, np.ndarray]) -> None:
    arrays["channel_mean"] += 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_finite, "channel_mean holds numbers that are not finite"),
        (of_other_shape, "covariance is float64 [2, 2], not floats [3, 3]"),
        (upside_down, "out of order"),
        (of_another_mean, "channel_mean is not that of mean_picture"),
        (lambda arrays: arrays.pop("eigenvectors"), "holds no statistics"),
    ],
)
def test_statistics_that_cannot_be_are_found_whatever_their_hash(data, change, words):
    with np.load(data / "stats.npz") as file:
        arrays = dict(file)
    change(arrays)
    np.savez(data / "stats.npz", **arrays)
    reseal(data)
    (found,) = verify(data)
    assert found["file"] == "stats.npz"
    assert words in found["reason"]


def test_lists_that_do_not_add_up_are_found(data):
    edit_manifest(data, lambda table: table.update(rejected=2, rejects_sha256=None))
    row = json.dumps({"name": "a.jpg", "reason": "torn"}) + "\n"
    for text, words in (
        (row, "has 1 rows, the manifest says rejected: 2"),
        (row + "{}\n", "line 2 is not a row"),
        (row + row[:9], "line 2 is not a row"),
        (None, "missing"),
    ):
        (data / "rejects.jsonl").unlink(missing_ok=True)
        if text is not None:
            (data / "rejects.jsonl").write_text(text)
        (found,) = verify(data)
        assert found["file"] == "rejects.jsonl"
        assert words in found["reason"]
    (data / "rejects.jsonl").write_text(row * 2)
    assert verify(data) == []
    edit_manifest(data, lambda table: table.update(duplicates=5, duplicates_sha256=None))
    (found,) = verify(data)
    assert found["file"] == "duplicates.jsonl"


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("name", "../train-000000.tar", "leaves the folder"),
        ("name", "/etc/passwd", "leaves the folder"),
        ("name", "a/train-000000.tar", "leaves the folder"),
        ("name", ".train-000000.tar", "leaves the folder"),
        ("name", 7, "leaves the folder"),
        ("name", "stats.npz", "no .tar"),
        ("name", "train-000001.tar", "names a shard twice"),
        ("samples", -1, "-1 samples"),
        ("samples", "10", "'10' samples"),
        ("bytes", 1.5, "1.5 bytes"),
        ("sha256", "00", "no sha256"),
    ],
)
def test_a_manifest_that_names_what_it_should_not_is_damaged(data, field, value, words):
    edit_manifest(data, lambda table: table["splits"]["train"]["shards"][0].update({field: value}))
    found = verify(data)
    assert found[0]["file"] == "manifest.json"
    assert any(words in one["reason"] for one in found)


def test_counts_of_a_manifest_that_are_not_those_of_the_shards_are_found(data):
    def more(table: dict) -> None:
        table["splits"]["train"]["shards"][0]["samples"] += 1

    def fewer(table: dict) -> None:
        table["splits"]["train"]["shards"][1]["samples"] -= 1

    edit_manifest(data, more)
    (found,) = verify(data)
    assert found == {
        "file": "train.index.npy",
        "reason": "it is no index of the 49 samples that the manifest counts",
    }
    edit_manifest(data, fewer)
    found = verify(data)
    assert [one.get("sample") for one in found if one["file"] == "train-000000.tar"] == [10]
    assert "the index has it in shard 1" in found[0]["reason"]
    assert {one["file"] for one in found} == {"train-000000.tar", SHARD}


def test_a_manifest_that_is_none_is_refused(tmp_path):
    for text in (
        "",
        "[]",
        '{"version": 99}',
        '{"version": 1, "splits": {}}',
        '{"version": 1, "splits": {}, "encoding": "webp"}',
    ):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
            Manifest.load(tmp_path)
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        Manifest.load(tmp_path / "..")
