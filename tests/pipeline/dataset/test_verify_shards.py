"""Tars, indexes and `.idx` that are not of each other are found, whatever their hashes."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset.index import save_index
from pipeline.tools import files
from pipeline.verify import verify
from tests.helpers.images import rows_of
from tests.helpers.resealed_data import SHARD, overwrite, reseal


def edit_rows(data: Path, change: Callable[[np.ndarray], None]) -> None:
    """Change the index of the training split, and its hash with it."""
    rows = np.array(rows_of(data, "train"))
    change(rows)
    save_index(data, "train", rows)
    reseal(data)


def edit_tar(data: Path, change: Callable[[list[tuple[str, bytes]]], None]) -> None:
    """Write a shard anew from other members, with every hash, but index and `.idx` as before."""
    with tarfile.open(data / SHARD) as tar:
        files = [(name, tar.extractfile(name).read()) for name in tar.getnames()]
    change(files)
    with tarfile.open(data / SHARD, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    reseal(data)


def set_field(field: str, value: int) -> Callable[[np.ndarray], None]:
    def change(rows: np.ndarray) -> None:
        rows[field][12] = value

    return change


def shifted(rows: np.ndarray) -> None:
    rows["offset"][12] += 1


def swapped(rows: np.ndarray) -> None:
    rows[[12, 13]] = rows[[13, 12]]


@pytest.mark.parametrize(
    ("change", "words", "samples"),
    [
        (shifted, "where none begins", [12]),
        (set_field("offset", 1024), "where none begins", [12]),
        (set_field("offset", 1 << 60), "the shard ends before it does", [12]),
        (set_field("offset", (1 << 64) - 1), "the shard ends before it does", [12]),
        (set_field("size", (1 << 32) - 1), "the shard ends before it does", [12]),
        (set_field("size", 0), "its image has 0 bytes", [12]),
        (set_field("size", 900), "CRC-32 of the image differs", [12]),
        (set_field("size", 1 << 30), "the shard ends before it does", [12]),
        (set_field("crc", 7), "CRC-32 of the image differs", [12]),
        (set_field("label", 4), "label 4 is outside the classes", [12]),
        (set_field("label", -1), "label -1 is outside the classes", [12]),
        (set_field("shard", 0), "the index has it in shard 0", [12]),
        (swapped, "its key in the tar is 000001_0000", [12, 13]),
    ],
)
def test_an_index_that_is_not_of_the_tars_is_found_whatever_its_hash(data, change, words, samples):
    edit_rows(data, change)
    found = verify(data)
    hit = [one for one in found if "sample" in one]
    assert [one["sample"] for one in hit] == samples
    assert [one["key"] for one in hit] == [f"000001_{sample - 10:05d}" for sample in samples]
    assert all(words in one["reason"] for one in hit)
    assert {one["file"] for one in found} == {SHARD}


def test_a_row_of_half_an_image_is_found_whatever_the_hash(data):
    with tarfile.open(data / SHARD) as tar:
        half = tar.extractfile("000001_00002.jpg").read()[:700]

    def halved(rows: np.ndarray) -> None:
        rows["size"][12], rows["crc"][12] = 700, zlib.crc32(half)

    edit_rows(data, halved)
    (found,) = verify(data)
    assert found["sample"] == 12
    assert "bytes in the tar and 700 in the index" in found["reason"]


@pytest.mark.parametrize("name", ["train.index.npy", "stats.npz"])
def test_headers_that_are_none_are_found_whatever_the_hash(data, name):
    """NumPy's reader fails in many ways."""
    content = (data / name).read_bytes()
    start = content.index(b"{'descr'")
    for place, text in ((start + 7, b"\xff" * 8), (start, b"[" * 60), (start + 9, bytes(9))):
        overwrite(data / name, place, text)
        reseal(data)
        assert [one["file"] for one in verify(data)] == [name]
        (data / name).write_bytes(content)


def test_swapped_labels_are_found_whatever_the_hashes(data):
    rows = rows_of(data, "train")
    other = next(n for n in range(13, 20) if rows[n]["label"] != rows[12]["label"])
    with tarfile.open(data / SHARD) as tar:
        places = [tar.getmember(f"000001_{n - 10:05d}.cls").offset_data for n in (12, other)]
    for place, sample in zip(places, (other, 12), strict=True):
        overwrite(data / SHARD, place, str(rows[sample]["label"]).encode())
    reseal(data)
    found = verify(data)
    assert [one["sample"] for one in found] == [12, other]
    assert [one["reason"] for one in found] == [
        f"its label is {rows[a]['label']} in the tar and {rows[b]['label']} in the index"
        for a, b in ((other, 12), (12, other))
    ]


def drop(name: str) -> Callable[[list], None]:
    def change(files: list[tuple[str, bytes]]) -> None:
        files[:] = [one for one in files if one[0] != name]

    return change


def add(name: str) -> Callable[[list], None]:
    return lambda files: files.append((name, b"0"))


def rename(old: str, new: str) -> Callable[[list], None]:
    def change(files: list[tuple[str, bytes]]) -> None:
        files[:] = [(name.replace(old, new), content) for name, content in files]

    return change


def relabel(content: bytes) -> Callable[[list], None]:
    def change(files: list[tuple[str, bytes]]) -> None:
        files[4] = (files[4][0], content)

    return change


@pytest.mark.parametrize(
    ("change", "words", "sample"),
    [
        (drop("000001_00002.jpg"), "where none begins", 12),
        (drop("000001_00009.cls"), "where none begins", 19),
        (add("000001_00010.jpg"), "it is in the tar and not in the index", None),
        (add("000001_00009.txt"), "its members are 000001_00009.cls", 19),
        (add("README"), "it holds 'README', which is no file of a sample", None),
        (add(".hidden.jpg"), "it holds '.hidden.jpg', which is no file", None),
        (rename("000001_00002", "000001_00012"), "its key in the tar is 000001_00012", 12),
        (rename("00002.cls", "00002.txt"), "not .cls and .jpg", 12),
        (relabel(b"x"), "label 'x' is no class of this set", 12),
        (relabel(b"4"), "label 4 is outside the classes", 12),
        (relabel(b" "), "its .cls of 1 bytes holds no label", 12),
    ],
)
def test_a_tar_that_is_not_of_the_index_is_found_whatever_its_hash(data, change, words, sample):
    edit_tar(data, change)
    found = verify(data)
    assert {one["file"] for one in found} == {SHARD}
    assert any(words in one["reason"] and one.get("sample") == sample for one in found)


def test_an_idx_that_is_not_of_the_tar_is_found_whatever_its_hash(data):
    path = (data / SHARD).with_suffix(".idx")
    lines = path.read_text().splitlines()
    for text, words in (
        ("\n".join([*lines[:3], lines[4], *lines[4:]]), "line 4"),
        ("\n".join(lines[:-1]), "number of lines"),
        ("\n".join([lines[0].replace("10", "11"), *lines[1:]]), "line 1"),
        ("", "number of lines"),
    ):
        path.write_text(text)
        reseal(data)
        (found,) = verify(data)
        assert found["file"] == path.name
        assert words in found["reason"]


@pytest.mark.parametrize("held", [True, False])
def test_a_shard_that_was_cut_or_goes_on_names_what_is_lost(data, held, monkeypatch):
    if not held:
        monkeypatch.setattr(files, "HELD", 0)  # as for shards that are too large for memory
        assert verify(data) == []
    path, rows = data / SHARD, rows_of(data, "train")
    content = path.read_bytes()
    path.write_bytes(content[: int(rows[15]["offset"]) + 10])
    found = verify(data)
    assert [one["sample"] for one in found] == [15, 16, 17, 18, 19]
    assert {one["reason"] for one in found} == {"the shard ends before it does"}
    path.write_bytes(content + bytes(512))
    (found,) = verify(data)
    assert found["file"] == SHARD
    assert "bytes, the manifest says" in found["reason"]
    header = int(rows[15]["offset"]) - 512
    path.write_bytes(content[:header] + bytes([content[header] ^ 1]) + content[header + 1 :])
    (found,) = verify(data)
    assert (found["sample"], found["key"]) == (15, "000001_00005")
    assert f"no valid header at byte {header:,}" in found["reason"]
