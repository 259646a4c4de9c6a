"""Names of classes become distinct; names of files tell their split."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources.classes import make_distinct
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
