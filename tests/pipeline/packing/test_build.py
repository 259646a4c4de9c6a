from __future__ import annotations

import gzip
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.batches import Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest
from pipeline.options import BuildConfig
from pipeline.packing import chunks
from pipeline.packing.plan import make_plan
from pipeline.remote.target import WORK, FolderTarget
from pipeline.tools.errors import DuetError, UsageError
from pipeline.verify import verify
from tests.helpers.images import CLASSES, folder_per_class, jpeg, packed, rows_of
from tests.helpers.processes import call_command
from tests.helpers.resealed_data import edit_manifest
from tests.helpers.tars import tar_of
from tests.helpers.webdatasets import write_shards


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline.build_shards", *map(str, arguments)]
    return call_command(command)


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


def test_the_stored_images_are_the_sources_in_shuffled_order(image_folder, tiny_data):
    from pipeline.packing.resize import decode_square, encode

    rows = rows_of(tiny_data, "train")
    files = sorted((image_folder / "train").glob("*/*.jpg"))
    expected = {
        encode(decode_square(file.read_bytes()), 96, "4:2:0"): file.parent.name for file in files
    }
    tars = sorted(tiny_data.glob("train-*.tar"))
    stored = []
    for row in rows:
        with tars[row["shard"]].open("rb") as tar:
            tar.seek(row["offset"])
            stored.append(tar.read(row["size"]))
    assert [expected[data] for data in stored] == [CLASSES[label] for label in rows["label"]]
    assert len(set(stored)) == 48
    assert rows["label"].tolist() != sorted(rows["label"])


def test_statistics_are_those_of_the_pixels(image_folder, tiny_data):
    from pipeline.packing.resize import decode_square

    values = np.stack(
        [
            decode_square(file.read_bytes())
            for file in sorted((image_folder / "train").glob("*/*.jpg"))
        ]
    ).astype(np.float64)
    stats = Statistics.load(tiny_data)
    flat = values.reshape(-1, 3)
    np.testing.assert_allclose(stats.mean_picture, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats.channel_mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(flat.T, bias=True), rtol=1e-9)
    rebuilt = stats.eigenvectors @ np.diag(stats.eigenvalues) @ stats.eigenvectors.T
    np.testing.assert_allclose(rebuilt, stats.covariance, rtol=1e-9)
    assert (np.diff(stats.eigenvalues) <= 0).all()


def test_the_same_bytes_whatever_the_number_of_workers(image_folder, tiny_data, tmp_path):
    for workers in ("1", "3"):
        out = tmp_path / workers
        source = ["--train", image_folder / "train", "--val", image_folder / "val"]
        done = run(out, *source, "--samples-per-shard", "10", "--workers", workers)
        assert done.returncode == 0, done.stderr
        assert everything(out) == everything(tiny_data)


def test_a_finished_set_is_left_alone_and_another_plan_refused(image_folder, tmp_path):
    out, train = tmp_path / "data", image_folder / "val"
    first = packed(out, train=train)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert packed(out, train=train) == first == Manifest.load(out)
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    for other, words in (
        ({"seed": 1}, "seed 0, and this one is of 1;"),
        ({"encoding": "raw"}, "encoding jpeg, and this one is of raw;"),
        ({"quality": 90, "chroma": "4:4:4"}, "quality 96, and this one is of 90;"),
        ({"train": image_folder / "train"}, "other images, settings or order"),
    ):
        with pytest.raises(UsageError, match=f"finished data set of {words}"):
            packed(out, **{"train": train, **other})


def test_the_same_images_elsewhere_are_the_same_plan(image_folder, tmp_path):
    """The folder of a source on a machine is no part of a set."""
    shutil.copytree(image_folder / "val", tmp_path / "copy")
    plans = {
        packed(tmp_path / str(number), train=train).plan
        for number, train in enumerate((image_folder / "val", tmp_path / "copy"))
    }
    assert len(plans) == 1
    for name in ("0", "1"):
        (tmp_path / name / "manifest.json").unlink()  # it says where the source was
    assert everything(tmp_path / "0") == everything(tmp_path / "1")


def test_sets_from_before_there_were_encodings_hold_jpegs(image_folder, tmp_path):
    out = tmp_path / "data"
    made = packed(out, train=image_folder / "val")
    later = ("encoding", "chroma", "titles", "duplicates", "leaks", "libraries")
    edit_manifest(out, lambda table: [table.pop(name) for name in later])
    old = Manifest.load(out)
    assert (old.encoding, old.splits, old.plan) == ("jpeg", made.splits, made.plan)
    assert [batch.ids.tolist() for batch in Stream(out, batch_size=20, crop="center", once=True)]


def test_strangers_in_the_folder_stay(image_folder, tmp_path):
    (tmp_path / "train-000000.tar").write_text("somebody else's shard")
    with pytest.raises(UsageError, match=r"holds train-000000\.tar"):
        packed(tmp_path, train=image_folder / "val")
    assert (tmp_path / "train-000000.tar").read_text() == "somebody else's shard"
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


def test_two_builds_do_not_share_a_folder(image_folder, tmp_path):
    with (
        FolderTarget(str(tmp_path)).reserve(),
        pytest.raises(UsageError, match="is in use by another build"),
    ):
        packed(tmp_path, train=image_folder / "val")
    assert not (tmp_path / WORK).exists()


def test_holdout_takes_its_share_of_every_class(image_folder, tiny_data, tmp_path):
    manifest = packed(tmp_path / "d", train=image_folder / "train", holdout=0.25)
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 36,
        "val": 12,
    }
    assert np.bincount(rows_of(tmp_path / "d", "val")["label"]).tolist() == [3, 3, 3, 3]
    both = np.concatenate([rows_of(tmp_path / "d", split)["crc"] for split in ("train", "val")])
    assert sorted(both) == sorted(rows_of(tiny_data, "train")["crc"])


def test_statistics_are_of_the_training_split_alone(image_folder, tmp_path):
    held, alone = tmp_path / "held", tmp_path / "alone"
    packed(held, train=image_folder / "train", holdout=0.25)
    data = rows_of(held, "train")
    with (held / "train-000000.tar").open("rb") as tar:
        images_of = [_pixels_at(tar, row) for row in data]
    mean = np.mean(images_of, axis=(0, 1, 2))
    assert np.abs(Statistics.load(held).channel_mean - mean).max() < 1  # what the JPEGs lose
    packed(alone, train=image_folder / "train")
    assert np.abs(Statistics.load(alone).channel_mean - mean).max() > 1


def _pixels_at(tar, row) -> np.ndarray:
    tar.seek(int(row["offset"]))
    return np.asarray(Image.open(io.BytesIO(tar.read(int(row["size"])))), np.float64)


def test_unreadable_images_are_left_out_counted_and_listed(tmp_path):
    source = folder_per_class(tmp_path / "s", 3)
    (source / "cat/bad.jpg").write_bytes(b"no picture at all")
    (source / "cat/cut.jpg").write_bytes(jpeg(3)[:-300])
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    foreign = {"lfs": pointer, "gz": gzip.compress(jpeg(4)), "page": b"<!DOCTYPE html>\n"}
    for name, content in foreign.items():
        (source / f"dog/{name}.jpg").write_bytes(content)
    (source / "dog/notes.txt").write_text("hello")
    (source / "dog/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    done = run(tmp_path / "d", "--train", source, "--json")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "7 of 19 files (36.84%) cannot be packed" in done.stderr
    assert "most often: no " in done.stderr
    assert "go on without them: --max-rejects 0.37" in done.stderr
    assert len((tmp_path / "d/rejects.jsonl").read_text().splitlines()) == 7
    assert not (tmp_path / "d/manifest.json").exists()
    done = run(tmp_path / "d", "--train", source, "--json", "--max-rejects", "0.4")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["samples"] == {"train": 12}
    assert facts["rejected"] == 7
    listed = [json.loads(line) for line in (tmp_path / "d/rejects.jsonl").read_text().splitlines()]
    assert {Path(row["name"]).name for row in listed} == {
        "bad.jpg",
        "cut.jpg",
        "gone.jpg",
        "notes.txt",
        *(f"{name}.jpg" for name in foreign),
    }
    reasons = {Path(row["name"]).stem: row["reason"] for row in listed}
    assert all(reasons.values())
    assert "`git lfs pull`" in reasons["lfs"]
    assert reasons["gz"] == "no image: it is compressed with gzip"
    assert reasons["page"] == "no image: it is a web page"
    assert "7 skipped" in done.stderr


def test_a_class_of_unreadable_images_is_refused(tmp_path):
    source = folder_per_class(tmp_path / "s", 2)
    for path in (source / "cat").iterdir():
        path.write_bytes(b"not a picture")
    reason = r"most often: no image: .* \(2 times, as .*/cat/"
    with pytest.raises(UsageError, match=f"no image of class 'cat' could be read; {reason}"):
        packed(tmp_path / "d", train=source, max_rejects=1)
    assert not (tmp_path / "d/manifest.json").exists()


def test_class_folders_named_by_numbers(tmp_path):
    """Labels of the shards are places, whatever the names; verify and packing anew read them so."""
    for number, name in enumerate(("1", "2", "10")):
        (tmp_path / "s" / name).mkdir(parents=True)
        for place in range(2):
            (tmp_path / "s" / name / f"{place}.jpg").write_bytes(jpeg(10 * number + place))
    first = packed(tmp_path / "d", train=tmp_path / "s")
    assert first.classes == ("1", "2", "10")
    assert verify(tmp_path / "d") == []
    again = packed(tmp_path / "e", train=tmp_path / "d", val=tmp_path / "d/train-000000.tar")
    assert again.classes == first.classes
    labels = {split: sorted(rows_of(tmp_path / "e", split)["label"]) for split in ("train", "val")}
    assert labels == {"train": [0, 0, 1, 1, 2, 2], "val": [0, 0, 1, 1, 2, 2]}


def test_classes_without_images_are_refused_before_packing(tmp_path):
    members = [(f"{n}.{ending}", body) for n in (0, 1, 3) for ending, body in
               (("jpg", jpeg(n)), ("cls", b"%d" % n))]  # fmt: skip
    shard = tar_of(tmp_path / "train-0.tar", members)
    for settings in ({}, {"holdout": 0.5}):
        with pytest.raises(UsageError, match=r"class '2' \(number 2\) of source .* has no images"):
            packed(tmp_path / "d", train=shard, **settings)
    assert not (tmp_path / "d").exists()
    source = folder_per_class(tmp_path / "s", 1)
    with pytest.raises(
        UsageError, match=r"'apple' .* has 1: add images, remove .* or give .*--val"
    ):
        packed(tmp_path / "e", train=source, holdout=0.5)


def test_the_command_ends_with_one_line_and_the_right_code(image_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    train = image_folder / "train"
    for arguments, words in (
        ([tmp_path / "d/e", "--train", tmp_path / "empty"], "is empty"),
        ([tmp_path / "d/e", "--train", tmp_path / "nowhere"], "does not exist"),
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
        assert not (tmp_path / "d").exists()


def test_an_image_of_both_splits_is_told_loudly(image_folder, tmp_path):
    """The same image, saved again at another size and quality, is still the same image."""
    val = tmp_path / "val"
    shutil.copytree(image_folder / "val", val)
    original = Image.open(image_folder / "train/cat/003.jpg")
    larger = original.resize((2 * original.width, 2 * original.height), Image.Resampling.BICUBIC)
    larger.save(val / "dog/copy.jpg", quality=70)
    done = run(tmp_path / "d", "--train", image_folder / "train", "--val", val, "--json")
    assert done.returncode == 0
    facts = json.loads(done.stdout)
    assert (facts["duplicates"], facts["leaks"]) == (1, 1)
    assert "warning: 1 group of them in more than one split" in done.stderr
    assert "train cat/003.jpg = val dog/copy.jpg" in done.stderr
    (row,) = map(json.loads, (tmp_path / "d/duplicates.jsonl").read_text().splitlines())
    assert (row["kind"], row["leak"], row["labels_differ"]) == ("near", True, True)
    for member in row["members"]:
        rows = rows_of(tmp_path / "d", member["split"])
        assert rows[member["sample"]]["label"] == member["label"]
        listed = (tmp_path / f"d/{member['split']}.names.txt").read_text().splitlines()
        assert listed[member["sample"]] == member["name"]
    assert [CLASSES[member["label"]] for member in row["members"]] == ["cat", "dog"]


def test_max_rejects_may_be_reached_but_not_exceeded(tmp_path):
    """29 of 100 are 0.29 of them, though 0.29 * 100 is below 29 in floating point."""
    source = folder_per_class(tmp_path / "s", 25)
    bad = [*(source / "cat").iterdir()][:15] + [*(source / "dog").iterdir()][:14]
    for path in bad:
        path.write_bytes(b"no picture")
    assert packed(tmp_path / "d", train=source, max_rejects=0.29).rejected == 29
    with pytest.raises(DuetError, match="29 of 100 files"):
        packed(tmp_path / "e", train=source, max_rejects=0.28)


@pytest.mark.parametrize("kind", ["folders", "shards", "range"])
def test_validation_images_that_are_not_packed_are_told_before_packing(
    kind, image_folder, tmp_path
):
    source = image_folder
    if kind == "shards":
        source = write_shards(tmp_path / "s", cls=lambda place: place % 4)
        write_shards(tmp_path / "s", "val-%06d.tar", cls=lambda place: place % 4)
    if kind == "range":
        source = (
            f"{write_shards(tmp_path / 's', cls=lambda place: place % 4)}/{{train,val}}-000000.tar"
        )
        write_shards(tmp_path / "s", "val-%06d.tar", cls=lambda place: place % 4)
    options = BuildConfig(out=str(tmp_path / "out"), train=str(source))
    (note,) = make_plan(options, tmp_path / "1").notes
    assert note.startswith(f"{source}/val" if kind != "range" else f"{tmp_path}/s/val-000000.tar")
    assert f"give --val {source}, too" in note
    for number, other in enumerate(
        (replace(options, val=str(source)), replace(options, holdout=0.1))
    ):
        assert make_plan(other, tmp_path / f"{number + 2}").notes == ()


@pytest.mark.parametrize("kind", ["folders", "shards"])
def test_a_test_part_that_is_not_packed_is_told(kind, tmp_path):
    source = tmp_path / "s"
    if kind == "folders":
        for split in ("train", "val", "test"):
            folder_per_class(source / split, 2)
        test = source / "test"
    else:
        for split in ("train", "val", "test"):
            write_shards(source, f"{split}-%06d.tar", cls=lambda place: place % 4)
        test = source / "test-000000.tar"
    options = BuildConfig(out=str(tmp_path / "out"), train=str(source), val=str(source))
    wanted = (f"{test} is not packed; to evaluate on it, name it by --test",)
    assert make_plan(options, tmp_path / "1").notes == wanted
    assert make_plan(replace(options, val=None, holdout=0.5), tmp_path / "2").notes == wanted
    for name in [*source.glob("val*")]:
        shutil.move(name, tmp_path)
    if kind == "shards":  # which are validated on "test" then
        assert make_plan(options, tmp_path / "3").notes == ()
    assert make_plan(replace(options, val=None), tmp_path / "4").notes == wanted
    named = replace(options, val=None, test=str(source))
    assert make_plan(named, tmp_path / "5").notes == ()


@pytest.mark.parametrize("limits", [{"GROUP": 7}, {"GROUP_BYTES": 1}])
def test_the_size_of_groups_changes_no_byte(tmp_path, monkeypatch, limits):
    """Groups of another size, some with rejects among them, pack and reject the same images."""
    source = folder_per_class(tmp_path / "source", 8)
    for number in (0, 3, 5, 6, 7):
        (source / CLASSES[1] / f"{number:03d}.jpg").write_bytes(b"no image")
    sizes = []

    def spy(found):
        for group in _group(found):
            sizes.append(len(group))
            yield group

    _group = chunks._group
    monkeypatch.setattr(chunks, "_group", spy)
    folders = []
    for number, changes in enumerate(({}, limits)):
        sizes.clear()
        for name, value in changes.items():
            monkeypatch.setattr(chunks, name, value)
        packed(tmp_path / str(number), train=str(source), max_rejects=0.5)
        folders.append(everything(tmp_path / str(number)))
        if not number:
            assert max(sizes) == chunks.GROUP
    assert max(sizes) <= 7
    assert folders[0] == folders[1]
    names = [json.loads(line)["name"] for line in folders[0]["rejects.jsonl"].splitlines()]
    assert [name[-7:] for name in sorted(names)] == [f"{n:03d}.jpg" for n in (0, 3, 5, 6, 7)]


def test_a_test_split_leaves_the_bytes_of_the_others(image_folder, tiny_data, tmp_path):
    sources = {name: image_folder / name for name in ("train", "val")}
    out = tmp_path / "data"
    manifest = packed(out, **sources, test=image_folder / "val", samples_per_shard=10)
    assert verify(out) == []
    assert {name: split.samples for name, split in manifest.splits.items()} == {
        "train": 48, "val": 20, "test": 20,
    }  # fmt: skip
    before, after = everything(tiny_data), everything(out)
    for name in before.keys() - {"manifest.json", "duplicates.jsonl", "aggregates.npz"}:
        assert before[name] == after[name], name
    assert manifest.sources["test"] == str(image_folder / "val")
    assert manifest.leaks == 20, "the same images are in val and test"
    assert {*rows_of(out, "test")["crc"].tolist()} == {*rows_of(out, "val")["crc"].tolist()}
    with Stream(out, split="test", batch_size=20, once=True, crop="center", size=224) as stream:
        labels = next(stream).labels.tolist()
    assert labels == rows_of(out, "test")["label"].tolist()


def test_a_test_source_is_another_plan_than_one_of_validation(image_folder, tmp_path):
    options = BuildConfig(out=str(tmp_path / "out"), train=str(image_folder / "train"))
    other = str(image_folder / "val")
    plans = [
        make_plan(replace(options, **settings), tmp_path / str(number))
        for number, settings in enumerate(
            (
                {"val": other},
                {"test": other},
                {"test": other, "holdout": 0.5},
                {"val": other, "test": other},
            )
        )
    ]
    assert len({plan.fingerprint for plan in plans}) == 4
    assert [list(plan.orders) for plan in plans] == [
        ["train", "val"], ["train", "test"], ["train", "val", "test"], ["train", "val", "test"],
    ]  # fmt: skip
    for plan, images in zip(plans, (68, 68, 68, 88), strict=True):
        rows = np.sort(np.concatenate([*plan.orders.values()]))
        assert rows.tolist() == [*range(images)], "each image is in one split"
        assert np.flatnonzero(~plan.held_out).tolist() == sorted(plan.orders["train"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"test_labels": "x"}, "--test-labels goes with --test; name the test images too"),
        ({"val_labels": "x"}, "--val-labels goes with --val; name the validation images too"),
        ({"test": "t", "test_labels": "x", "labels": False}, "--test-labels names labels, and"),
        ({"train": "", "test": "t", "add": "a"}, "--test begins a data set, and --add"),
        ({"test": "t", "out": "t/x"}, "t/x lies inside the source t"),
    ],
)
def test_settings_of_a_test_split_that_cannot_work(settings, words):
    with pytest.raises(UsageError, match=words):
        BuildConfig(**{"out": "data", "train": "s"} | settings).check()
