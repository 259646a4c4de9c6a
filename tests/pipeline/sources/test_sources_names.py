"""Names of classes become distinct and ordered; names of files tell their split."""

from __future__ import annotations

import string
import unicodedata

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.dataset.samples import Classes, number_classes, sort_classes
from pipeline.sources import scan
from pipeline.sources.classes import LabelMapper, make_distinct
from pipeline.sources.paths import detect_split, find_files, select_split
from pipeline.tools.errors import UsageError


@given(st.lists(st.text(string.ascii_lowercase[:2] + " 0'", max_size=3), max_size=12))
def test_names_become_distinct(names):
    result = make_distinct(names)
    assert len(set(result)) == len(result) == len(names)
    assert all(found == name for name, found in zip(names, result, strict=True)
               if names.count(name) == 1 and name.strip())  # fmt: skip


def test_cranes_are_told_apart():
    assert make_distinct(("crane", "tench", "crane")) == ("crane 0", "tench", "crane 2")


def test_splits_by_name():
    names = (
        "train-00.tar",
        "imagenet-val-1.tar",
        "x/validation/00.tar",
        "trainer.tar",
        "a-test.tar",
    )
    assert [detect_split(name) for name in names] == ["train", "val", "val", None, "test"]


def test_files_of_no_split_beside_others_are_refused(tmp_path):
    for name in ("train-0.tar", "extra.tar"):
        (tmp_path / name).touch()
    files = find_files(str(tmp_path), ".tar")
    with pytest.raises(UsageError, match=r"files of train, and others such as extra\.tar"):
        select_split(files, "train", "x")
    (tmp_path / "extra.tar").unlink()
    with pytest.raises(UsageError, match="files of train, none of val"):
        select_split(find_files(str(tmp_path), ".tar"), "val", "x")


@given(st.sets(st.integers(0, 3000), min_size=1, max_size=30), st.booleans())
def test_names_of_digits_sort_as_numbers(numbers, padded):
    names = [f"{number:04d}" if padded else str(number) for number in numbers]
    ordered = sort_classes(names)
    assert [int(name) for name in ordered] == sorted(numbers)
    places = number_classes(ordered)
    assert all(int(ordered[places[number]]) == number for number in numbers)
    assert sort_classes([*names, "x"]) == sorted([*names, "x"])
    assert number_classes(sorted(names)) == {int(n): i for i, n in enumerate(sorted(names))}


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (("ant", "bee"), {0: 0, 1: 1}),
        (("0", "1", "other"), {0: 0, 1: 1, 2: 2}),
        (("0.0", "1.0", "10.0", "2.0"), {0: 0, 1: 1, 10: 2, 2: 3}),
        (("1", "2", "other"), None),
        (("1", "01"), None),
        (("2", "1", "1.0"), None),
    ],
)
def test_what_a_number_means_among_names(names, places):
    assert number_classes(names) == places


NAMES = st.sampled_from(["0", "1", "2", "3", "10", "01", "1.0", "cat", "dog", "2x"])


@given(st.sets(NAMES, min_size=2), st.integers(0, 11), st.booleans())
def test_a_number_never_means_another_class_than_the_one_of_its_name(names, label, numbered):
    classes = sort_classes(names)
    try:
        found = LabelMapper("s", None, classes, numbered=numbered).find_class(label, "x")
    except UsageError:
        return
    there = classes[label : label + 1]
    assert found in {str(label), f"0{label}", f"{label}.0", *there}
    assert found == str(label) or str(label) not in classes
    assert not numbered or [found] == there


def test_unicode_forms_of_a_name_are_one_class(tmp_path):
    composed, taken_apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    for split, name in (("train", composed), ("val", taken_apart)):
        for folder in (name, "the"):
            (tmp_path / split / folder).mkdir(parents=True)
            (tmp_path / split / folder / "1.jpg").write_bytes(b"x")
    train = scan(str(tmp_path / "train"), tmp_path / "a", split="train")
    val = scan(str(tmp_path / "val"), tmp_path / "b", split="val", classes=train.classes)
    assert val.classes == train.classes == (composed, "the")
    assert sorted(val.rows["label"]) == [0, 1]
    assert Classes((taken_apart, "the")).find_number(composed) == 0
    (tmp_path / "train" / taken_apart).mkdir()
    (tmp_path / "train" / taken_apart / "1.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"'cafe\\u0301' and 'caf\\xe9' .* the same name in two"):
        scan(str(tmp_path / "train"), tmp_path / "c", split="train")
    with pytest.raises(UsageError, match="the same name in two Unicode forms"):
        Classes.from_labels([[composed, "the"], [taken_apart]])


def test_a_class_of_nearly_the_same_name_is_pointed_out(tmp_path):
    for name in ("Cat", "dog"):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / "1.jpg").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"class 'Cat', which .* lacks \(it has 'cat'\)"):
        scan(str(tmp_path / "s"), tmp_path / "a", split="val", classes=("cat", "dog"))


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    """A folder `set [1]` of shards, and one that its name would mean as a pattern."""
    names = ("set [1]/train-00.tar", "set [1]/train-[1].tar", "set 1/train-00.tar")
    if request.param == "memory":
        memory = fsspec.filesystem("memory")
        for name in names:
            memory.pipe_file(f"/brackets/{name}", b"")
        return "memory://brackets"
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return str(tmp_path)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("set [1]", ["set [1]/train-00.tar", "set [1]/train-[1].tar"]),
        ("set [1]/train-00.tar", ["set [1]/train-00.tar"]),
        ("set [1]/train-[1].tar", ["set [1]/train-[1].tar"]),
        ("set [1]/*0.tar", ["set [1]/train-00.tar"]),
        ("set [1]/train-{00..00}.tar", ["set [1]/train-00.tar"]),
        ("set [1-9]/train-0?.tar", ["set 1/train-00.tar"]),
        ("set [2]/train-0?.tar", None),
    ],
)
def test_brackets_of_a_name_are_no_pattern(source, found, place):
    files = find_files(f"{place}/{source}", ".tar")
    names = files and [name.removeprefix("memory://").lstrip("/") for name in files.addresses]
    root = place.removeprefix("memory://").lstrip("/")
    assert names == (found and [f"{root}/{name}" for name in found])


def test_the_host_of_an_address_is_no_pattern():
    for address in ("http://[::1]:80/a.tar", "http://[::1]/set [1]/a[2].tar"):
        assert find_files(address, ".tar").addresses == (address,)
    many = find_files("http://[::1]:80/set/train-{0..2}.tar", ".tar")
    assert many.addresses == tuple(f"http://[::1]:80/set/train-{n}.tar" for n in range(3))
    with pytest.raises(UsageError, match="cannot be searched"):
        find_files("http://[::1]:80/set/train-*.tar", ".tar")


def test_a_file_address_is_unquoted(tmp_path):
    (tmp_path / "my set").mkdir()
    (tmp_path / "my set" / "train-0.tar").touch()
    for start in ("file://", "FILE://", "file://localhost"):
        files = find_files(f"{start}{tmp_path}/my%20set", ".tar")
        assert files.addresses == (f"{tmp_path}/my set/train-0.tar",)
