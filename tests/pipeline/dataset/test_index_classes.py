"""The classes of shards that other tools made, and the command that indexes them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.dataset.index import load_index, save_index
from pipeline.dataset.manifest import Manifest
from pipeline.index_shards import main
from pipeline.tools.errors import UsageError
from pipeline.verify import verify
from tests.helpers.foreign_shards import (  # noqa: F401 - fixtures
    copy_of_made,
    index,
    made_by_webdataset,
    make_image,
    names,
    run,
)
from tests.helpers.images import jpeg, rows_of
from tests.helpers.tars import tar_of


def labelled(folder: Path, labels: list[bytes], split: str = "train") -> None:
    files = []
    for n, label in enumerate(labels):
        files += [(f"{n}.jpg", make_image(n)), (f"{n}.cls", label)]
    tar_of(folder / f"{split}-0.tar", files)


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
        ([b"1", b"2"], "a\nb\n", "labels run to 2, and none is 0"),
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


def test_float_labels_are_numbers_and_were_words(tmp_path):
    labelled(tmp_path, [b"%d.0" % (n % 12) for n in range(24)])
    manifest = index(tmp_path).manifest
    assert manifest.classes == tuple(map(str, range(12)))
    assert rows_of(tmp_path, "train")["label"].tolist() == [*range(12)] * 2
    assert verify(tmp_path) == []
    words = tuple(sorted(f"{n}.0" for n in range(12)))  # as a release before sealed them
    rows = load_index(tmp_path, "train", manifest).copy()
    rows["label"] = [words.index(f"{n}.0") for n in rows["label"]]
    split = replace(manifest.splits["train"], index_sha256=save_index(tmp_path, "train", rows))
    replace(manifest, classes=words, splits={"train": split}).save(tmp_path)
    assert verify(tmp_path) == []


def test_nothing_usable_is_told_with_the_reason(tmp_path):
    files = [(f"{n}.jpg", jpeg(n, 96, 80)) for n in range(3)]
    tar_of(tmp_path / "train-0.tar", [*files, ("x.cls", b"1")])
    outcome = index(tmp_path)
    assert (outcome.manifest, len(outcome.bad)) == (None, 4)
    done = run(tmp_path, "--skip-bad")
    assert done.returncode == 4
    words = "most often: it has no label (.cls or .json) (3 times, as train-0.tar key 0); without"
    assert f"{words} them there is no training sample; repack with" in done.stderr
    files += [("y.jpg", make_image(1)), ("y.cls", b"1"), ("z.jpg", make_image(2)), ("z.cls", b"1")]
    tar_of(tmp_path / "train-0.tar", files)
    done = run(tmp_path)
    assert done.returncode == 4
    assert "3 samples of" in done.stderr
    assert "without them labels run from 1 to 1" in done.stderr


def test_classes_without_a_training_image_are_told(tmp_path):
    labelled(tmp_path, [b"0", b"2", b"0", b"4"])
    assert index(tmp_path).empty == ["1", "3"]


def test_the_command_ends_with_one_line_and_the_right_code(folder, tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    for arguments, words in (
        ([tmp_path / "nowhere"], "is no folder of this"),
        ([tmp_path / "none"], "no .tar at all"),
        ([folder, "--train", "x*.tar"], "--train x*.tar fits no tar"),
        ([folder, "--train", "*", "--val", "*val*"], "belongs to train and to val"),
        ([folder, "--train", "a/*.tar"], "has a /"),
        ([folder, "--workers", "0"], "out of range"),
        (["https://host/set"], "takes no files; name a folder for the index with --out"),
        (["hf://datasets/a/b"], "takes no files; name a folder for the index with --out"),
        (["https://host/set", "--out", folder / "x"], "has no list of its files; name the shards"),
        ([folder, "--out", folder / "x"], "--out is for shards at an address"),
        (["https://me:secret@host/set", "--out", "x"], "with its credentials; give it without"),
    ):
        monkeypatch.setattr(sys, "argv", ["index", *map(str, arguments)])
        with pytest.raises(UsageError) as refusal:
            main()
        assert words in str(refusal.value)
        assert "\n" not in str(refusal.value)
    done = run(folder, "--train", "*train*0[01].tar", "--workers", "2")
    assert done.returncode == 0, done.stderr
    assert "16 train images of 4 classes; 2 archives are in no split (" in done.stderr
    assert (Manifest.load(folder).splits.keys(), done.stdout) == ({"train"}, "")
    done = run(folder)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder} is a data set already; ")
    assert (done.stderr.count("\n"), done.stdout) == (1, "")
