"""A version with more images: what it holds, what it refuses, and that it resumes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.batches import Stream
from pipeline.build_shards import leak_lines, summary_lines
from pipeline.dataset.aggregates import NAME as AGGREGATES
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.index import load_index
from pipeline.dataset.manifest import NAME, Manifest, identity, tables_folder
from pipeline.dataset.members import TextTable
from pipeline.options import BuildConfig
from pipeline.packing import plan
from pipeline.packing.additions import add_version
from pipeline.packing.build import build
from pipeline.packing.plan import describe_holdout, read_holdout
from pipeline.remote.target import WORK, FolderTarget, StoreTarget
from pipeline.tools.errors import DamagedFile, DataError, DuetError, UsageError
from pipeline.tools.processes import LocalPool
from pipeline.verify import verify
from tests.helpers.build_targets import Here, complaint, memory_address  # noqa: F401
from tests.helpers.images import folder_per_class, jpeg, packed
from tests.helpers.tars import tar_of

SMALL = {"size": 64, "samples_per_shard": 5}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `one` (4 x 4 images) and `two` (4 x 3, one of them also in `one`)."""
    root = tmp_path_factory.mktemp("sources")
    folder_per_class(root / "one", 4)
    folder_per_class(root / "two", 3, first_seed=100)
    for path in (root / "two").glob("*/*.jpg"):
        path.rename(path.with_name(f"new-{path.name}"))
    shutil.copy(root / "one" / "cat" / "001.jpg", root / "two" / "cat" / "copy.jpg")
    return root


@pytest.fixture(scope="module")
def first(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "data"
    packed(out, train=sources / "one", val=sources / "one", **SMALL)
    return out


@pytest.fixture
def data(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "data"))


def add(out: object, source: Path | None = None, pool: object = None, **settings) -> Manifest:
    settings = {"samples_per_shard": 5, "max_rejects": 0.5} | settings
    given = {"add": str(source)} if source else {}
    return add_version(BuildConfig(out=str(out), **given, **settings), pool=pool or Here())


def names(folder: Path, split: str = "train") -> list[str]:
    manifest = Manifest.load(folder)
    count = manifest.splits[split].samples
    table = TextTable(tables_folder(folder, manifest), split, "names", count)
    return table.read(np.arange(count))


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and WORK not in path.parts
    }


def test_added_images_follow_those_of_the_version_before(data, sources, capsys):
    before, old, text = names(data), everything(data), (data / NAME).read_bytes()
    manifest = add(data, sources / "two")
    assert manifest == Manifest.load(data)
    assert (manifest.number, manifest.parent) == (2, identity(data / "versions/000001"))
    assert manifest.change["added"] == 12
    assert manifest.change["skipped"] == 1
    assert "1 of 13 images are in" in capsys.readouterr().err
    after = names(data)
    assert after[:16] == before
    assert sorted(after[16:]) == sorted(
        str(p.relative_to(sources / "two")) for p in (sources / "two").glob("*/new-*.jpg")
    )
    now = everything(data)
    assert {name: now[name] for name in old if name != NAME} == {
        name: one for name, one in old.items() if name != NAME
    }
    assert now["versions/000001/manifest.json"] == text
    assert not (data / WORK).exists()
    for version in (1, 2):
        assert verify(data, decode=True, version=version) == []


def test_statistics_are_those_of_a_fresh_build_of_all_images(data, sources, tmp_path):
    """Sums of whole numbers are kept: the file has the same bytes."""
    manifest = add(data, sources / "two")
    both = tmp_path / "both"
    shutil.copytree(sources / "one", both)
    shutil.copytree(sources / "two", both, dirs_exist_ok=True)
    (both / "cat" / "copy.jpg").unlink()
    packed(tmp_path / "fresh", train=both, val=sources / "one", **SMALL)
    fresh = Manifest.load(tmp_path / "fresh")
    assert manifest.stats_sha256 == fresh.stats_sha256
    assert (manifest.duplicates, manifest.leaks) == (fresh.duplicates, fresh.leaks)
    assert fresh.leaks == 16


def test_a_set_without_sums_is_read_once(data, sources, capsys):
    exact = Path(shutil.copytree(data, data.with_name("exact")))
    (data / AGGREGATES).unlink()
    manifest = add(data, sources / "two")
    assert "keeps no sums" in capsys.readouterr().err
    add(exact, sources / "two")
    ours, theirs = (Statistics.load(one, Manifest.load(one)) for one in (data, exact))
    # The old images are measured as they are stored: JPEGs of quality 96.
    assert np.abs(ours.channel_mean - theirs.channel_mean).max() < 0.5
    lost = np.abs(ours.covariance - theirs.covariance).max()
    assert lost < 0.03 * theirs.covariance.max()  # of colored noise at half the color resolution
    assert manifest.change["skipped"] == 1
    assert verify(data) == []


def test_the_same_source_twice_and_what_was_there(data, sources, capsys):
    add(data, sources / "two")
    assert add(data, sources / "two").number == 2
    assert "added as version 2" in capsys.readouterr().err
    assert add(data, sources / "one").number == 2
    assert "16 of 16 images are in" in capsys.readouterr().err
    assert not (data / WORK).exists()
    assert verify(data) == []


def test_a_replaced_image_keeps_its_id(data, sources, tmp_path):
    place = names(data).index("dog/002.jpg")
    (tmp_path / "new" / "dog").mkdir(parents=True)
    (tmp_path / "new" / "dog" / "002.jpg").write_bytes(jpeg(9999))
    (tmp_path / "new" / "cat").mkdir(parents=True)
    shutil.copy(sources / "one" / "cat" / "001.jpg", tmp_path / "new" / "cat")
    before = load_index(data, "train", Manifest.load(data))
    manifest = add(data, tmp_path / "new", replace=True)
    assert {key: manifest.change[key] for key in ("added", "replaced", "skipped")} == {
        "added": 0, "replaced": 1, "skipped": 1,
    }  # fmt: skip
    after = load_index(data, "train", manifest)
    assert np.flatnonzero(before["crc"] != after["crc"]).tolist() == [place]
    assert after[place]["shard"] == len(manifest.splits["train"].shards) - 1
    assert names(data)[place] == "dog/002.jpg"
    with Stream(data, batch_size=4, crop="whole", size=64, mean="channel") as stream:
        assert len(next(stream).ids) == 4
    for version in (1, 2):
        assert verify(data, decode=True, version=version) == []


def test_a_name_that_two_images_have_is_not_replaced(data, sources, tmp_path):
    (tmp_path / "new" / "dog").mkdir(parents=True)
    for seed in (1234, 2345):
        (tmp_path / "new" / "dog" / "002.jpg").write_bytes(jpeg(seed))
        if seed == 1234:
            add(data, tmp_path / "new")
    with pytest.raises(UsageError, match=r"two images 'dog/002\.jpg'"):
        add(data, tmp_path / "new", replace=True)
    assert Manifest.load(data).number == 2


def test_new_classes_come_last_if_they_may(data, tmp_path):
    (tmp_path / "new" / "ant").mkdir(parents=True)
    (tmp_path / "new" / "ant" / "1.jpg").write_bytes(jpeg(77))
    text = (data / NAME).read_bytes()
    with pytest.raises(UsageError, match=r"class 'ant', which .* lacks.*--new-classes") as raised:
        add(data, tmp_path / "new")
    complaint(raised)
    assert (data / NAME).read_bytes() == text
    manifest = add(data, tmp_path / "new", new_classes=True)
    assert manifest.classes == ("apple", "bird", "cat", "dog", "ant")
    assert load_index(data, "train", manifest)["label"][-1] == 4
    assert verify(data) == []


def test_rejects_are_tried_again(sources, tmp_path):
    source = Path(shutil.copytree(sources / "one", tmp_path / "source"))
    good = (source / "cat" / "000.jpg").read_bytes()
    (source / "cat" / "000.jpg").write_bytes(good[:100])
    (source / "dog" / "000.jpg").write_bytes(b"\xff\xd8 no image")
    packed(tmp_path / "data", train=source, max_rejects=0.5, **SMALL)
    assert Manifest.load(tmp_path / "data").rejected == 2
    (source / "cat" / "000.jpg").write_bytes(good)
    manifest = add(tmp_path / "data", retry_rejects=True)
    assert (manifest.number, manifest.rejected, manifest.change["added"]) == (2, 1, 1)
    assert names(tmp_path / "data")[-1] == "cat/000.jpg"
    assert verify(tmp_path / "data", version=2) == []
    assert add(tmp_path / "data", retry_rejects=True).number == 2  # nothing can be read by now


def test_mended_images_go_where_the_holdout_puts_them(sources, tmp_path):
    test = Path(shutil.copytree(sources / "two", tmp_path / "test"))
    settings = {"holdout": 0.25, "test": test, "max_rejects": 0.9, **SMALL}
    source = Path(shutil.copytree(sources / "one", tmp_path / "source"))
    packed(tmp_path / "whole", train=source, **settings)
    wanted = {split: set(names(tmp_path / "whole", split)) for split in ("train", "val", "test")}
    mended = {split: sorted(some)[:2] for split, some in wanted.items()}
    for split, some in mended.items():
        for name in some:
            ((test if split == "test" else source) / name).write_bytes(b"\xff\xd8 no image")
    packed(tmp_path / "data", train=source, **settings)
    shutil.copytree(sources / "one", source, dirs_exist_ok=True)
    shutil.copytree(sources / "two", test, dirs_exist_ok=True)
    manifest = add(tmp_path / "data", retry_rejects=True)
    assert (manifest.rejected, manifest.change["added"]) == (0, 6)
    for split, some in wanted.items():
        assert set(names(tmp_path / "data", split)) == some
    assert verify(tmp_path / "data") == []


@pytest.mark.parametrize(
    ("val", "share"),
    [
        (describe_holdout(0.1, "12 of x"), 0.1),
        (describe_holdout(0.123456789, "12 of x"), 0.123456789),
        ("12 of x", 0.0),
        ("0.1 of y", 0.0),
        ("2 of 12 of x", 0.0),
        ("nan of 12 of x", 0.0),
    ],
)
def test_a_holdout_is_told_from_a_source_of_such_a_name(val, share):
    assert read_holdout({"train": "12 of x", "val": val}) == share


def test_a_damaged_list_of_rejects_ends_in_one_line(data, sources):
    text = (data / NAME).read_bytes()
    (data / "rejects.jsonl").write_text('{"name": "x", "reason": "y"}\n')
    with pytest.raises(DataError, match=r"rejects.jsonl is damaged; restore it") as raised:
        add(data, sources / "two")
    complaint(raised)
    (data / "rejects.jsonl").unlink()
    with pytest.raises(DataError, match=r"rejects.jsonl is missing; restore it"):
        add(data, sources / "two")
    assert (data / NAME).read_bytes() == text


def test_the_rest_of_a_source_that_was_damaged_is_packed_when_it_is_mended(tmp_path):
    source = tmp_path / "source"
    for label, name in enumerate("ab"):
        tar_of(source / f"{name}.tar", {f"{n}.jpg": jpeg(100 * label + n) for n in range(6)})
    whole = (source / "b.tar").read_bytes()
    (source / "b.tar").write_bytes(whole[: whole.index(b"2.jpg") + 1000])
    packed(tmp_path / "data", train=source, max_rejects=0.5, **SMALL)
    (source / "b.tar").write_bytes(whole)
    manifest = add(tmp_path / "data", retry_rejects=True)
    assert manifest.change == {"added": 4, "replaced": 0, "skipped": 2, "retried": 6}
    assert (manifest.splits["train"].samples, manifest.rejected) == (12, 0)
    assert verify(tmp_path / "data") == []


@pytest.mark.parametrize(("split", "count"), [("val", 16 + 12), ("test", 12)])
def test_images_go_to_the_split_that_is_named(split, count, data, sources):
    left = data / f"{split}-000999.tar"
    left.write_bytes(b"of a version that was not sealed")
    manifest = add(data, sources / "two", split=split)
    assert not left.exists()
    assert manifest.splits[split].samples == count
    assert manifest.stats_sha256 == Manifest.load(data / "versions/000001").stats_sha256
    assert verify(data) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quality": 90}, "--quality 90 differs: "),
        ({"fields": ("json",)}, "have 0 other members"),
        ({"labels": False}, "--no-labels differs: "),
        ({"train": "x"}, "--train begins a data set"),
        ({"retry_rejects": True}, "make a version each"),
        ({"split": "dev"}, "--split dev is none of a build's; give train, val or test"),
    ],
)
def test_settings_that_do_not_fit_the_set_are_refused(data, sources, settings, words):
    with pytest.raises(UsageError, match=words) as raised:
        add(data, sources / "two", **settings)
    complaint(raised)
    assert Manifest.load(data).number == 1


def test_there_must_be_a_set_to_add_to(sources, tmp_path):
    with pytest.raises(UsageError, match="no finished data set to add to"):
        add(tmp_path / "none", sources / "two")
    with pytest.raises(UsageError, match="--train SRC is missing"):
        build(BuildConfig(out=str(tmp_path / "none")))
    assert not (tmp_path / "none").exists()


def test_a_damaged_parent_ends_in_one_line(data, sources):
    path = data / "train.index.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedFile, match="not the index that was built"):
        add(data, sources / "two")
    (data / "train-000001.tar").write_bytes(b"")
    with pytest.raises(DuetError, match=r"train-000001\.tar is missing or not whole"):
        add(data, sources / "two")
    assert Manifest.load(data).number == 1


def test_two_that_add_at_once(data, sources):
    held = FolderTarget(str(data)).reserve(extends=True)
    with held, pytest.raises(UsageError, match="build"):
        add(data, sources / "two")
    assert add(data, sources / "two").number == 2


def test_a_build_of_before_leaves_a_version_in_the_making_alone(data, sources):
    with pytest.raises(KeyboardInterrupt):
        add(data, sources / "two", pool=Here(1))
    again = BuildConfig(
        out=str(data), train=str(sources / "one"), val=str(sources / "one"), **SMALL
    )
    assert build(again, pool=Here(0)).number == 1
    assert (data / WORK / "build.json").is_file()
    assert add(data, sources / "two").number == 2


def test_other_work_that_was_cut_is_cleared_up(data, sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "SMALLEST_CHUNK", 8)
    with pytest.raises(KeyboardInterrupt):
        add(data, sources / "two", pool=Here(4), samples_per_shard=2)
    assert (data / "train-000005.tar").is_file()
    folder_per_class(tmp_path / "three", 1, first_seed=300)
    manifest = add(data, tmp_path / "three")
    assert "cut short" in capsys.readouterr().err
    assert sorted(path.name for path in data.glob("train-*.tar")) == [
        shard.name for shard in manifest.splits["train"].shards
    ]
    assert verify(data) == []


class Cut(Exception):
    """The command ends here, as if it had been killed."""


def cut_at(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], int]:
    """Let the n-th file that is written from now on be the last; return how many were."""
    create, count = FolderTarget.create, 0

    @contextmanager
    def counting(self, name, *, durable=True):
        nonlocal count
        count += 1
        with create(self, name, durable=durable) as file:
            yield file
            if count == number:
                raise Cut
        if count == -number:  # it has its name already
            raise Cut

    monkeypatch.setattr(FolderTarget, "create", counting)
    return lambda: count


def test_cut_anywhere_the_old_version_is_whole_and_the_next_attempt_ends_alike(
    first, sources, tmp_path, monkeypatch
):
    monkeypatch.setattr(plan, "SMALLEST_CHUNK", 8)
    whole = Path(shutil.copytree(first, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        total = cut_at(patch, 0)
        add(whole, sources / "two")
        files = total()
    expected, old = everything(whole), (first / NAME).read_bytes()
    out = tmp_path / "data"
    for moment in (2, -6, 9, -12, files - 3, files, -files):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(first, out)
        with monkeypatch.context() as patch:
            cut_at(patch, moment)
            with pytest.raises(Cut):
                add(out, sources / "two")
        is_sealed = moment == -files
        assert (out / NAME).read_bytes() == (expected[NAME] if is_sealed else old)
        assert [row for row in verify(out) if "tar" in row["file"]] == []
        add(out, sources / "two")
        assert everything(out) == expected


@pytest.mark.slow
def test_twenty_kills_at_random_moments(first, sources, tmp_path):
    """Forks without helpers are killed; what they must end with is the work of two helpers."""
    whole = Path(shutil.copytree(first, tmp_path / "whole"))
    begun = time.monotonic()
    add(shutil.copytree(first, tmp_path / "clock"), sources / "two")
    seconds = time.monotonic() - begun
    with LocalPool(2) as pool:
        add(whole, sources / "two", pool=pool)
    expected = everything(whole)
    old = (first / NAME).read_bytes()
    out, draw, kills = tmp_path / "data", random.Random(0), 0
    shutil.copytree(first, out)
    while kills < 20:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                add(out, sources / "two")
                code = 0
            finally:
                os._exit(code)
        time.sleep(draw.uniform(0, 0.8 * seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        assert (out / NAME).read_bytes() in (old, expected[NAME])
        assert verify(out, version=1) == []
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            assert everything(out) == expected
            shutil.rmtree(out)
            shutil.copytree(first, out)
    add(out, sources / "two")
    assert everything(out) == expected


def test_a_version_at_an_address_has_the_bytes_of_a_local_one(memory, first, data, sources):
    target = StoreTarget(memory)
    for path in first.iterdir():
        with target.create(path.name) as file:
            file.write(path.read_bytes())
    with pytest.raises(KeyboardInterrupt):
        add(memory, sources / "two", pool=Here(2))
    assert target.read(NAME) == (first / NAME).read_bytes()
    add(memory, sources / "two")
    add(data, sources / "two")
    expected = everything(data)
    assert target.list_files() == set(expected)
    assert all(target.read(name) == one for name, one in expected.items())


def test_the_report_names_the_lists_of_the_version(data, sources, tmp_path):
    """Leaks that a version brings are named from its own list, not from that of the first."""
    source = tmp_path / "new" / "dog" / "leak.jpg"
    source.parent.mkdir(parents=True)
    shutil.copy(sources / "two" / "dog" / "new-000.jpg", source)
    val = tmp_path / "val" / "dog" / "seen.jpg"
    val.parent.mkdir(parents=True)
    add(data, tmp_path / "new")
    before = Manifest.load(data).leaks
    with Image.open(source) as image:
        image.save(val, quality=97)
    manifest = add(data, tmp_path / "val", split="val")
    assert manifest.leaks == before + 1
    options = BuildConfig(out=str(data), add=str(tmp_path / "val"))
    (*_, line) = summary_lines(options, manifest, 1.0)
    (place,) = re.findall(r"\((.*duplicates\.jsonl)\)", line)
    assert Path(place) == data / "versions/000003/duplicates.jsonl"
    rows = list(map(json.loads, Path(place).read_text().splitlines()))
    assert sum(row["leak"] for row in rows) == manifest.leaks
    (data / "duplicates.jsonl").write_bytes(b"")
    lines = list(leak_lines(manifest, FolderTarget(data)))
    assert any(line.startswith("  train ") for line in lines)
