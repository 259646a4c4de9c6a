from __future__ import annotations

import io
import json
import os
import string
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.sources import webdatasets
from pipeline.sources.addresses import find, is_remote, of_split, split_of
from pipeline.sources.class_names import distinct
from pipeline.sources.listing import Listing, ListingWriter
from pipeline.sources.readers import open_reader
from pipeline.sources.shard_labels import parse
from pipeline.sources.webdatasets import is_webdataset, scan_webdataset
from tests.drawn import CLASSES, jpeg
from tests.ranges import RangeServer, s3_bucket  # noqa: F401 - a fixture
from tests.servers import QUICK

PICTURES = [jpeg(seed) for seed in range(20)]


def scan(source: str | Path, scratch: Path, split: str = "train", classes=None) -> Listing:
    return scan_webdataset(str(source), ListingWriter(scratch, str(source)), split, classes)


def contents(listing: Listing) -> list[tuple[str, bytes]]:
    """Class and bytes of each picture."""
    found = []
    readers = [open_reader(container, QUICK) for container in listing.containers]
    for place, row in enumerate(listing.rows):
        reader = readers[row["container"]]
        data = reader.read(listing.names[place], int(row["place"]), int(row["size"]))
        found.append((listing.classes[row["label"]], data))
    for reader in readers:
        reader.close()
    return found


def rejects(listing: Listing) -> dict[str, str]:
    """Name -> reason, without the folder."""
    found = {item.name.rpartition(".tar/")[2]: item.reason for item in listing.rejects()}
    assert len(found) == listing.rejected
    return found


def write_shards(folder: Path, name: str = "train-%06d.tar", **fields) -> Path:
    """Write `PICTURES` with `ShardWriter`, 8 a shard; `fields` turn a number into a value."""
    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / name)
    with wds.ShardWriter(pattern, maxcount=8, verbose=0) as writer:
        for place, data in enumerate(PICTURES):
            values = {key: make(place) for key, make in fields.items()}
            writer.write({"__key__": f"{place:05d}", "jpg": data, **values})
    return folder


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


NUMBERED = [(str(place % 4), data) for place, data in enumerate(PICTURES)]


@pytest.mark.parametrize(
    "fields",
    [
        {"cls": lambda place: place % 4},
        {"json": lambda place: {"label": place % 4, "width": 96}},
        {"json": lambda place: {"class_id": str(place % 4)}},
        {"txt": lambda place: f"{place % 4}\n"},
        {"txt": lambda place: "9", "json": lambda place: {"a": 1}, "cls": lambda place: place % 4},
    ],
)
def test_shards_of_the_formats_own_writer(tmp_path, fields):
    folder = write_shards(tmp_path / "s", **fields)
    assert is_webdataset(str(folder))
    listing = scan(folder, tmp_path / "scratch")
    assert contents(listing) == NUMBERED
    assert listing.classes == ("0", "1", "2", "3")
    assert listing.titles is None
    assert listing.rejected == 0
    assert listing.full_name(9) == f"{folder}/train-000001.tar/00009.jpg"


def test_numbers_keep_their_order_and_gaps(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place if place != 5 else 6)
    listing = scan(folder, tmp_path / "scratch")
    assert listing.classes == tuple(str(number) for number in range(20))  # not "0", "1", "10"
    assert [name for name, _ in contents(listing)][:7] == ["0", "1", "2", "3", "4", "6", "6"]


def test_words_are_classes(tmp_path):
    for name, fields in {
        "cls": {"cls": lambda place: CLASSES[place % 4].encode()},
        "json": {"json": lambda place: {"label": CLASSES[place % 4]}},
        "named": {"json": lambda place: {"class_name": CLASSES[place % 4]}},
    }.items():
        listing = scan(write_shards(tmp_path / name, **fields), tmp_path / f"scratch-{name}")
        assert contents(listing) == [
            (CLASSES[place % 4], data) for place, data in enumerate(PICTURES)
        ]
        assert listing.classes == CLASSES


def test_titles_out_of_records_beside_the_numbers(tmp_path):
    def record(place: int) -> dict[str, object]:
        return {"label": place % 4, "class_name": CLASSES[3 - place % 4]}

    for name, fields in {"both": {"cls": lambda place: place % 4, "json": record},
                         "json": {"json": record}}.items():  # fmt: skip
        listing = scan(write_shards(tmp_path / name, **fields), tmp_path / f"scratch-{name}")
        assert listing.classes == ("0", "1", "2", "3")
        assert listing.titles == tuple(reversed(CLASSES))


def test_classes_beside_the_shards(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    (folder / "classes.txt").write_text("d\nc\nb\na\n")
    listing = scan(folder, tmp_path / "one")
    assert listing.classes == ("d", "c", "b", "a")
    assert contents(listing) == [("dcba"[place % 4], data) for place, data in enumerate(PICTURES)]
    (folder / "classes.txt").write_text("d\nc\nb\n")
    with pytest.raises(UsageError, match=r"label 3 of .*00003\.jpg is no class: .* names 3"):
        scan(folder, tmp_path / "two")


def test_numbers_count_the_classes_of_the_training_set(tmp_path):
    folder = write_shards(tmp_path / "s", "%d.tar", cls=lambda place: place % 4)
    listing = scan(folder, tmp_path / "one", "val", CLASSES)
    assert listing.classes == CLASSES
    assert [name for name, _ in contents(listing)][:4] == list(CLASSES)
    with pytest.raises(UsageError, match="the training source has 3"):
        scan(folder, tmp_path / "two", "val", CLASSES[:3])


def test_a_packed_data_set_is_a_source(tiny_data, tmp_path):
    assert is_webdataset(str(tiny_data))
    listing = scan(tiny_data, tmp_path / "train")
    assert (len(listing), listing.classes) == (48, CLASSES)
    val = scan(tiny_data, tmp_path / "val", "val", listing.classes)
    assert (len(val), val.classes) == (20, CLASSES)
    one = scan(tiny_data / "val-000001.tar", tmp_path / "one")
    assert (len(one), one.classes) == (10, CLASSES)
    with pytest.raises(UsageError, match="without a split 'test'"):
        scan(tiny_data, tmp_path / "test", "test")


def test_splits_by_the_names_of_shards(tmp_path):
    write_shards(tmp_path / "s", cls=lambda place: place % 4)
    write_shards(tmp_path / "s", "validation-%06d.tar", cls=lambda place: 3 - place % 4)
    listing = scan(tmp_path / "s", tmp_path / "train")
    assert contents(listing) == NUMBERED
    val = scan(tmp_path / "s", tmp_path / "val", "val")
    assert contents(val) == [(str(3 - place % 4), data) for place, data in enumerate(PICTURES)]


def test_ranges_globs_and_single_shards(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    for number, (source, pictures) in enumerate(
        {
            f"{folder}/train-{{000000..000002}}.tar": 20,
            f"{folder}/train-{{000000,000002}}.tar": 12,
            f"{folder}/*.tar": 20,
            f"{folder}/train-00000[01].tar": 16,
            f"{folder}/train-000001.tar": 8,
            f"file://{folder}/train-000001.tar": 8,
        }.items()
    ):
        assert is_webdataset(source)
        listing = scan(source, tmp_path / f"{number}")
        assert len(listing) == pictures
        expanded = wds.shardlists.expand_urls(source)
        if "*" not in source and "[" not in source and "://" not in source:
            assert [item.address for item in listing.containers] == expanded
    with pytest.raises(UsageError, match=r"train-000003\.tar, which does not exist"):
        is_webdataset(f"{folder}/train-{{000000..000003}}.tar")
    with pytest.raises(UsageError, match="mend the braces"):
        is_webdataset(f"{folder}/train-{{000000..000003.tar")
    with pytest.raises(UsageError, match="more than 1,000,000 files"):
        is_webdataset(f"{folder}/{{000000000..999999999}}.tar")
    assert not is_webdataset(f"{folder}/nothing-*.tar")
    named = ",".join(["train-000000"] * 50)
    assert is_webdataset(f"{folder}/{{{named}}}.tar")  # longer than a name may be


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
        scan(folder, tmp_path / "scratch")


def test_samples_that_cannot_be_used(tmp_path):
    picture = PICTURES[0]
    shard = tar_of(
        tmp_path / "a.tar",
        [
            *(("ok.cls", b"1"), ("ok.jpg", picture)),
            *(("binary.cls", b"\xff\xfe\0"), ("binary.jpg", picture)),
            *(("empty.cls", b""), ("empty.jpg", picture)),
            *(("minus.cls", b"-1"), ("minus.jpg", picture)),
            *(("word.cls", b"cat"), ("word.jpg", picture)),
            *(("long.cls", b"7" * 70_000), ("long.jpg", picture)),
            *(("large.cls", b"1234567890"), ("large.jpg", picture)),
            *(("json.json", b"{" * 1000), ("json.jpg", picture)),
            *(("deep.json", b"[" * 60_000), ("deep.jpg", picture)),
            *(("list.json", b"[1]"), ("list.jpg", picture)),
            *(("true.json", b'{"label": true}'), ("true.jpg", picture)),
            *(("digits.json", b'{"label": ' + b"9" * 5000 + b"}"), ("digits.jpg", picture)),
            *(("caption.txt", b"a cat"), ("caption.jpg", picture)),
            ("bare.jpg", picture),
            ("label.cls", b"1"),
            *(("two.cls", b"1"), ("two.jpg", picture), ("two.png", picture)),
            *(("mask.cls", b"0"), ("mask.JPEG", picture), ("mask.seg.png", b"")),
            *(("dir.v1/ok.cls", b"0"), ("dir.v1/ok.webp", picture)),
            *(("late.jpg", picture), ("other.cls", b"1"), ("late.cls", b"1")),
            *((".hidden.jpg", b""), ("__meta__/x.jpg", b""), ("README", b""), ("r.md", b"")),
        ],
    )
    listing = scan(shard, tmp_path / "scratch")
    assert list(listing.names) == ["ok.jpg", "mask.JPEG", "dir.v1/ok.webp"]
    assert listing.rows["label"].tolist() == [1, 0, 0]
    assert rejects(listing) == {
        "binary.jpg": "no label: its .cls of 3 bytes holds none",
        "empty.jpg": "no label: its .cls of 0 bytes holds none",
        "minus.jpg": "no label: its .cls of 2 bytes holds none",
        "word.jpg": "no label: 'cat' is a word, unlike others",
        "long.jpg": "no label: its .cls of 70,000 bytes holds none",
        "large.jpg": "no label: its .cls of 10 bytes holds none",
        "json.jpg": "no label: its .json of 1,000 bytes holds none",
        "deep.jpg": "no label: its .json of 60,000 bytes holds none",
        "list.jpg": "no label: its .json of 3 bytes holds none",
        "true.jpg": "no label: its .json of 15 bytes holds none",
        "digits.jpg": "no label: its .json of 5,011 bytes holds none",
        "caption.jpg": "no label",
        "bare.jpg": "no label",
        "label": "no picture in the sample",
        "two.jpg": "two pictures in one sample",
        "two.png": "two pictures in one sample",
        "late.jpg": "no label",
        "other": "no picture in the sample",
        "late": "no picture in the sample",
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
    assert rejects(listing) == {"a.jpg": "no label: its .cls of 1,073,741,824 bytes holds none"}


def test_links_are_no_pictures(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, body in (("a.cls", b"0"), ("a.jpg", b"x"), ("b.cls", b"1"), ("b.jpg", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    listing = scan(path, tmp_path / "scratch")
    assert len(listing) == 2
    assert rejects(listing) == {"c.jpg": "no picture: a link"}


def test_nothing_labelled_says_so(tmp_path):
    shard = tar_of(tmp_path / "a.tar", [("a.json", b"{}"), ("a.jpg", b"x")])
    assert is_webdataset(str(shard))
    with pytest.raises(UsageError, match="has 1 pictures, none of them usable"):
        scan(shard, tmp_path / "scratch")


def test_names_that_occur_twice_are_told_apart(tmp_path):
    members = [("a.cls", b"0"), ("a.jpg", b"x"), ("b.cls", b"1"), ("b.jpg", b"x")]
    listing = scan(tar_of(tmp_path / "a.tar", members + members), tmp_path / "scratch")
    assert len(set(listing.names)) == 4


def test_a_large_shard_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(webdatasets, "SAMPLES", 3)
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    listing = scan(folder, tmp_path / "scratch")
    assert contents(listing) == NUMBERED
    assert len(listing.containers) == 3


KEYS = st.sampled_from(["a", "b", "x/a", "x.y/a", "./a", "", ".a"])
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
        ours = [sample.key for sample in webdatasets._samples(file, str(path))]
    expected = [next(names[number] for number in sorted(sample)) for sample in theirs if sample]
    if names and len({name.lower() for name in names}) == len(names):  # it refuses the same twice
        assert ours == [wds.tariterators.base_plus_ext(name)[0] for name in expected]


@given(st.sampled_from(["cls", "json", "txt"]), st.binary(max_size=200))
def test_any_bytes_are_a_label_or_none(ending, body):
    label, title = parse(ending, body)
    assert label is None or isinstance(label, str) or 0 <= label < 10**9
    for text in (label, title):
        assert not isinstance(text, str) or text.isprintable()


@given(st.recursive(st.none() | st.integers() | st.text() | st.floats() | st.booleans(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)),
       st.sampled_from(["label", "class", "target"]))  # fmt: skip
def test_any_record_has_a_label_or_none(value, name):
    label, _ = parse("json", json.dumps({name: value}).encode())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9:
        assert label == value


@given(st.lists(st.text(string.ascii_lowercase[:2] + " 0'", max_size=3), max_size=12))
def test_names_become_distinct(names):
    result = distinct(names)
    assert len(set(result)) == len(result) == len(names)
    assert all(found == name for name, found in zip(names, result, strict=True)
               if names.count(name) == 1 and name.strip())  # fmt: skip


def test_cranes_are_told_apart():
    assert distinct(("crane", "tench", "crane")) == ("crane 0", "tench", "crane 2")


def test_splits_by_name():
    names = (
        "train-00.tar",
        "imagenet-val-1.tar",
        "x/validation/00.tar",
        "trainer.tar",
        "a-test.tar",
    )
    assert [split_of(name) for name in names] == ["train", "val", "val", None, "test"]


def test_files_of_no_split_beside_others_are_refused(tmp_path):
    for name in ("train-0.tar", "extra.tar"):
        (tmp_path / name).touch()
    files = find(str(tmp_path), ".tar")
    with pytest.raises(UsageError, match=r"files of train, and others such as extra\.tar"):
        of_split(files, "train", "x")
    (tmp_path / "extra.tar").unlink()
    with pytest.raises(UsageError, match="files of train, none of val"):
        of_split(find(str(tmp_path), ".tar"), "val", "x")


@pytest.fixture(params=["memory", "http", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A store with the shards of `PICTURES`."""
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    if request.param == "http":
        with RangeServer(folder) as server:
            yield server.address
    elif request.param == "memory":
        system = fsspec.filesystem("memory")
        system.put(str(folder), "/shards", recursive=True)
        yield "memory://shards"
        system.rm("/shards", recursive=True)
    else:
        address = request.getfixturevalue("s3_bucket")
        for path in folder.iterdir():
            fsspec.filesystem("s3").put_file(str(path), f"{address}/{path.name}")
        yield address


def test_shards_of_a_store(store, tmp_path):
    assert is_remote(store)
    named = [(CLASSES[int(label)], data) for label, data in NUMBERED]
    whole = f"{store}/train-{{000000..000002}}.tar"
    assert is_webdataset(whole)
    listing = scan(whole, tmp_path / "range")
    assert contents(listing) == named
    assert listing.full_name(0) == f"{store}/train-000000.tar/00000.jpg"
    assert contents(scan(f"{store}/train-000001.tar", tmp_path / "one")) == named[8:16]
    if not store.startswith("http"):
        for number, source in enumerate((store, f"{store}/", f"{store}/*.tar")):
            assert is_webdataset(source)
            found = scan(source, tmp_path / f"{number}")
            assert contents(found) == named
            if not store.startswith("memory"):  # fsspec writes these with a third slash
                assert found.containers == listing.containers
    else:
        assert not is_webdataset(store)
        with pytest.raises(UsageError, match="a web server cannot be searched"):
            is_webdataset(f"{store}/*.tar")


def test_looking_into_a_store_is_cheap(tmp_path):
    folder = write_shards(tmp_path / "s", cls=lambda place: place % 4)
    with (folder / "train-000000.tar").open("r+b") as file:
        file.truncate(50 << 20)
    with RangeServer(folder) as server:
        assert is_webdataset(f"{server.address}/train-{{000000..000002}}.tar")
        assert sum(end - start for _, start, end in server.requests) < 100_000
