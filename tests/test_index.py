"""Shards that other tools made train as they lie: `python -m pipeline.index`."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import wds2idx  # a module of the DALI wheel
import webdataset
from PIL import Image

from pipeline.batches import Stream
from pipeline.errors import DuetError, UsageError
from pipeline.index import key_in_idx
from pipeline.index.__main__ import main
from pipeline.indexing.foreign import Outcome, Request, index_folder
from pipeline.indexing.idx import read_idx
from pipeline.manifest import Manifest
from pipeline.native import NativeReader
from pipeline.pixel_stats import Statistics
from pipeline.verify import verify
from tests.drawn import jpeg, pixels, rows_of
from tests.servers import Server

KINDS = [{}, {"subsampling": 0}, {"mode": "L"}, {"progressive": True}, {"quality": 60}]
"""JPEGs that people have: 4:2:0, 4:4:4, grey, progressive, small."""


def picture(seed: int) -> bytes:
    return jpeg(seed, 256, 256, **KINDS[seed % len(KINDS)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards by webdataset.ShardWriter: 20 training pictures in 3, 6 for validation in 1."""
    folder = tmp_path_factory.mktemp("foreign")
    for split, count, first in (("train", 20, 0), ("validation", 6, 100)):
        pattern = str(folder / f"in1k-{split}-%02d.tar")
        with webdataset.ShardWriter(pattern, maxcount=8, verbose=0) as writer:
            for n in range(count):
                key = f"{split}/n{n:05d}"
                writer.write({"__key__": key, "jpg": picture(first + n), "cls": n % 4})
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "d"))


def index(folder: Path, **settings) -> Outcome:
    return index_folder(Request(folder=folder, **settings))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.index", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_tar(path: Path, files: list[tuple[str, bytes]], **options) -> None:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def files_of(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_stream_gives_the_pictures_that_pillow_decodes(made, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    manifest = index(folder).manifest
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 20,
        "val": 6,
    }
    assert [shard.name for shard in manifest.splits["train"].shards] == [
        f"in1k-train-{n:02d}.tar" for n in range(3)
    ]
    assert manifest.classes == ("0", "1", "2", "3")
    for split, first, count in (("train", 0, 20), ("val", 100, 6)):
        expected = [decoded(picture(first + n)) for n in range(count)]
        with Stream(folder, split=split, view="whole", once=True, batch_size=count) as stream:
            batch = next(stream)
            images = batch.images.numpy().transpose(0, 2, 3, 1) + stream.channel_mean
        assert batch.weights.tolist() == [1] * count
        assert batch.labels.tolist() == [sample % 4 for sample in batch.ids.tolist()]
        for sample, image in zip(batch.ids.tolist(), images, strict=True):
            np.testing.assert_allclose(image, expected[sample], atol=1e-3)
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert verify(folder, decode=True) == []


def test_statistics_are_those_of_the_training_pictures(folder):
    index(folder, workers=2)
    values = np.stack([decoded(picture(n)) for n in range(20)]).astype(np.float64)
    stats = Statistics.load(folder)
    np.testing.assert_allclose(stats.mean_picture, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.channel_mean, values.reshape(-1, 3).mean(0), rtol=1e-12)
    covariance = np.cov(values.reshape(-1, 3).T, bias=True)
    np.testing.assert_allclose(stats.covariance, covariance, rtol=1e-9)


def test_dalis_own_reader_gives_the_same_pictures(tmp_path):
    """Each picture is of one colour: what comes out of a crop says which picture it was."""
    colours = [(20 * n, 255 - 20 * n, 10 * n) for n in range(12)]
    endings = ["jpg", "jpeg", "JPG", "JPEG"]
    shown = []
    for n in range(3):
        files = []
        for place in range(4):
            file = io.BytesIO()
            Image.new("RGB", (256, 256), colours[4 * n + place]).save(file, "JPEG", quality=100)
            shown.append(decoded(file.getvalue())[0, 0])
            key, ending = f"{n}-{place}", endings[place]
            files += [(f"{key}.{ending}", file.getvalue()), (f"{key}.json", b'{"label": %d}' % n)]
        write_tar(tmp_path / f"train.{n}.tar", files)
    index(tmp_path)
    with Stream(tmp_path, batch_size=12, colour=0) as stream:
        ours = {tuple(one) for one in _colours(next(stream).images, stream.channel_mean)}
    reader = NativeReader(tmp_path, split="train", batch_size=12, device="cpu", threads=1)
    mean = Statistics.load(tmp_path).channel_mean
    theirs = {tuple(one) for one in _colours(next(reader), mean)}
    assert ours == theirs == {tuple(one.tolist()) for one in shown}


def _colours(images, mean) -> list[list[int]]:
    flat = images.numpy().transpose(0, 2, 3, 1) + mean
    assert np.ptp(flat, axis=(1, 2)).max() < 1e-3
    return flat[:, 0, 0].round().astype(int).tolist()


def test_members_of_any_order_ending_and_name(tmp_path):
    long = "folder/" + "k" * 150
    files = [
        ("README", b"nothing"),
        (".DS_Store.jpg", b"hidden"),
        ("a.jpg", picture(0)),  # before its label
        ("a.cls", b"1\n"),
        ("b.txt", b"a caption"),  # more than is needed
        ("b.cls", b" 2 "),
        ("b.json", b'{"label": 0}'),  # .cls is believed first
        ("b.JPEG", picture(1)),
        ("c.image.jpeg", picture(2)),
        ("c.meta.json", b'{"class_id": 3, "caption": "x"}'),
        ("a.jpg", picture(3)),  # a key once more
        ("a.cls", b"0"),
        ("a.jpg", picture(4)),  # and again at once
        ("a.cls", b"3"),
        (f"{long}.jpg", picture(5)),
        (f"{long}.cls", b"2"),
        ("f/g.h/i.jpg", picture(6)),
        ("f/g.h/i.json", b'{"target": "1"}'),
        ("j.jpg", picture(7)),
        ("j.json", b'{"label": 3}'),
        ("k.jpg", picture(8)),
        ("k.json", b'{"cls": 1, "target": 7}'),
    ]
    write_tar(tmp_path / "some train.tar", files, format=tarfile.PAX_FORMAT)
    with tarfile.open(tmp_path / "some train.tar", "a") as tar:
        link = tarfile.TarInfo("l.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    outcome = index(tmp_path, train="some*.tar")
    assert outcome.bad == []
    rows = rows_of(tmp_path, "train")
    content = (tmp_path / "some train.tar").read_bytes()
    stored = [content[row["offset"] :][: row["size"]] for row in rows]
    assert stored == [picture(n) for n in range(9)]
    assert rows["label"].tolist() == [1, 2, 3, 0, 3, 2, 1, 3, 1]
    assert verify(tmp_path, decode=True) == []
    with Stream(tmp_path, batch_size=9) as stream:
        assert sorted(next(stream).ids.tolist()) == list(range(9))
    idx = tmp_path / "some train.idx"
    assert len(read_idx(idx.read_bytes())) == 9
    assert key_in_idx(idx, 5) == long
    assert key_in_idx(idx, 9) is None


def cmyk() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(1, 256, 256)).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


BAD = {
    "small": ([("jpg", jpeg(1, 128, 256)), ("cls", b"0")], "it is 128x256, not 256x256"),
    "torn": ([("jpg", jpeg(2, 256, 256)[:-300]), ("cls", b"0")], "it cannot be decoded"),
    "text": ([("jpg", b"hello"), ("cls", b"0")], "it is no JPEG"),
    "empty": ([("jpg", b""), ("cls", b"0")], "it is no JPEG"),
    "print": ([("jpg", cmyk()), ("cls", b"0")], "its colours are CMYK"),
    "png": ([("png", b"\x89PNG"), ("cls", b"0")], "its picture is a .png, no JPEG"),
    "alone": ([("jpg", picture(3))], "it has no label (.cls or .json)"),
    "blind": ([("cls", b"1")], "it has no picture"),
    "two": ([("a.jpg", picture(3)), ("b.jpg", picture(3)), ("cls", b"1")], "several pictures"),
    "odd": ([("jpg", picture(4)), ("cls", b"1.5e3x\0y")], "its .cls of 8 bytes holds no label"),
    "list": (
        [("jpg", picture(4)), ("json", b'{"label": [1]}')],
        "holds no label",
    ),
    "none": (
        [("jpg", picture(4)), ("json", b'{"caption": "dog"}')],
        "no label (in one of label",
    ),
    "broken": ([("jpg", picture(4)), ("json", b'{"label": ')], "holds no label"),
    "deep": ([("jpg", picture(4)), ("json", b"[" * 9_000)], "holds no label"),
    "id": ([("jpg", picture(4)), ("cls", b"999999999")], "is no class number"),
    "minus": ([("jpg", picture(4)), ("cls", b"-1")], "its .cls of 2 bytes holds no label"),
}


@pytest.fixture
def spoilt(folder: Path) -> Path:
    """`folder`, with one more training shard of bad samples and two good ones."""
    files = [("g0.jpg", picture(7)), ("g0.cls", b"2")]
    for key, (parts, _) in BAD.items():
        files += [(f"{key}.{ending}", content) for ending, content in parts]
    write_tar(folder / "x-train.tar", [*files, ("g1.jpg", picture(8)), ("g1.cls", b"3")])
    return folder


def test_what_cannot_be_trained_from_is_named_and_nothing_is_written(spoilt):
    before = names(spoilt)
    outcome = index(spoilt)
    assert outcome.manifest is None
    assert [(bad.shard, bad.key) for bad in outcome.bad] == [("x-train.tar", key) for key in BAD]
    for bad, (_, words) in zip(outcome.bad, BAD.values(), strict=True):
        assert words in bad.reason, bad
    assert names(spoilt) == before
    done = run(spoilt, "--json")
    assert done.returncode == 4
    facts = json.loads(done.stdout)
    assert (facts["indexed"], len(facts["bad"])) == (False, len(BAD))
    assert done.stderr.startswith("x-train.tar key small: it is 128x256, not 256x256\n")
    assert done.stderr.splitlines()[-1].startswith(f"error: {len(BAD)} samples of {spoilt} cannot")
    assert "--skip-bad" in done.stderr
    assert "build_shards OUT --train" in done.stderr
    assert names(spoilt) == before


def test_skip_bad_leaves_them_out_of_everything(spoilt):
    done = run(spoilt, "--skip-bad", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["samples"] == {"train": 22, "val": 6}
    manifest = Manifest.load(spoilt)
    assert manifest.rejected == len(BAD)
    assert manifest.splits["train"].shards[-1].samples == 2
    listed = [json.loads(line) for line in (spoilt / "rejects.jsonl").read_text().splitlines()]
    assert [row["name"] for row in listed] == [f"x-train.tar/{key}" for key in BAD]
    values = np.stack([decoded(picture(n)) for n in [*range(20), 7, 8]]).astype(np.float64)
    np.testing.assert_allclose(Statistics.load(spoilt).mean_picture, values.mean(0), rtol=1e-6)
    assert verify(spoilt, decode=True) == []
    with Stream(spoilt, batch_size=22) as stream:
        batch = next(stream)
        assert (sorted(batch.ids.tolist()), stream.damaged) == (list(range(22)), {})
    assert len(read_idx((spoilt / "x-train.idx").read_bytes())) == 2
    reader = NativeReader(spoilt, split="train", batch_size=22, device="cpu", threads=1)
    for _ in range(2):  # every sample twice: no bad one is among them
        assert next(reader).shape == (22, 3, 224, 224)


def test_the_idx_is_wds2idxs_and_one_that_is_there_is_kept(made, folder):
    theirs = {}
    for tar in sorted(made.glob("*.tar")):
        idx = (folder / tar.name).with_suffix(".idx")
        with wds2idx.IndexCreator(str(tar), str(idx), verbose=False) as creator:
            creator.create_index()
        theirs[idx.name] = idx.read_bytes()
    (folder / "in1k-train-01.idx").unlink()
    inode = (folder / "in1k-train-00.idx").stat().st_ino
    assert index(folder).bad == []
    assert {name: (folder / name).read_bytes() for name in theirs} == theirs
    assert (folder / "in1k-train-00.idx").stat().st_ino == inode


def test_an_idx_of_another_tar_is_refused(folder):
    for content, words in (
        (b"v1.2 1\njpg 512 9 a.jpg cls 1536 1 a.cls\n", "is not of in1k-train-00.tar"),
        (b"hello\n", "is no index of DALI's"),
        (b"v1.2 4\njpg 512 9 a.jpg\n", "is no index of DALI's"),
    ):
        (folder / "in1k-train-00.idx").write_bytes(content)
        outcome = index(folder, skip_bad=True)
        assert outcome.manifest is None
        (bad,) = outcome.bad
        assert (bad.shard, bad.key) == ("in1k-train-00.idx", "")
        assert words in bad.reason


def test_a_damaged_or_compressed_tar_is_named(folder):
    whole = (folder / "in1k-train-01.tar").read_bytes()
    for content, words in (
        (whole[:5000], "end"),
        (whole[:600], "end"),
        (b"\x1f\x8b" + bytes(1000), "compressed with gzip"),
        (b"", "it is empty"),
    ):
        (folder / "in1k-train-01.tar").write_bytes(content)
        (bad,) = index(folder, skip_bad=True).bad
        assert (bad.shard, bad.key) == ("in1k-train-01.tar", "")
        assert words in bad.reason
    done = run(folder)
    assert done.returncode == 4
    assert done.stderr.startswith("in1k-train-01.tar: it is empty\n")
    assert "manifest.json" not in names(folder)


def labelled(folder: Path, labels: list[bytes], split: str = "train") -> None:
    files = []
    for n, label in enumerate(labels):
        files += [(f"{n}.jpg", picture(n)), (f"{n}.cls", label)]
    write_tar(folder / f"{split}-0.tar", files)


def test_classes_come_from_a_list_or_from_the_labels(tmp_path):
    labelled(tmp_path, [b"cat", b"dog", b"cat", b"ant"])
    labelled(tmp_path, [b"dog", b"cow"], "val")
    outcome = index(tmp_path)
    assert [str(bad) for bad in outcome.bad] == [
        "val-0.tar key 1: label 'cow' is no class of this set"
    ]
    listed = tmp_path / "classes.txt"
    listed.write_text("dog\ncow\ncat\nant\n\n")
    manifest = index(tmp_path, classes=listed).manifest
    assert manifest.classes == ("dog", "cow", "cat", "ant")
    assert rows_of(tmp_path, "train")["label"].tolist() == [2, 0, 2, 3]
    assert rows_of(tmp_path, "val")["label"].tolist() == [0, 1]
    (tmp_path / "manifest.json").unlink()
    assert index(tmp_path, classes=listed).manifest == manifest  # as after a kill
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "stats.npz").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"stats\.npz is there and would be written over"):
        index(tmp_path, classes=listed)
    assert (tmp_path / "stats.npz").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("labels", "classes", "words"),
    [
        ([b"1", b"2"], None, "labels run from 1 to 2, and Duet counts from 0"),
        ([b"0", b"dog"], None, "some labels are numbers"),
        ([b"0", b"0"], None, "of one class"),
        ([b"dog", b"dog"], None, "of one class"),
        ([b"0", b"1"], "a\n", "names 1 classes"),
        ([b"0", b"1"], "a\na\n", "'a' more than once"),
        ([b"0", b"1"], '["a", 1]', "has 1, which is no name"),
        ([b"0", b"1"], "[", "cannot be read"),
    ],
)
def test_labels_and_lists_that_cannot_be_are_refused(tmp_path, labels, classes, words):
    labelled(tmp_path, labels)
    before = names(tmp_path)
    listed = None
    if classes is not None:
        listed = tmp_path.parent / "classes.txt"
        listed.write_text(classes)
    with pytest.raises(UsageError, match=words):
        index(tmp_path, classes=listed)
    assert names(tmp_path) == before


def test_the_command_ends_with_one_line_and_the_right_code(folder, tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    for arguments, words in (
        ([tmp_path / "nowhere"], "is no folder of this"),
        ([tmp_path / "none"], "no .tar at all"),
        ([folder, "--train", "x*.tar"], "--train x*.tar fits no tar"),
        ([folder, "--train", "*", "--val", "*val*"], "belongs to train and to val"),
        ([folder, "--train", "a/*.tar"], "has a /"),
        ([folder, "--workers", "0"], "out of range"),
        (["s3://bucket/set"], "is no folder of this machine"),
    ):
        monkeypatch.setattr(sys, "argv", ["index", *map(str, arguments)])
        with pytest.raises(UsageError) as refusal:
            main()
        assert words in str(refusal.value)
        assert "\n" not in str(refusal.value)
    done = run(folder, "--train", "*train*0[01].tar", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "16 train pictures of 4 classes; 2 tars are in no split, indexed in" in done.stderr
    assert (Manifest.load(folder).splits.keys(), done.stdout) == ({"train"}, "")
    done = run(folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder} is a data set already; ")
    assert (done.stderr.count("\n"), done.stdout) == (1, "")


def flip(folder: Path, sample: int) -> None:
    """Do damage to a training picture."""
    row = rows_of(folder, "train")[sample]
    with (folder / f"in1k-train-{row['shard']:02d}.tar").open("r+b") as file:
        file.seek(int(row["offset"]) + 300)
        file.write(b"!!")


def test_damage_is_named_by_the_key_in_the_tar(folder):
    index(folder)
    flip(folder, 11)
    (found,) = verify(folder)
    assert (found["file"], found["sample"], found["key"]) == (
        "in1k-train-01.tar",
        11,
        "train/n00011",
    )
    with Stream(folder, batch_size=20) as stream:
        next(stream)
        damage = stream.damaged[11]
    assert (damage.shard, damage.key) == ("in1k-train-01.tar", "train/n00011")


def test_our_own_shards_can_be_indexed_anew(tiny_data, tmp_path):
    for path in tiny_data.glob("*.tar"):
        shutil.copy(path, tmp_path)
    index(tmp_path)
    for split in ("train", "val"):
        ours, theirs = (data / f"{split}.index.npy" for data in (tiny_data, tmp_path))
        assert ours.read_bytes() == theirs.read_bytes()
    for path in tiny_data.glob("*.idx"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_a_set_of_a_store_may_have_any_names(folder, tmp_path):
    index(folder)
    with (
        Server(folder) as server,
        Stream(folder, batch_size=20) as local,
        Stream(server.address, cache=tmp_path / "cache", batch_size=20) as remote,
    ):
        assert torch.equal(next(local).images, next(remote).images)
    flip(folder, 11)
    with (
        Server(folder) as server,
        Stream(server.address, cache=tmp_path / "other", batch_size=20) as remote,
    ):
        next(remote)
        assert remote.damaged[11].key == "train/n00011"


def test_processes_that_die_are_told(monkeypatch, folder):
    monkeypatch.setattr("pipeline.indexing.foreign.examine", _die)
    with pytest.raises(DuetError, match="a process died"):
        index(folder, workers=2)


def _die(job: object) -> None:
    os._exit(9)
