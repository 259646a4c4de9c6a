"""Samples and tars that cannot be trained from are named, or left out."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest
from pipeline.dataset.samples import TORN
from pipeline.dataset.shards import parse_idx
from pipeline.stream.config import StreamConfig
from pipeline.throughput.dali_reader import DaliReader
from pipeline.tools.errors import DuetError
from pipeline.verify import verify
from tests.helpers.foreign_shards import (  # noqa: F401
    copy_of_made,
    decoded,
    flip,
    index,
    made_by_webdataset,
    make_image,
    names,
    run,
)
from tests.helpers.images import jpeg, pixels
from tests.helpers.processes import drop_progress
from tests.helpers.tars import tar_of


def cmyk() -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(1, 256, 256)).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


BAD = {
    "torn": ([("jpg", jpeg(2, 256, 256)[:-300]), ("cls", b"0")], "it cannot be decoded"),
    "text": ([("jpg", b"hello"), ("cls", b"0")], "it is no JPEG"),
    "empty": ([("jpg", b""), ("cls", b"0")], "it is no JPEG"),
    "print": ([("jpg", cmyk()), ("cls", b"0")], "its colours are CMYK"),
    "png": ([("png", b"\x89PNG"), ("cls", b"0")], "its image is a .png, no .jpg or .jpeg"),
    "alone": ([("jpg", make_image(3))], "it has no label (.cls or .json)"),
    "blind": ([("cls", b"1")], "it has no image"),
    "two": ([("a.jpg", make_image(3)), ("b.jpg", make_image(3)), ("cls", b"1")], "several images"),
    "array": ([("npy", b""), ("cls", b"1")], "its image is a .npy"),
    "odd": ([("jpg", make_image(4)), ("cls", b"1.5e3x\0y")], "its .cls of 8 bytes holds no label"),
    "list": (
        [("jpg", make_image(4)), ("json", b'{"label": [1]}')],
        "holds no label",
    ),
    "none": (
        [("jpg", make_image(4)), ("json", b'{"caption": "dog"}')],
        "no label (in one of label",
    ),
    "broken": ([("jpg", make_image(4)), ("json", b'{"label": ')], "holds no label"),
    "deep": ([("jpg", make_image(4)), ("json", b"[" * 9_000)], "holds no label"),
    "id": ([("jpg", make_image(4)), ("cls", b"999999999")], "is no class number"),
    "minus": ([("jpg", make_image(4)), ("cls", b"-1")], "its .cls of 2 bytes holds no label"),
}


@pytest.fixture
def spoilt(folder: Path) -> Path:
    """`folder`, with one more training shard of bad samples and two good ones."""
    files = [("g0.jpg", make_image(7)), ("g0.cls", b"2")]
    for key, (parts, _) in BAD.items():
        files += [(f"{key}.{ending}", content) for ending, content in parts]
    tar_of(folder / "x-train.tar", [*files, ("g1.jpg", make_image(8)), ("g1.cls", b"3")])
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
    assert drop_progress(done.stderr).startswith("x-train.tar key torn: it cannot be decoded")
    assert done.stderr.splitlines()[-1].startswith(f"error: {len(BAD)} samples of {spoilt} cannot")
    assert "--skip-bad" in done.stderr
    assert "duet build-shards OUT --train" in done.stderr
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
    values = np.stack([decoded(make_image(n)) for n in [*range(20), 7, 8]]).astype(np.float64)
    np.testing.assert_allclose(Statistics.load(spoilt).mean_picture, values.mean(0), rtol=1e-6)
    assert verify(spoilt, decode=True) == []
    with Stream(spoilt, batch_size=22) as stream:
        batch = next(stream)
        assert (sorted(batch.ids.tolist()), stream.damaged) == (list(range(22)), {})
    assert len(parse_idx((spoilt / "x-train.idx").read_bytes())) == 2
    reader = DaliReader(spoilt, StreamConfig(batch_size=22, threads=1))
    for _ in range(2):  # every sample twice: no bad one is among them
        assert next(reader).shape == (22, 3, 224, 224)


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
    for ending in (".tar.gz", ".TAR", ".zip"):
        more = folder / f"in1k-train-02{ending}"
        more.write_bytes(whole)
        assert [bad.shard for bad in index(folder).bad] == ["in1k-train-01.tar", more.name]
        assert "no plain tar" in index(folder).bad[1].reason
        assert index(folder, train="*.tar").unused == [more.name]
        more.unlink()
    done = run(folder)
    assert done.returncode == 4
    assert drop_progress(done.stderr).startswith("in1k-train-01.tar: it is empty\n")
    assert "manifest.json" not in names(folder)


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


def test_processes_that_die_are_told(monkeypatch, folder):
    monkeypatch.setattr("pipeline.index_shards.examine_shard", _die)
    with pytest.raises(DuetError, match="a process died"):
        index(folder, workers=2)


def _die(job: object) -> None:
    os._exit(9)


def test_halves_of_samples_that_lie_apart_are_said_to(tmp_path):
    sound = [("x.jpg", make_image(0)), ("x.cls", b"0"), ("y.jpg", make_image(1)), ("y.cls", b"1")]
    torn = [("a.jpg", make_image(2)), ("b.jpg", make_image(3)), ("a.cls", b"0"), ("b.cls", b"1")]
    tar_of(tmp_path / "train.tar", [*sound, *torn])
    assert {bad.reason for bad in index(tmp_path, skip_bad=True).bad} == {TORN}
