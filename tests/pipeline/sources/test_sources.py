"""Folders and tars of classes: their images, labels and names."""

from __future__ import annotations

import io
import os
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources import Listing, ListingWriter, Unreadable, scan
from pipeline.sources.names import HIDDEN
from pipeline.tools.errors import UsageError
from tests.helpers.images import CLASSES, jpeg
from tests.helpers.sources import read_contents
from tests.helpers.tars import tar_of


@pytest.fixture
def listed(tmp_path):
    """Scan a source; every listing has a scratch folder of its own."""
    count = iter(range(1000))

    def scanned(source, split="train", **options) -> Listing:
        return scan(str(source), tmp_path / f".scratch{next(count)}", split=split, **options)

    return scanned


def test_every_layout_gives_the_same_images(image_folder, tmp_path, listed):
    train = image_folder / "train"
    folders = read_contents(listed(train))
    assert [name for name, _ in folders] == sorted(12 * list(CLASSES))
    assert dict.fromkeys(data for _, data in folders).keys() == {
        path.read_bytes() for path in train.rglob("*.jpg")
    }

    tars = tmp_path / "tars"
    tars.mkdir()
    for name in CLASSES:
        files = sorted((train / name).iterdir())
        tar_of(tars / f"{name}.tar", {file.name: file.read_bytes() for file in files})
    assert read_contents(listed(tars)) == folders

    nested = tar_of(
        tmp_path / "all.tar", {path.name: path.read_bytes() for path in sorted(tars.iterdir())}
    )
    assert read_contents(listed(nested)) == folders

    flat = {
        f"train/{name}/{file.name}": file.read_bytes()
        for name in CLASSES
        for file in sorted((train / name).iterdir())
    }
    flat["README"] = b"beside the classes"
    assert read_contents(listed(tar_of(tmp_path / "flat.tar", flat))) == folders


def test_names_in_messages_lead_to_the_image(image_folder, tmp_path, listed):
    listing = listed(image_folder / "train")
    assert listing.full_name(13) == f"{image_folder}/train/{CLASSES[1]}/001.jpg"
    inner = tar_of(tmp_path / "a.tar", {"x.jpg": b"1"}).read_bytes()
    outer = tar_of(tmp_path / "outer.tar", {"t/a.tar": inner, "b/y.jpg": b"2"})
    listing = listed(outer)
    assert [listing.full_name(place) for place in range(len(listing))] == [
        f"{outer}/t/a.tar/x.jpg",
        f"{outer}/b/y.jpg",
    ]


def test_links_nesting_case_and_hidden_files(tmp_path, listed):
    (tmp_path / "s/a/deep").mkdir(parents=True)
    (tmp_path / "s/b").mkdir()
    (tmp_path / "real.jpg").write_bytes(jpeg(1))
    (tmp_path / "s/a/deep/x.JPEG").write_bytes(jpeg(2))
    (tmp_path / "s/a/link.jpg").symlink_to(tmp_path / "real.jpg")
    (tmp_path / "s/a/deep/back").symlink_to(tmp_path / "s/a")
    (tmp_path / "s/a/deep/up").symlink_to(tmp_path / "s/a/deep/up")
    (tmp_path / "s/b/y.png").write_bytes(b"")
    (tmp_path / "s/b/.hidden.jpg").write_bytes(b"")
    (tmp_path / "s/b/notes.txt").write_text("not an image")
    (tmp_path / "s/c").symlink_to(tmp_path / "s/b")
    os.mkfifo(tmp_path / "s/b/pipe.jpg")
    (tmp_path / "s/b/lost.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "s/README.md").write_text("beside the classes")
    listing = listed(tmp_path / "s")
    assert list(listing.names) == ["x.JPEG", "link.jpg", "y.png", "y.png"]
    assert listing.classes == ("a", "b", "c")
    assert listing.rows["label"].tolist() == [0, 0, 1, 2]
    rejects = [(Path(one.name).name, one.reason) for one in listing.rejects()]
    assert rejects[0] == ("up", "no regular file: a link that leads nowhere, or a device")
    assert sorted(rejects[1:5])[1:] == [
        ("lost.jpg", "no regular file: a link that leads nowhere, or a device"),
        ("notes.txt", "no image: unknown file ending"),
        ("pipe.jpg", "no regular file: a link that leads nowhere, or a device"),
    ]
    assert rejects.count((".hidden.jpg", HIDDEN)) == 2  # b, and the link to it
    assert listing.rejected == len(rejects) == 9


@pytest.mark.parametrize(
    "ending",
    [".jpg", ".JPEG", ".Jpe", ".png", ".WebP", ".bmp", ".gif", ".tif", ".TIFF", ".ppm", ".pgm"],
)
def test_endings(ending, tmp_path, listed):
    for place, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{place}{ending}").write_bytes(b"x")
    assert len(listed(tmp_path)) == 2


def test_the_order_is_not_that_of_the_file_system(tmp_path, listed, monkeypatch):
    for name in ("b/2.jpg", "a/z/1.jpg", "a/y/1.jpg", "b/10.jpg", "a/é.jpg", "a/x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    wanted = ["a/y/1.jpg", "a/z/1.jpg", "a/x.jpg", "a/é.jpg", "b/10.jpg", "b/2.jpg"]
    real = os.scandir
    for backwards in (False, True):

        def entries(path, backwards=backwards):
            return nullcontext(sorted(real(path), key=lambda one: one.name, reverse=backwards))

        with monkeypatch.context() as patched:
            patched.setattr(os, "scandir", entries)
            listing = listed(tmp_path)
        found = [listing.full_name(place) for place in range(len(listing))]
        assert found == [f"{tmp_path}/{name}" for name in wanted]


def test_names_that_are_no_text_survive(tmp_path, listed):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"1")
    with open(os.fsencode(tmp_path / "b") + b"/\xff\n.jpg", "wb") as file:
        file.write(b"2")
    listing = listed(tmp_path)
    assert read_contents(listing) == [("a", b"1"), ("b", b"2")]


def test_labels_of_another_split_follow_the_training_classes(tmp_path, listed):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.jpg").write_bytes(jpeg(1))
    listing = listed(tmp_path, classes=CLASSES)
    assert listing.classes == CLASSES
    assert listing.rows["label"].tolist() == [CLASSES.index("cat")]
    with pytest.raises(UsageError, match="class 'cat', which the training source lacks"):
        listed(tmp_path, classes=["dog", "emu"])


def test_a_source_with_two_splits_gives_the_one_asked_for(image_folder, tmp_path, listed):
    for split, per_class in (("train", 12), ("val", 5)):
        listing = listed(image_folder, split)
        assert len(listing) == 4 * per_class
        assert listing.full_name(0).startswith(f"{image_folder}/{split}/")
    (tmp_path / "s/train").mkdir(parents=True)
    (tmp_path / "s/train/a.tar").write_bytes(tar_of(tmp_path / "a", {"1.jpg": b"1"}).read_bytes())
    (tmp_path / "s/train/b.tar").write_bytes(tar_of(tmp_path / "b", {"2.jpg": b"2"}).read_bytes())
    (tmp_path / "s/test").mkdir()
    assert listed(tmp_path / "s").classes == ("a", "b")
    with pytest.raises(UsageError, match=r"s has no val: it holds test, train; name"):
        listed(tmp_path / "s", "val")
    (tmp_path / "s/validation").symlink_to(tmp_path / "s/train")
    assert listed(tmp_path / "s", "val").classes == ("a", "b")


def test_a_class_may_be_called_train(tmp_path, listed):
    for name in ("classes", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    assert listed(tmp_path).classes == ("classes", "train")
    assert listed(tmp_path, "val").classes == ("classes", "train")


def test_tricks_of_untrusted_tars_end_as_rejects(tmp_path, listed):
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        for name in (
            *("a/1.jpg", "../../b/2.jpg", "/etc/3.jpg", "a/./4.jpg", "a//5.jpg"),
            *("..//6.jpg", "a/../7.jpg", "a/x\x1b[2J.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        for name, kind in (
            ("a/link.jpg", tarfile.SYMTYPE),
            ("a/hard.jpg", tarfile.LNKTYPE),
            ("a/device.jpg", tarfile.BLKTYPE),
            ("a/pipe.jpg", tarfile.FIFOTYPE),
            ("c", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    listing = listed(tmp_path / "evil.tar")
    found = [
        (listing.classes[row["label"]], name)
        for row, name in zip(listing.rows, listing.names, strict=True)
    ]
    assert found == [
        ("a", "a/1.jpg"),
        ("b", "../../b/2.jpg"),
        ("etc", "/etc/3.jpg"),
        ("a", "a/./4.jpg"),
        ("a", "a//5.jpg"),
        ("a", "a/x\x1b[2J.jpg"),
    ]
    assert [one.name.removeprefix(f"{tmp_path}/evil.tar/") for one in listing.rejects()] == [
        *("..//6.jpg", "a/../7.jpg", "a/link.jpg", "a/hard.jpg", "a/device.jpg", "a/pipe.jpg"),
    ]
    assert read_contents(listing)[0] == ("a", b"x")


def test_hidden_members_of_tars_are_told_but_those_of_systems(tmp_path, listed):
    names = ["a/1.jpg", "./b/2.jpg", "a/._1.jpg", "__MACOSX/a/._1.jpg", "@eaDir/1.jpg", ".git/x.gz"]
    hidden = ["a/.thumbs/1.jpg", ".x.jpg", ".net/1.jpg", ".net.zip"]
    listing = listed(tar_of(tmp_path / "s.tar", dict.fromkeys([*names, *hidden, ".keep"], b"x")))
    assert list(listing.names) == names[:2]
    assert listing.classes == ("a", "b")
    assert [item.name.partition(".tar/")[2] for item in listing.rejects()] == hidden
    assert {item.reason for item in listing.rejects()} == {HIDDEN}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["a/1", "./a/1", "a//1", "b/1", "b/2", "./b/2", "c/1"]), max_size=9)
)
def test_a_member_appended_under_its_old_name_replaces_it(tmp_path_factory, names):
    """A dictionary is the oracle: the last one wins, as when a tar is unpacked."""
    folder = tmp_path_factory.mktemp("twice")
    names = ["a/0", "b/0", *names]
    members = [(f"{name}.jpg", str(place).encode()) for place, name in enumerate(names)]
    last = {os.path.normpath(name): (name[-3], data) for name, data in members}
    outer = tar_of(folder / "all.tar", members)
    inner = tar_of(folder / "c/one.tar", [("0.jpg", b"x"), ("0.jpg", b"y"), ("1.jpg", b"z")])
    tar_of(folder / "c/two.tar", {"0.jpg": b"w"})
    listing = scan(str(outer), folder / "s1", split="train")
    assert sorted(data for _, data in read_contents(listing)) == sorted(
        data for _, data in last.values()
    )
    count = len(names) - len(last)
    assert [note.split()[0] for note in listing.notes] == ([str(count)] if count else [])
    listing = scan(str(inner.parent), folder / "s2", split="train")
    assert read_contents(listing) == [("one", b"y"), ("one", b"z"), ("two", b"w")]
    assert f"as {inner}/0.jpg" in listing.notes[0]


def test_a_tar_of_many_images_in_two_batches(tmp_path, listed):
    found = {f"{'ab'[number % 2]}/{number}.jpg": b"%d" % number for number in range(20_000)}
    listing = listed(tar_of(tmp_path / "many.tar", found))
    assert list(listing.names) == list(found)
    assert listing.rows["label"].tolist() == [0, 1] * 10_000
    assert read_contents(listing)[::2500] == [
        ("a", b"%d" % number) for number in range(0, 20_000, 2500)
    ]


def test_an_image_that_went_away_is_unreadable(tmp_path, listed):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"x")
    listing = listed(tmp_path)
    (tmp_path / "a/1.jpg").unlink()
    with pytest.raises(Unreadable):
        read_contents(listing)


def test_a_listing_is_relabelled_across_its_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.sources.listing.ROWS_AT_A_TIME", 3)
    writer = ListingWriter(tmp_path, "s")
    folder = writer.container("folder", "/s")
    for name in "cabacb":
        writer.add(folder, name, [f"{writer.images}.jpg", f"{writer.images + 1}.jpg"])
    listing = writer.finish(["a", "b", "c", "d"])
    assert listing.rows["label"].tolist() == [2, 2, 0, 0, 1, 1, 0, 0, 2, 2, 1, 1]
    assert list(listing.names) == [f"{number}.jpg" for number in range(12)]
    assert np.all(listing.rows["size"] == -1)


def test_classes_of_a_tar_lie_in_one_folder(tmp_path, listed):
    """The class of y/one beside x/one and x/two could be y or one."""
    names = ("x/one/1.jpg", "x/two/2.jpg", "y/one/3.jpg")
    with pytest.raises(UsageError, match=r"has classes in /x and in /y \(y/one/3\.jpg\)"):
        listed(tar_of(tmp_path / "deep.tar", dict.fromkeys(names, b"x")))
    inside = tar_of(tmp_path / "one.tar", dict.fromkeys(("x/one/1.jpg", "./x/two/2.jpg"), b"x"))
    assert listed(inside).classes == ("one", "two")


def test_a_link_to_the_source_brings_no_other_classes_in(tmp_path, listed):
    for name in ("a", "b"):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / f"{name}.jpg").write_bytes(b"x")
    (tmp_path / "s/a/up").symlink_to(tmp_path / "s")
    (tmp_path / "s/b/top").symlink_to(tmp_path)
    found = listed(tmp_path / "s")
    assert [found.full_name(place) for place in range(len(found))] == [
        f"{tmp_path}/s/a/a.jpg",
        f"{tmp_path}/s/b/b.jpg",
    ]
