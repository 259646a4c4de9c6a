"""Names beside classes and shards, and sources of more than one kind: used, told, or refused."""

from __future__ import annotations

import itertools

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources import Listing, scan
from pipeline.sources.names import (
    ARCHIVE,
    NO_IMAGE,
    is_archive,
    is_document,
    is_hidden,
    is_image,
    is_system,
)
from pipeline.tools.errors import UsageError
from tests.helpers.images import jpeg
from tests.helpers.tars import tar_of
from tests.helpers.webdatasets import write_shards

ARCHIVES = ("cat.tar.gz", "cat.zip", "cat.TGZ", "cat.tar.zst", "cat.7z", "readme.tar.xz")
BYSTANDERS = (
    *("README", "README.md", "LICENSE.txt", ".DS_Store", "._ant.tar", "00000_stats.json"),
    *("train-000.idx", "notes.txt", "LOC_val_solution.csv", ".gitattributes", "Thumbs.db"),
    *("__MACOSX/ant/._1.jpg", ".git/x.jpg", "@eaDir/1.jpg", ".ipynb_checkpoints/1-checkpoint.jpg"),
    "ILSVRC2012_devkit_t12.tar.gz",
)


@pytest.fixture
def listed(tmp_path_factory):
    def scanned(source, split="train", **options) -> Listing:
        return scan(str(source), tmp_path_factory.mktemp("scratch"), split=split, **options)

    return scanned


def put(folder, *names, data=b"x"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def class_tars(folder):
    for name in ("ant", "bee"):
        tar_of(folder / f"{name}.tar", {f"{name}_{n}.JPEG": b"x" for n in range(3)})
    return folder


def class_folders(folder):
    return put(folder, "ant/1.jpg", "bee/1.jpg", "bee/2.jpg")


def shards(folder):
    return write_shards(folder, cls=lambda place: place % 4)


def splits(folder):
    class_folders(folder / "train")
    class_folders(folder / "val")
    return folder


@pytest.mark.parametrize("make", [class_tars, class_folders, shards, splits])
def test_an_archive_is_refused_by_name_and_bystanders_are_passed_over(make, tmp_path, listed):
    source = put(make(tmp_path / "s"), *BYSTANDERS)
    assert listed(source).rejected == 0
    for name in ARCHIVES:
        put(source, name)
        with pytest.raises(UsageError, match=rf"{name} (lies beside|is an archive)"):
            listed(source)
        (source / name).unlink()
    put(source, "data.bin")
    assert [(item.name, item.reason) for item in listed(source).rejects()] == [
        (f"{source}/data.bin", NO_IMAGE if make != shards else
         "it lies beside WebDataset shards, and is not read")
    ]  # fmt: skip


def test_tars_in_capital_letters_are_classes(tmp_path, listed):
    (class_tars(tmp_path) / "bee.tar").rename(tmp_path / "bee.TAR")
    assert listed(tmp_path).classes == ("ant", "bee")
    inner = {name: (tmp_path / name).read_bytes() for name in ("ant.tar", "bee.TAR")}
    assert listed(tar_of(tmp_path / "x/all.tar", inner)).classes == ("ant", "bee")
    put(tmp_path, "bee/1.jpg")
    with pytest.raises(UsageError, match="'bee' is both a folder and a tar"):
        listed(tmp_path)


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_inside_a_tar(name, tmp_path, listed):
    inner = tar_of(tmp_path / "ant.tar", {"1.jpg": b"x"}).read_bytes()
    for folder in ("", "train/"):
        members = {f"{folder}ant.tar": inner, f"{folder}bee.tar": inner, f"{folder}{name}": b"x"}
        with pytest.raises(UsageError, match=f"holds {folder}{name}, an archive"):
            listed(tar_of(tmp_path / "all.tar", members))
    members = {"ant/1.jpg": b"x", "bee/1.jpg": b"x", f"bee/{name}": b"x", "notes": b"", "x.md": b""}
    listing = listed(tar_of(tmp_path / "all.tar", members))
    assert [item.reason for item in listing.rejects()] == [ARCHIVE, NO_IMAGE]


def test_a_hidden_class_is_refused(tmp_path, listed):
    source = put(class_folders(tmp_path), ".net/1.jpg", ".tools/notes.txt")
    with pytest.raises(UsageError, match=r"/\.net begins with a dot, .*; rename it"):
        listed(source)


def test_a_compressed_shard_of_the_other_split_does_not_matter(tmp_path, listed):
    put(shards(tmp_path), "val-000.tar.gz")
    assert len(listed(tmp_path)) == 20
    put(tmp_path, "train-999.tar.gz")
    with pytest.raises(UsageError, match=r"train-999\.tar\.gz lies beside WebDataset shards"):
        listed(tmp_path)
    with pytest.raises(UsageError, match=r"train-999\.tar\.gz lies beside WebDataset shards"):
        listed(f"{tmp_path}/train-{{000000.tar,999.tar.gz}}")


def table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_files_without_images_are_no_source(tmp_path, listed):
    """img2dataset leaves tables of metadata beside its shards."""
    table(shards(tmp_path / "s") / "00000.parquet", url=["http://x"], label=[1])
    assert len(listed(tmp_path / "s")) == 20
    table(class_folders(tmp_path / "f") / "00000.parquet", url=["http://x"], label=[1])
    assert len(listed(tmp_path / "f")) == 3
    for path in ("p/0.parquet", "q/data/0.parquet"):
        table(tmp_path / path, url=["http://x"], label=[1])
        with pytest.raises(UsageError, match=r"0\.parquet has no column of images"):
            listed(tmp_path / path.partition("/")[0])


def test_sources_of_two_kinds_are_refused_by_both_names(tmp_path, listed):
    def parquet(folder):
        table(folder / "0.parquet", image=[b"x", b"y"], label=[0, 1])
        return folder

    def plain(folder):
        tar_of(folder / "zebra.tar", {f"{n}.jpg": b"x" for n in range(3)})
        return folder

    kinds = {shards: r"train-000000\.tar", parquet: r"0\.parquet", class_folders: "ant/1.jpg"}
    for number, (one, other) in enumerate(itertools.combinations(kinds, 2)):
        one(other(tmp_path / f"{number}"))
        with pytest.raises(UsageError) as caught:
            listed(tmp_path / f"{number}")
        for kind in (one, other):
            assert pytest.raises(UsageError, match=kinds[kind]).matches(caught.value), caught.value
    plain(shards(tmp_path / "tars"))
    with pytest.raises(UsageError, match=r"\(train-000000\.tar\) and tars .* \(zebra\.tar\)"):
        listed(f"{tmp_path}/tars/*.tar")


def test_the_first_tar_decides_nothing_alone(tmp_path, listed):
    source = shards(tmp_path)
    tar_of(source / "train-.tar", {})
    tar_of(source / "train--.tar", {"README": b"x"})
    tar_of(source / "train---.tar", [(f"{n}.jpg", b"x") for n in range(80)] + [("0.cls", b"0")])
    listing = listed(source)
    assert len(listing) == 20
    assert listing.rejected == 81


def test_a_refusal_says_what_the_source_was_taken_for(tmp_path, listed):
    with pytest.raises(UsageError, match=r"one class, 'ant'.* was taken for a folder of classes"):
        listed(put(tmp_path / "one", "ant/1.jpg"))
    shard = tar_of(tmp_path / "a.tar", [("a.json", b"{}"), ("a.jpg", b"x")])
    with pytest.raises(UsageError, match=r"none of them usable.* was taken for WebDataset shards"):
        listed(shard)


def test_a_tar_that_the_manifest_lacks_is_rejected(tiny_data, tmp_path, listed):
    for path in (*tiny_data.glob("*.tar"), tiny_data / "manifest.json"):
        put(tmp_path, path.name, data=path.read_bytes())
    put(tmp_path, "extra.tar", data=(tmp_path / "train-000000.tar").read_bytes())
    listing = listed(tmp_path)
    assert len(listing) == 48
    assert [item.name for item in listing.rejects()] == [f"{tmp_path}/extra.tar"]


def test_jfif_is_an_image(tmp_path, listed):
    put(tmp_path, "ant/1.jfif", "bee/2.JFIF", data=jpeg(1))
    assert listed(tmp_path).rejected == 0


@given(st.text("a.-_/AZ", max_size=6), st.sampled_from([".tar", ".tar.gz", ".zip", ".TAR", ".Gz"]))
def test_an_archive_is_never_a_bystander(stem, ending):
    name = f"{stem}{ending}"
    assert is_archive(name)
    assert not is_document(name)
    assert not is_image(name)
    assert not is_system(name) or "._" in name


@given(st.text("._a/", max_size=8))
def test_system_names_are_hidden_ones_or_known(name):
    assert is_hidden(name) or not is_system(name)
