"""Every damage that a data set can have is found and named; a sound one has none."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pipeline.batches import Stream
from pipeline.dataset.index import save_index
from pipeline.dataset.manifest import Manifest
from pipeline.describe.__main__ import main as describe
from pipeline.tools.errors import DataError, SetupError
from pipeline.tools.files import HashedFile, sha256
from pipeline.verify import check, verify
from tests.helpers.images import flip_bit, jpeg, packed, rows_of
from tests.helpers.processes import call_command
from tests.helpers.resealed_data import SHARD, overwrite, reseal


def test_a_card_is_part_of_the_set_and_a_page_of_another_hand_is_not(tiny_data, tmp_path):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    assert describe([str(data), "--card", "--json", "--out", str(tmp_path / "page.html")]) == 0
    assert check(data, workers=1).notes == []
    (data / "README.md").write_text("mine")
    assert check(data, workers=1).notes == ["README.md", "croissant.json"]


def test_a_sound_set_has_no_damage(tiny_data):
    assert verify(tiny_data, decode=True) == []
    report = check(tiny_data, workers=2)
    assert (report.damage, report.notes, report.images) == ([], [], 68)
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
            "reason": "CRC-32 of the image differs",
        },
        {"file": "train-000003.tar", "reason": "missing"},
    ]
    command = [sys.executable, "-m", "pipeline.verify", str(data), "--json"]
    done = call_command(command)
    facts = json.loads(done.stdout)
    assert done.returncode == 4
    assert facts["damage"] == found
    assert facts["sound"] is False
    assert facts["seconds"] > 0
    lines = done.stderr.splitlines()
    assert lines[0] == f"{SHARD} sample 17 key 000001_00007: CRC-32 of the image differs"
    assert re.search(r"checked in \d+\.\d s \([\d.,]+ [kMG]B/s, [\d,]+ images/s\)$", lines[-2])
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


@pytest.mark.parametrize("name", ["stats.npz", "train.index.npy", "train-000000.tar"])
def test_a_file_that_may_not_be_read_is_not_called_damaged(data, name, monkeypatch):
    """A new build would not help."""

    def open_forbidden(path: Path) -> HashedFile:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return HashedFile(path)

    def hash_forbidden(path: Path) -> str:
        with open_forbidden(path):
            return sha256(path)

    monkeypatch.setattr("pipeline.dataset.check.HashedFile", open_forbidden)
    for module in ("check", "index", "image_stats"):
        monkeypatch.setattr(f"pipeline.dataset.{module}.sha256", hash_forbidden)
    wanted = rf"{name} cannot be read \(Permission denied\); mend its permissions"
    with pytest.raises(SetupError, match=wanted):
        check(data, workers=1)
    if not name.endswith(".tar"):
        with pytest.raises(SetupError, match=wanted):
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


def test_every_flipped_bit_of_the_manifest_is_found(data):
    random = np.random.default_rng(5)
    path, sound = data / "manifest.json", Manifest.load(data)
    text = path.read_bytes()
    for place in random.choice(len(text), 300, replace=False).tolist():
        for bit in range(8):
            overwrite(path, place, bytes([text[place] ^ 1 << bit]))
            with suppress(DataError):  # else it is another blank between words
                assert Manifest.load(data) == sound, (place, bit)
        overwrite(path, place, text[place : place + 1])
    overwrite(path, 0, b"[")
    (found,) = verify(data)
    assert found["file"] == "manifest.json"


def test_decode_names_what_hashes_cannot_tell(tiny_data, tmp_path):
    """Images that were broken before they were sealed: every hash and CRC is right."""
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


def test_a_raw_set_is_checked_to_its_headers(image_folder, tmp_path):
    data = tmp_path / "raw"
    packed(data, train=image_folder / "val", encoding="raw", samples_per_shard=10)
    assert verify(data, decode=True) == []
    rows = rows_of(data, "train")
    overwrite(data / SHARD, int(rows[12]["offset"]) - 100, b"!")
    overwrite(data / SHARD, int(rows[13]["offset"]) + 99, b"12")
    reseal(data)
    found = verify(data)
    assert [(one["sample"], one["reason"]) for one in found] == [
        (12, "the header of its .npy is damaged"),
        (13, "CRC-32 of the image differs"),
    ]


def test_processes_find_what_one_finds(data):
    flip_bit(data, "train", 3, 17, 44)
    flip_bit(data, "val", 11)
    (data / "train-000002.tar").write_bytes(b"")
    alone, many = check(data, workers=1), check(data, workers=2)
    assert alone == many
    assert [one.get("sample") for one in alone.damage if "sample" in one][:2] == [3, 17]


def test_the_terminal_gets_some_lines_and_the_json_all(data, monkeypatch):
    rows = np.array(rows_of(data, "train"))
    rows["crc"] ^= 1
    save_index(data, "train", rows)
    reseal(data)
    (data / "old.partial").write_text("left")
    monkeypatch.setattr("pipeline.verify.LISTED", 5)
    done = call_command([sys.executable, "-m", "pipeline.verify", data, "--json"])
    assert done.returncode == 4
    lines = done.stderr.splitlines()
    assert lines[5] == "... and 43 more; --json lists them all"
    assert lines[6] == "no part of the set: old.partial"
    facts = json.loads(done.stdout)
    assert len(facts["damage"]) == 48
    assert facts["notes"] == ["old.partial"]
