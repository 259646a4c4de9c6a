from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.batches import Stream
from pipeline.build_shards import build
from pipeline.errors import DataError, UsageError
from pipeline.files import MARKER, claimed
from pipeline.manifest import Manifest
from pipeline.pixel_stats import Statistics
from pipeline.plan import Build, fingerprint
from pipeline.sources import Picture
from pipeline.verify import verify
from tests.drawn import CLASSES, folder_per_class, jpeg, rows_of


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.build_shards", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_manifest_tells_what_is_there(tiny_data):
    manifest = Manifest.load(tiny_data)
    assert manifest.classes == CLASSES
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 48,
        "val": 20,
    }
    assert [shard.samples for shard in manifest.splits["train"].shards] == [10, 10, 10, 10, 8]
    assert manifest.rejected == 0
    assert verify(tiny_data) == []


def test_webdataset_reads_the_shards(tiny_data):
    """The format's own library finds the samples, in the order and with the labels of our index."""
    manifest = Manifest.load(tiny_data)
    rows = rows_of(tiny_data, "train")
    shards = [str(tiny_data / shard.name) for shard in manifest.splits["train"].shards]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [int(sample["cls"]) for sample in samples] == rows["label"].tolist()
    for sample in samples:
        assert Image.open(io.BytesIO(sample["jpg"])).size == (256, 256)
    assert len({sample["__key__"] for sample in samples}) == 48


def test_the_idx_files_are_dalis(tiny_data, tmp_path):
    import wds2idx  # a module of the DALI wheel

    for shard in sorted(tiny_data.glob("*.tar")):
        theirs = tmp_path / "theirs.idx"
        with wds2idx.IndexCreator(str(shard), str(theirs), verbose=False) as creator:
            creator.create_index()
        assert shard.with_suffix(".idx").read_text().split() == theirs.read_text().split()


def test_the_stored_pictures_are_the_sources_in_shuffled_order(pictures, tiny_data):
    from pipeline.picture import encode, square

    rows = rows_of(tiny_data, "train")
    files = sorted((pictures / "train").glob("*/*.jpg"))
    expected = {encode(square(file.read_bytes()), 90): file.parent.name for file in files}
    tars = sorted(tiny_data.glob("train-*.tar"))
    stored = []
    for row in rows:
        with tars[row["shard"]].open("rb") as tar:
            tar.seek(row["offset"])
            stored.append(tar.read(row["size"]))
    assert [expected[data] for data in stored] == [CLASSES[label] for label in rows["label"]]
    assert len(set(stored)) == 48
    assert rows["label"].tolist() != sorted(rows["label"])


def test_statistics_are_those_of_the_pixels(pictures, tiny_data):
    from pipeline.picture import square

    values = np.stack(
        [square(file.read_bytes()) for file in sorted((pictures / "train").glob("*/*.jpg"))]
    ).astype(np.float64)
    stats = Statistics.load(tiny_data)
    flat = values.reshape(-1, 3)
    np.testing.assert_allclose(stats.mean_picture, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.channel_mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(flat.T, bias=True), rtol=1e-9)
    rebuilt = stats.eigenvectors @ np.diag(stats.eigenvalues) @ stats.eigenvectors.T
    np.testing.assert_allclose(rebuilt, stats.covariance, rtol=1e-9)
    assert (np.diff(stats.eigenvalues) <= 0).all()


def test_the_same_bytes_whatever_the_number_of_workers(pictures, tiny_data, tmp_path):
    again = Build(
        out=tmp_path / "data",
        train=pictures / "train",
        val=pictures / "val",
        samples_per_shard=10,
        workers=2,
    )
    build(again)
    assert everything(again.out) == everything(tiny_data)


def test_a_finished_set_is_left_alone_and_another_plan_refused(pictures, tmp_path):
    first = Build(out=tmp_path / "data", train=pictures / "val", workers=1)
    build(first)
    before = {path: path.stat().st_mtime_ns for path in first.out.iterdir()}
    build(first)
    assert before == {path: path.stat().st_mtime_ns for path in first.out.iterdir()}
    with pytest.raises(UsageError, match="finished data set of other pictures"):
        build(Build(out=first.out, train=pictures / "val", seed=1, workers=1))
    with pytest.raises(UsageError, match="finished data set of other pictures"):
        build(Build(out=first.out, train=pictures / "val", encoding="raw", workers=1))


def test_sets_from_before_there_were_encodings_hold_jpegs(pictures, tmp_path):
    options = Build(out=tmp_path / "data", train=pictures / "val", workers=1)
    path = options.out / "manifest.json"
    made = build(options)
    table = json.loads(path.read_text())
    assert table.pop("encoding") == "jpeg"
    path.write_text(json.dumps(table))
    assert build(options) == Manifest.load(options.out) == made


def test_the_plan_of_a_jpeg_set_is_what_it_was():
    """A hash from the release before there were encodings: its sets are still finished sets."""
    picture = Picture("/p/a.tar", 512, 99, 1, "a")
    options = Build(out=Path("o"), train=Path("t"))
    found = fingerprint(options, {"train": [picture]}, ("x", "y"))
    assert found == "0811ba230d7f9a2e037c7342f24c9ea3f10819767636253325a95da8519af2c9"
    raw = Build(out=Path("o"), train=Path("t"), encoding="raw")
    assert fingerprint(raw, {"train": [picture]}, ("x", "y")) != found


def test_leftovers_of_a_killed_build_go_and_strangers_stay(pictures, tmp_path):
    out, home = tmp_path / "data", tmp_path / "home"
    with pytest.raises(InterruptedError), killed_while_packing():
        build(Build(out=out, train=pictures / "val", workers=1))
    (out / "train-000077.tar").write_bytes(b"half")
    (out / "train-000078.tar.123.partial").write_bytes(b"half")
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        Manifest.load(out)
    build(Build(out=out, train=pictures / "val", workers=1))
    assert verify(out) == []
    assert not list(out.glob("train-00007*"))
    assert not (out / MARKER).exists()
    home.mkdir()
    (home / "train-000000.tar").write_text("somebody else's shard")
    with pytest.raises(UsageError, match=r"holds train-000000\.tar"):
        build(Build(out=home, train=pictures / "val", workers=1))
    assert (home / "train-000000.tar").read_text() == "somebody else's shard"


@contextmanager
def killed_while_packing() -> Iterator[None]:
    """Stop a build where a kill would: shards written, nothing sealed, nothing tidied up."""
    with pytest.MonkeyPatch.context() as patch:

        def killed(*_: object) -> None:
            raise InterruptedError

        patch.setattr("pipeline.build_shards._seal", killed)
        yield


def test_two_builds_do_not_share_a_folder(pictures, tmp_path):
    out = tmp_path / "data"
    out.mkdir()
    with claimed(out), pytest.raises(UsageError, match="in use by another process"):
        build(Build(out=out, train=pictures / "val", workers=1))


def test_holdout_takes_its_share_of_every_class(pictures, tmp_path):
    options = Build(out=tmp_path / "d", train=pictures / "train", holdout=0.25, workers=1)
    manifest = build(options)
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 36,
        "val": 12,
    }
    rows = rows_of(options.out, "val")
    assert np.bincount(rows["label"]).tolist() == [3, 3, 3, 3]


def test_unreadable_pictures_are_left_out_counted_and_listed(tmp_path):
    source = folder_per_class(tmp_path / "s", 3)
    (source / "cat/bad.jpg").write_bytes(b"no picture at all")
    (source / "cat/cut.jpg").write_bytes(jpeg(3)[:-300])
    (source / "dog/notes.txt").write_text("hello")
    (source / "dog/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    done = run(tmp_path / "d", "--train", source, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["samples"] == {"train": 12}
    assert facts["rejected"] == 4
    listed = [json.loads(line) for line in (tmp_path / "d/rejects.jsonl").read_text().splitlines()]
    assert {Path(row["name"]).name for row in listed} == {
        "bad.jpg",
        "cut.jpg",
        "gone.jpg",
        "notes.txt",
    }
    assert all(row["reason"] for row in listed)
    assert "4 left out" in done.stderr


def test_a_class_of_unreadable_pictures_is_refused(tmp_path):
    source = folder_per_class(tmp_path / "s", 2)
    for path in (source / "cat").iterdir():
        path.write_bytes(b"not a picture")
    with pytest.raises(UsageError, match="no picture of class 'cat' could be read"):
        build(Build(out=tmp_path / "d", train=source, workers=1))
    assert not (tmp_path / "d/manifest.json").exists()


def test_the_command_ends_with_one_line_and_the_right_code(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    train = pictures / "train"
    for arguments, words in (
        ([tmp_path / "d", "--train", tmp_path / "empty"], "is empty"),
        ([tmp_path / "file", "--train", train], "cannot be written"),
        ([tmp_path / "d", "--train", train, "--quality", "0"], "--quality 0 is out of range"),
        ([tmp_path / "d", "--train", train, "--val", train, "--holdout", "0.5"], "exclude"),
        (
            [tmp_path / "d", "--train", train, "--encoding", "raw", "--quality", "80"],
            "--quality 80 says nothing about --encoding raw",
        ),
    ):
        done = run(*arguments)
        assert done.returncode == 2, done
        assert done.stderr.startswith("error: "), done.stderr
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_verify_names_shard_and_sample(pictures, tmp_path):
    options = Build(out=tmp_path / "d", train=pictures / "val", samples_per_shard=5, workers=1)
    build(options)
    row = rows_of(options.out, "train")[7]
    shard = options.out / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[int(row["offset"]) + int(row["size"]) // 2] ^= 4
    shard.write_bytes(data)
    (options.out / "train-000003.tar").unlink()
    found = verify(options.out)
    assert [(one["file"], one.get("sample")) for one in found] == [
        ("train-000001.tar", 7),
        ("train-000003.tar", None),
    ]
    command = [sys.executable, "-m", "pipeline.verify", str(options.out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert json.loads(done.stdout)["damage"] == found
    assert "train-000001.tar sample 7: CRC-32" in done.stderr


@pytest.mark.parametrize("name", ["stats.npz", "train.index.npy", "train-000000.idx"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_to_the_small_files_is_found(tiny_data, tmp_path, name, damage):
    data = tmp_path / "d"
    shutil.copytree(tiny_data, data)
    content = (data / name).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    broken = {"flip": flipped, "cut": content[:middle], "empty": b""}
    if damage == "gone":
        (data / name).unlink()
    else:
        (data / name).write_bytes(broken[damage])
    assert [one["file"] for one in verify(data)] == [name]
    if damage != "flip" and not name.endswith(".idx"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            Stream(data)


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
