"""Every damage that a data set can have is found and named; a sound one has none."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import whole_file
from pipeline.batches import Stream
from pipeline.errors import DataError, DuetError, UsageError
from pipeline.index import save_index
from pipeline.manifest import Manifest
from pipeline.verification.whole import check
from pipeline.verify import verify
from tests.drawn import flip_bit, jpeg, packed, rows_of

SHARD = "train-000001.tar"
"""Holds samples 10 to 19 of `tiny_data`."""

UNCHECKED = {"seed", "sources", "plan", "classes", "titles", "libraries", "quality", "chroma"}
"""Fields of a manifest that nothing else in the folder repeats."""


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_data` to do damage to."""
    return Path(shutil.copytree(tiny_data, tmp_path / "d"))


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def reseal(data: Path) -> None:
    """Write a manifest whose hashes and sizes are those of the files as they are now."""
    manifest = Manifest.load(data)
    splits = {}
    for name, split in manifest.splits.items():
        shards = tuple(
            replace(
                shard,
                bytes=(data / shard.name).stat().st_size,
                sha256=sha(data / shard.name),
                idx_sha256=sha((data / shard.name).with_suffix(".idx")),
            )
            for shard in split.shards
        )
        splits[name] = replace(split, shards=shards, index_sha256=sha(data / f"{name}.index.npy"))
    replace(manifest, splits=splits, stats_sha256=sha(data / "stats.npz")).save(data)


def edit_manifest(data: Path, change: Callable[[dict], None]) -> None:
    table = json.loads((data / "manifest.json").read_text())
    change(table)
    (data / "manifest.json").write_text(json.dumps(table))


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


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_a_sound_set_has_no_damage(tiny_data):
    assert verify(tiny_data, decode=True) == []
    report = check(tiny_data, workers=2)
    assert (report.damage, report.notes, report.pictures) == ([], [], 68)
    assert report.bytes == sum(path.stat().st_size for path in tiny_data.glob("*.tar"))


def test_verify_names_shard_sample_and_key(data):
    flip_bit(data, "train", 17)
    (data / "train-000003.tar").unlink()
    found = verify(data)
    assert found == [
        {
            "file": SHARD,
            "sample": 17,
            "key": "000001_00007",
            "reason": "CRC-32 of the picture differs",
        },
        {"file": "train-000003.tar", "reason": "missing"},
    ]
    command = [sys.executable, "-m", "pipeline.verify", str(data), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    facts = json.loads(done.stdout)
    assert done.returncode == 4
    assert facts["damage"] == found
    assert facts["sound"] is False
    assert facts["seconds"] > 0
    lines = done.stderr.splitlines()
    assert lines[0] == f"{SHARD} sample 17 key 000001_00007: CRC-32 of the picture differs"
    assert "GB/s" in lines[-2]
    assert "pictures/s" in lines[-2]
    assert lines[-1].startswith(f"error: {data} is damaged in 2 places; ")


@pytest.mark.parametrize("name", ["stats.npz", "train.index.npy", "train-000000.idx"])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
def test_damage_to_the_small_files_is_found(data, name, harm):
    content = (data / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    broken = {"flip": flipped, "cut": content[:middle], "empty": b""}
    if harm == "gone":
        (data / name).unlink()
    else:
        (data / name).write_bytes(broken[harm])
    assert [one["file"] for one in verify(data)] == [name]
    if harm != "flip" and not name.endswith(".idx"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            Stream(data)


def test_every_flipped_bit_is_found_and_its_file_named(data):
    """Seeded places in all files, among them all kinds of blocks of the tars."""
    random = np.random.default_rng(4)
    names = [path.name for path in sorted(data.iterdir()) if path.stat().st_size]
    names.remove("manifest.json")
    places = [(name, int(random.integers((data / name).stat().st_size))) for name in names * 5]
    places += [(SHARD, int(place)) for place in random.integers(0, 4 * 512, 10)]
    places += [(SHARD, (data / SHARD).stat().st_size - 1 - int(n)) for n in (0, 600, 5000)]
    for name, place in places:
        before = (data / name).read_bytes()[place]
        overwrite(data / name, place, bytes([before ^ (1 << int(random.integers(8)))]))
        assert {one["file"] for one in verify(data)} == {name}, place
        overwrite(data / name, place, bytes([before]))
    assert verify(data) == []


def test_a_flipped_bit_of_the_manifest_is_found_where_anything_depends_on_it(data):
    random = np.random.default_rng(5)
    text = (data / "manifest.json").read_bytes()
    sound = json.loads(text)
    found = 0
    for place in random.choice(len(text), 80, replace=False).tolist():
        overwrite(data / "manifest.json", place, bytes([text[place] ^ 1]))
        try:
            damage = verify(data)
        except DuetError:
            damage = [{}]
        overwrite(data / "manifest.json", place, text[place : place + 1])
        if not damage:
            flipped = text[:place] + bytes([text[place] ^ 1]) + text[place + 1 :]
            table = json.loads(flipped)
            differ = {name for name in sound if sound[name] != table.get(name)}
            assert differ <= UNCHECKED, (place, differ)
        found += bool(damage)
    assert found > 60


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
        (set_field("offset", 1 << 60), "where none begins", [12]),
        (set_field("size", 900), "CRC-32 of the picture differs", [12]),
        (set_field("size", 1 << 30), "the shard ends before it does", [12]),
        (set_field("crc", 7), "CRC-32 of the picture differs", [12]),
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


def test_a_row_of_half_a_picture_is_found_whatever_the_hash(data):
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
        monkeypatch.setattr(whole_file, "HELD", 0)  # as for shards that are too large for memory
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


def test_decode_names_what_hashes_cannot_tell(tiny_data, tmp_path):
    """Pictures that were broken before they were sealed: every hash and CRC is right."""
    data = Path(shutil.copytree(tiny_data, tmp_path / "d"))
    rows = np.array(rows_of(data, "train"))
    cut = (data / SHARD).read_bytes()[rows[13]["offset"] :][: rows[13]["size"]][:-400]
    for sample, content in ((12, jpeg(1, 200, 256)), (13, cut), (14, b"GIF89a" + bytes(99))):
        size = int(rows[sample]["size"])
        assert len(content) <= size
        overwrite(data / SHARD, int(rows[sample]["offset"]), content.ljust(size, b"\0"))
    whole = (data / SHARD).read_bytes()
    for row in rows[12:15]:
        row["crc"] = zlib.crc32(whole[row["offset"] : row["offset"] + row["size"]])
    save_index(data, "train", rows)
    reseal(data)
    assert verify(data) == []
    found = verify(data, decode=True)
    assert [(one["file"], one["sample"]) for one in found] == [(SHARD, n) for n in (12, 13, 14)]
    assert "it is 200x256, not 256x256" in found[0]["reason"]
    assert "it cannot be decoded" in found[1]["reason"]
    assert "it is no JPEG" in found[2]["reason"]


def test_a_raw_set_is_checked_to_its_headers(pictures, tmp_path):
    data = tmp_path / "raw"
    packed(data, train=pictures / "val", encoding="raw", samples_per_shard=10)
    assert verify(data, decode=True) == []
    rows = rows_of(data, "train")
    overwrite(data / SHARD, int(rows[12]["offset"]) - 100, b"!")
    overwrite(data / SHARD, int(rows[13]["offset"]) + 99, b"12")
    reseal(data)
    found = verify(data)
    assert [(one["sample"], one["reason"]) for one in found] == [
        (12, "the header of its .npy is damaged"),
        (13, "CRC-32 of the picture differs"),
    ]


def test_processes_find_what_one_finds(data):
    flip_bit(data, "train", 3, 17, 44)
    flip_bit(data, "val", 11)
    (data / "train-000002.tar").write_bytes(b"")
    alone, many = check(data, workers=1), check(data, workers=2)
    assert alone == many
    assert [one.get("sample") for one in alone.damage if "sample" in one][:2] == [3, 17]


def test_the_terminal_gets_some_lines_and_the_json_all(data):
    rows = np.array(rows_of(data, "train"))
    rows["crc"] ^= 1
    save_index(data, "train", rows)
    reseal(data)
    (data / "old.partial").write_text("left")
    program = "import pipeline.verify as v; from pipeline.errors import run; v.LISTED = 5; "
    command = [sys.executable, "-c", f"{program} run(v.main)", str(data), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    lines = done.stderr.splitlines()
    assert lines[5] == "... and 43 more; --json lists them all"
    assert lines[6] == "no part of the set: old.partial"
    facts = json.loads(done.stdout)
    assert len(facts["damage"]) == 48
    assert facts["notes"] == ["old.partial"]


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
