from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from pipeline.errors import UsageError
from pipeline.sources import read, scan
from tests.drawn import CLASSES, jpeg


def tar_of(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(source) -> list[tuple[str, bytes]]:
    return [(source.classes[picture.label], read(picture)) for picture in source.pictures]


def test_every_layout_gives_the_same_pictures(pictures, tmp_path):
    train = pictures / "train"
    folders = contents(scan(train))
    assert [name for name, _ in folders] == sorted(12 * list(CLASSES))

    tars = tmp_path / "tars"
    tars.mkdir()
    for name in CLASSES:
        files = sorted((train / name).iterdir())
        tar_of(tars / f"{name}.tar", {file.name: file.read_bytes() for file in files})
    assert contents(scan(tars)) == folders

    nested = tar_of(
        tmp_path / "all.tar", {path.name: path.read_bytes() for path in sorted(tars.iterdir())}
    )
    assert contents(scan(nested)) == folders

    flat = {
        f"train/{name}/{file.name}": file.read_bytes()
        for name in CLASSES
        for file in sorted((train / name).iterdir())
    }
    assert contents(scan(tar_of(tmp_path / "flat.tar", flat))) == folders


def test_links_nesting_case_and_hidden_files(tmp_path):
    (tmp_path / "s/a/deep").mkdir(parents=True)
    (tmp_path / "s/b").mkdir()
    (tmp_path / "real.jpg").write_bytes(jpeg(1))
    (tmp_path / "s/a/deep/x.JPEG").write_bytes(jpeg(2))
    (tmp_path / "s/a/link.jpg").symlink_to(tmp_path / "real.jpg")
    (tmp_path / "s/a/deep/back").symlink_to(tmp_path / "s/a")
    (tmp_path / "s/b/y.png").write_bytes(b"")
    (tmp_path / "s/b/.hidden.jpg").write_bytes(b"")
    (tmp_path / "s/b/notes.txt").write_text("not a picture")
    (tmp_path / "s/README.md").write_text("beside the classes")
    source = scan(tmp_path / "s")
    assert [Path(picture.name).name for picture in source.pictures] == [
        "x.JPEG",
        "link.jpg",
        "y.png",
    ]
    assert [Path(reject.name).name for reject in source.rejects] == ["notes.txt"]


def test_labels_of_another_split_follow_the_training_classes(pictures, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat/1.jpg").write_bytes(jpeg(1))
    source = scan(tmp_path, CLASSES)
    assert [picture.label for picture in source.pictures] == [CLASSES.index("cat")]
    with pytest.raises(UsageError, match="class 'cat', which the training source lacks"):
        scan(tmp_path, ["dog", "emu"])


def _empty(tmp_path):
    return tmp_path


def _missing(tmp_path):
    return tmp_path / "nowhere"


def _class_without_pictures(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"x")
    (tmp_path / "b/notes.txt").write_bytes(b"x")
    return tmp_path


def _one_class(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"x")
    return tmp_path


def _loose_pictures(tmp_path):
    (tmp_path / "1.jpg").write_bytes(b"x")
    return tmp_path


def _truncated_tar(tmp_path):
    whole = tar_of(tmp_path / "a.tar", {f"{n}.jpg": jpeg(n) for n in range(4)})
    whole.write_bytes(whole.read_bytes()[:-14_000])
    return tmp_path


def _compressed_tar(tmp_path):
    tar_of(tmp_path / "a.tar", {"1.jpg": jpeg(1)}, "w:gz")
    return tmp_path


def _folder_and_tar(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jpg").write_bytes(b"x")
    tar_of(tmp_path / "a.tar", {"1.jpg": jpeg(1)})
    return tmp_path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_empty, "is empty"),
        (_missing, "does not exist"),
        (_class_without_pictures, "class 'b' .* has no pictures"),
        (_one_class, "has one class, 'a'"),
        (_loose_pictures, "1.jpg lies outside a class"),
        (_truncated_tar, "a.tar cannot be read"),
        (_compressed_tar, "a.tar cannot be read .*not compressed"),
        (_folder_and_tar, "'a' is both a folder and a tar"),
    ],
)
def test_sources_that_cannot_work_are_refused_in_one_line(make, message, tmp_path):
    with pytest.raises(UsageError, match=message) as caught:
        scan(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
