"""Folders and tars that cannot work are refused in one line."""

from __future__ import annotations

import pytest

from pipeline.sources import scan
from pipeline.tools.errors import UsageError
from tests.helpers.images import jpeg
from tests.helpers.tars import tar_of


def _empty(tmp_path):
    return tmp_path


def _missing(tmp_path):
    return tmp_path / "nowhere"


def _class_without_images(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"x")
    (tmp_path / "b/notes.txt").write_bytes(b"x")
    return tmp_path


def _inner_tar_without_images(tmp_path):
    empty = tar_of(tmp_path / "x", {"notes.txt": b"x"}).read_bytes()
    return tar_of(tmp_path / "all.tar", {"b.tar": empty, "a/1.jpg": b"x"})


def _one_class(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"x")
    return tmp_path


def _loose_images(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"x")
    return tmp_path


def _loose_beside_classes(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "1.jpg").write_bytes(b"x")
    return tmp_path


def _loose_in_a_tar(tmp_path):
    return tar_of(tmp_path / "s.tar", {"a/1.jpg": b"x", "2.jpg": b"x"})


def _truncated_tar(tmp_path):
    whole = tar_of(tmp_path / "a.tar", {f"{n}.jpg": jpeg(n) for n in range(4)})
    whole.write_bytes(whole.read_bytes()[:900])
    return tmp_path


def _compressed_tar(tmp_path):
    tar_of(tmp_path / "a.tar", {"1.jpg": jpeg(1)}, "w:gz")
    return tmp_path


def _folder_and_tar(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"x")
    tar_of(tmp_path / "a.tar", {"1.jpg": jpeg(1)})
    return tmp_path


def _class_twice(tmp_path):
    inner = tar_of(tmp_path / "a", {"1.jpg": b"x"}).read_bytes()
    return tar_of(tmp_path / "s.tar", {"x/a.tar": inner, "y/a.tar": inner})


def _class_that_is_no_text(tmp_path):
    return tar_of(tmp_path / "s.tar", {"a/1.jpg": b"x", "b\x1b[2J/1.jpg": b"x"})


def _class_behind_a_broken_link(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to("nowhere")
    return tmp_path


def _address(tmp_path):
    return "memory://nowhere/pictures"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "is empty"),
        (_missing, "does not exist"),
        (_class_without_images, "class 'b' .* has no images"),
        (_inner_tar_without_images, "class 'b' .* has no images"),
        (_one_class, "has one class, 'a'"),
        (_loose_images, "1.jpg lies outside a class"),
        (_loose_beside_classes, "1.jpg lies outside a class"),
        (_loose_in_a_tar, "s.tar holds 2.jpg outside a class"),
        (_truncated_tar, "a.tar cannot be read"),
        (_compressed_tar, "a.tar cannot be read .*not compressed"),
        (_folder_and_tar, "'a' is both a folder and a tar"),
        (_class_twice, "holds class 'a' twice"),
        (_class_that_is_no_text, r"class name 'b\\x1b\[2J' .* is no text"),
        (_class_behind_a_broken_link, "b is a link that leads nowhere"),
        (_address, "memory://nowhere/pictures is not there, or is empty"),
    ],
)
def test_sources_that_cannot_work_are_refused_in_one_line(
    make, message, tmp_path, tmp_path_factory
):
    with pytest.raises(UsageError, match=message) as caught:
        scan(str(make(tmp_path)), tmp_path_factory.mktemp("scratch"), split="train")
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 2
