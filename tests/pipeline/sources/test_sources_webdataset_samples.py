"""Samples of WebDataset shards that are odd, damaged, or no samples."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import tracemalloc

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset.samples import TORN, group_by_key, parse_label
from pipeline.dataset.tar import read_members
from pipeline.sources import scan as scan_all
from pipeline.sources.listing import Listing
from pipeline.sources.names import HARD_LINK, HIDDEN, LINK
from pipeline.sources.webdataset import is_webdataset
from pipeline.tools.errors import UsageError
from tests.helpers.images import CLASSES
from tests.helpers.tars import tar_of
from tests.helpers.webdatasets import IMAGES, scan, write_shards


def rejects(listing: Listing) -> dict[str, str]:
    """Name -> reason, without the folder."""
    found = {item.name.rpartition(".tar/")[2]: item.reason for item in listing.rejects()}
    assert len(found) == listing.rejected
    return found


def test_folders_of_plain_tars_are_none(tmp_path):
    for name in CLASSES:
        tar_of(tmp_path / f"{name}.tar", [(f"{name}_{i}.JPEG", b"x") for i in range(100)])
    assert not is_webdataset(str(tmp_path))
    assert not is_webdataset(str(tmp_path / "apple.tar"))
    assert not is_webdataset(str(tmp_path / "nothing"))
    assert not is_webdataset(str(tmp_path / "nothing.tar"))
    (tmp_path / "x/a").mkdir(parents=True)
    assert not is_webdataset(str(tmp_path / "x"))


def test_a_damaged_shard_is_named(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    whole = (folder / "train-000001.tar").read_bytes()
    (folder / "train-000001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        UsageError, match=r"train-000001\.tar cannot be read \(it (ends|has no end)"
    ):
        scan_all(str(folder), tmp_path / "scratch", split="train", strict=True)


def test_labels_that_cannot_be_used(tmp_path):
    image = IMAGES[0]
    shard = tar_of(
        tmp_path / "a.tar",
        [
            *(("ok.cls", b"1"), ("ok.jpg", image)),
            *(("first.cls", b"0"), ("first.jpg", image)),
            *(("binary.cls", b"\xff\xfe\0"), ("binary.jpg", image)),
            *(("empty.cls", b""), ("empty.jpg", image)),
            *(("minus.cls", b"-1"), ("minus.jpg", image)),
            *(("word.cls", b"cat"), ("word.jpg", image)),
            *(("long.cls", b"7" * 70_000), ("long.jpg", image)),
            *(("large.cls", b"1234567890"), ("large.jpg", image)),
            *(("json.json", b"{" * 1000), ("json.jpg", image)),
            *(("deep.json", b"[" * 60_000), ("deep.jpg", image)),
            *(("list.json", b"[1]"), ("list.jpg", image)),
            *(("true.json", b'{"label": true}'), ("true.jpg", image)),
            *(("digits.json", b'{"label": ' + b"9" * 5000 + b"}"), ("digits.jpg", image)),
            *(("caption.txt", b"a cat"), ("caption.jpg", image)),
            ("bare.jpg", image),
        ],
    )
    listing = scan(shard, tmp_path / "scratch")
    assert list(listing.names) == ["ok.jpg", "first.jpg"]
    assert listing.rows["label"].tolist() == [1, 0]
    fields = " (in one of label, cls, class, class_id, class_index, target)"
    assert rejects(listing) == {
        "binary.jpg": "its .cls of 3 bytes holds no label",
        "empty.jpg": "its .cls of 0 bytes holds no label",
        "minus.jpg": "its .cls of 2 bytes holds no label",
        "word.jpg": "no label: 'cat' is a word, but others are numbers, as 1",
        "long.jpg": "its .cls of 70,000 bytes holds no label",
        "large.jpg": "its .cls of 10 bytes holds no label",
        "json.jpg": f"its .json of 1,000 bytes holds no label{fields}",
        "deep.jpg": f"its .json of 60,000 bytes holds no label{fields}",
        "list.jpg": f"its .json of 3 bytes holds no label{fields}",
        "true.jpg": f"its .json of 15 bytes holds no label{fields}",
        "digits.jpg": f"its .json of 5,011 bytes holds no label{fields}",
        "caption.jpg": "it has no label (.cls or .json)",
        "bare.jpg": "it has no label (.cls or .json)",
    }


def test_the_image_of_a_sample_is_chosen_or_the_sample_rejected(tmp_path):
    image = IMAGES[0]
    shard = tar_of(
        tmp_path / "a.tar",
        [
            *(("ok.cls", b"1"), ("ok.jpg", image)),
            ("label.cls", b"1"),
            *(("two.cls", b"1"), ("two.jpg", image), ("two.jpeg", image)),
            *(("views.cls", b"1"), ("views.left.png", image), ("views.right.png", image)),
            *(("both.cls", b"1"), ("both.png", b""), ("both.jpg", image)),
            *(("dot.target.cls", b"1"), ("dot.input.jpg", image), ("dot.mask.png", b"")),
            *(("mask.cls", b"0"), ("mask.JPEG", image), ("mask.seg.png", b"")),
            *(("dir.v1/ok.cls", b"0"), ("dir.v1/ok.webp", image)),
            *(("late.jpg", image), ("other.cls", b"1"), ("late.cls", b"1")),
            *(("array.npy", b""), ("array.cls", b"1")),
            *((".hidden.jpg", b""), ("__meta__/x.jpg", b""), ("README", b""), ("r.md", b"")),
            *(("._ok.jpg", b""), ("x/._ok.jpg", b""), ("x/._ok.cls", b"")),
        ],
    )
    listing = scan(shard, tmp_path / "scratch")
    assert list(listing.names) == [
        *("ok.jpg", "both.jpg", "dot.input.jpg", "mask.JPEG", "dir.v1/ok.webp"),
    ]
    assert listing.rows["label"].tolist() == [1, 1, 1, 0, 0]
    assert rejects(listing) == {
        "label": "it has no image",
        "two.jpg": "it has several images, .jpg and .jpeg; repack with one",
        "two.jpeg": "it has several images, .jpg and .jpeg; repack with one",
        "views.left.png": "it has several images, .left.png and .right.png; repack with one",
        "views.right.png": "it has several images, .left.png and .right.png; repack with one",
        "late.jpg": TORN,
        "other": "it has no image",
        "late": TORN,
        "array": "its image is a .npy, which is not read",
        ".hidden.jpg": HIDDEN,
    }


def test_a_label_of_a_gigabyte_is_not_read(tmp_path):
    header = tarfile.TarInfo("a.cls")
    header.size = 1 << 30
    path = tmp_path / "a.tar"
    with path.open("wb") as file:  # takes no room
        file.write(header.tobuf())
        file.seek(1 << 30, os.SEEK_CUR)
        for name, body in (("a.jpg", b"x"), ("b.cls", b"0"), ("b.jpg", b"x"),
                           ("c.cls", b"1"), ("c.jpg", b"x")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(body)
            file.write(info.tobuf() + body.ljust(512, b"\0"))
        file.write(bytes(10240))
    tracemalloc.start()
    listing = scan(path, tmp_path / "scratch")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100 << 20
    assert len(listing) == 2
    assert rejects(listing) == {"a.jpg": "its .cls of 1,073,741,824 bytes holds no label"}


def test_links_are_no_images(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, body in (("a.cls", b"0"), ("a.jpg", b"x"), ("b.cls", b"1"), ("b.jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        for name, kind, target in (
            ("c.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("d.jpg", tarfile.LNKTYPE, "a.jpg"),
        ):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    listing = scan(path, tmp_path / "scratch")
    assert len(listing) == 2
    assert rejects(listing) == {"c.jpg": LINK, "d.jpg": HARD_LINK}


@pytest.mark.parametrize("ending", ["cls", "json"])
def test_labels_behind_all_images_are_told(tmp_path, ending):
    """tar writes a folder in the order of the file system unless told otherwise."""
    members = [(f"{n:03d}.jpg", b"x") for n in range(100)]
    labels = [(f"{n:03d}.{ending}", b'{"label": 1}') for n in range(100)]
    tar_of(tmp_path / "a.tar", members + labels)
    assert is_webdataset(str(tmp_path / "a.tar"))
    with pytest.raises(UsageError, match=rf"{re.escape(TORN)} \(200 times, as .*000\.jpg\)"):
        scan(tmp_path / "a.tar", tmp_path / "scratch")
    tar_of(tmp_path / "b.tar", [*members, ("article.cls", b"x"), ("c.d/x.json", b"{}")])
    assert not is_webdataset(str(tmp_path / "b.tar"))


def test_nothing_labelled_says_so(tmp_path):
    shard = tar_of(tmp_path / "a.tar", [("a.json", b"{}"), ("a.jpg", b"x")])
    assert is_webdataset(str(shard))
    with pytest.raises(UsageError, match="has 1 images, none of them usable"):
        scan(shard, tmp_path / "scratch")


def test_names_that_occur_twice_are_told_apart(tmp_path):
    members = [("a.cls", b"0"), ("a.jpg", b"x"), ("b.cls", b"1"), ("b.jpg", b"x")]
    listing = scan(tar_of(tmp_path / "a.tar", members + members), tmp_path / "scratch")
    assert len(set(listing.names)) == 4
    (note,) = listing.notes
    assert note.startswith("2 images have the name of one before in the same shard")
    assert note.endswith("a.tar/a.jpg)")


def test_files_that_are_not_used_are_counted_and_named(tmp_path):
    def record(place):
        return {"label": place % 4, "class_name": f"class {place % 4}"}

    shards = write_shards(tmp_path / "used", cls=lambda place: place % 4, json=record)
    listing = scan(shards, tmp_path / "1")
    assert listing.notes == ()  # the records name the classes
    write = {"seg.png": lambda place: b"x", "txt": lambda place: "a cat"}
    shards = write_shards(tmp_path / "s", cls=lambda place: place % 4, **write)
    tar_of(tmp_path / "s/train-9.tar", [("r.md", b""), ("._0.jpg", b""), ("__m__/x.gz", b"")])
    listing = scan(shards, tmp_path / "2")
    (note,) = listing.notes
    assert "41 files beside the images" in note
    assert ": 20 .seg.png, 20 .txt, 1 .md (as " in note
    assert note.endswith("train-000000.tar/00000.seg.png)")


KEYS = st.sampled_from(["a", "b", "x/a", "x.y/a", "./a", "", ".a", "x/", "x.y/", "x/."])
ENDINGS = st.sampled_from([".jpg", ".cls", ".PNG", ".seg.png", ".json", ".txt", "", "."])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(KEYS, ENDINGS), max_size=12))
def test_samples_are_those_of_webdataset(tmp_path_factory, parts):
    """webdataset's own splitting and grouping is the oracle."""
    names = ["".join(part) for part in parts if "".join(part)]
    files = ({"fname": name, "data": number, "__url__": ""} for number, name in enumerate(names))
    known = wds.tariterators.group_by_keys(files, handler=wds.ignore_and_continue)
    theirs = [{item for item in sample.values() if isinstance(item, int)} for sample in known]
    path = tmp_path_factory.mktemp("any") / "a.tar"
    tar_of(path, [(name, b"1") for name in names] or [("z.cls", b"")])
    with path.open("rb") as file:
        groups = group_by_key(read_members(file, str(path)))
        ours = [(key, [part.name for part in group]) for key, group in groups]
    expected = [[names[number] for number in sorted(sample)] for sample in theirs if sample]
    if names and len({name.lower() for name in names}) == len(names):  # it refuses the same twice
        assert ours == [(wds.tariterators.base_plus_ext(some[0])[0], some) for some in expected]


@given(st.sampled_from(["cls", "json", "txt"]), st.binary(max_size=200))
def test_any_bytes_are_a_label_or_none(ending, body):
    label, title = parse_label(ending, body)
    assert label is None or isinstance(label, str) or 0 <= label < 10**9
    for text in (label, title):
        assert not isinstance(text, str) or text.isprintable()


@given(st.recursive(st.none() | st.integers() | st.text() | st.floats() | st.booleans(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
       st.sampled_from(["label", "class", "target"]))  # fmt: skip
def test_any_record_has_a_label_or_none(value, name):
    label, _ = parse_label("json", json.dumps({name: value}).encode())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9:
        assert label == value
