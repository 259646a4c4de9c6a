"""Kits, lists and downloads of ILSVRC2012 that will not do are named in one line."""

from __future__ import annotations

import gzip
import io

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.tools.errors import UsageError
from tests.helpers.ilsvrc import (  # noqa: F401 - fixtures
    WNIDS,
    devkit,
    kit_archive,
    scans,
    train_tar,
    val_folder,
    val_tar,
    write_2010,
)


def test_labels_of_other_images_are_refused(tmp_path, listed):
    (tmp_path / "labels.txt").write_text("a.jpg cat\nb.jpg dog\n")
    with pytest.raises(UsageError, match=r"labels .*labels.txt name none of the images of .*a;"):
        listed(val_tar(tmp_path), labels=str(tmp_path / "labels.txt"))


def test_without_ground_truth_it_says_what_to_give(tmp_path, listed):
    for source in (val_tar(tmp_path), val_folder(tmp_path / "val")):
        with pytest.raises(
            UsageError, match=r"no ground truth .* give --val-labels FILE .*: ILSVRC20"
        ):
            listed(source)


def _bomb(kit):
    return {**kit, "data/meta.mat": kit["data/meta.mat"] + bytes(65 << 20)}


def _mat_bomb(kit):
    file = io.BytesIO()
    synsets = {"words": np.zeros(70 << 20, np.uint8)}
    savemat(file, {"synsets": synsets}, do_compression=True)
    return {**kit, "data/meta.mat": file.getvalue()}


def _without(name):
    return lambda kit: {key: data for key, data in kit.items() if not key.endswith(name)}


def _truth(text):
    return lambda kit: {**kit, "data/ILSVRC2012_validation_ground_truth.txt": text}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_bomb, "unpacks to more than 64 MiB"),
        (_mat_bomb, "meta.mat: it unpacks to more than 64 MiB"),
        (_without("meta.mat"), "holds no data/meta.mat"),
        (_without("ground_truth.txt"), "lack ILSVRC2012_validation_ground_truth.txt"),
        (_truth(b"1\n2\n1001\n"), "ground_truth.txt says 1001, which is no ILSVRC2012_ID"),
        (_truth(b"1\n\n2\n"), "ground_truth.txt says .* which is no ILSVRC2012_ID"),
        (_truth(b"1\nn01440764\n"), "ground_truth.txt says .*n01440764"),
        (
            lambda kit: {**kit, "data/meta.mat": kit["data/meta.mat"][:5000]},
            "meta.mat: it is damaged",
        ),
        (lambda kit: {**kit, "data/meta.mat": b"MATLAB 5.0"}, "meta.mat: it is damaged"),
    ],
)
def test_kits_that_will_not_do_are_named_in_one_line(change, message, kit, tmp_path, listed):
    source = val_tar(tmp_path)
    kit_archive(tmp_path, change(kit))
    with pytest.raises(UsageError, match=message) as caught:
        listed(source)
    assert str(caught.value).isprintable()


def test_a_kit_that_was_cut_off(kit, tmp_path, listed):
    source = val_tar(tmp_path)
    archive = kit_archive(tmp_path, kit)
    archive.write_bytes(archive.read_bytes()[:-500])
    with pytest.raises(UsageError, match=r"devkit_t12\.tar\.gz cannot be used"):
        listed(source)
    # For training it would only have given readable names.
    assert listed(train_tar(tmp_path, WNIDS[:2]), "train").titles is None
    archive.write_bytes(gzip.compress(b"no tar"))
    with pytest.raises(UsageError, match=r"devkit_t12\.tar\.gz cannot be read"):
        listed(source)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "are empty"),
        ("ImageId,PredictionString\n", "are empty"),
        ("n01440764\n\nn01440764\n", "have a line '', which names no class"),
        ("n01440764\nx n01440764\n", "have a line 'x n01440764'"),
        ("x n01440764\nn01440764\n", "have a line 'n01440764'"),
        ("ILSVRC2012_val_00000001.JPEG 65\n", "have a line 'ILSVRC2012_val_00000001.JPEG 65'"),
        ("x ..\n", "which names no class"),
        ("x ../../etc\n", "which names no class"),
        ("x n01440764\nx.JPEG n01443537\n", "have two classes for x, 'n01440764' and 'n01443537'"),
        ("\x1b[2J \x1b[2J\n", r"have a line '\\x1b\[2J"),
    ],
)
def test_lists_that_will_not_do_are_named_in_one_line(text, message, tmp_path, listed):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        listed(val_tar(tmp_path), labels=str(tmp_path / "labels.txt"))
    assert str(caught.value).isprintable()


def test_labels_that_are_not_there(tmp_path, listed):
    source = val_tar(tmp_path)
    with pytest.raises(UsageError, match=r"labels .*nowhere do not exist; give --val-labels"):
        listed(source, labels=str(tmp_path / "nowhere"))
    (tmp_path / "void").mkdir()
    with pytest.raises(UsageError, match="void holds no labels; give --val-labels"):
        listed(source, labels=str(tmp_path / "void"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="binary is no text"):
        listed(source, labels=str(tmp_path / "binary"))


def test_a_download_without_the_split_says_so(tmp_path, listed):
    train_tar(tmp_path / "d", WNIDS[:2])
    with pytest.raises(UsageError, match=r"has no val: it holds ILSVRC2012_img_train\.tar"):
        listed(tmp_path / "d")


def test_a_ground_truth_with_fewer_lines_than_images(tmp_path, listed):
    folder = write_2010(tmp_path, test_lines=5)
    with pytest.raises(
        UsageError,
        match=r"test_ground_truth\.txt have 5 lines, and \S*test_00000006\.JPEG is image 6 of .*; "
        "give the whole file",
    ):
        listed(folder, "test", classes=sorted(WNIDS))
    kit = folder / "ILSVRC2010_devkit-1.0.tar.gz"
    kit.rename(folder / "hidden")
    with pytest.raises(UsageError, match=r"are numbers of classes, and no development kit lies"):
        listed(folder, "test", classes=sorted(WNIDS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n1001\n", r"test_ground_truth\.txt says 1001, which is no ILSVRC2010_ID"),
        ("1\n\n2\n", "which is no ILSVRC2010_ID"),
        ("1\n0\n", "says 0, which is no ILSVRC2010_ID"),
        ("1\nn01440764\n", "says .*n01440764"),
        ("\n", "are empty"),
        ("\xff\n", r"says .*\\xc3"),
    ],
)
def test_a_damaged_ground_truth_of_the_test_images(text, message, tmp_path, listed):
    folder = write_2010(tmp_path)
    (folder / "ILSVRC2010_test_ground_truth.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=message) as caught:
        listed(folder, "test", classes=sorted(WNIDS))
    assert str(caught.value).isprintable()


def test_the_kit_of_another_year_says_nothing_about_a_ground_truth(kit, tmp_path, listed):
    folder = write_2010(tmp_path)
    (folder / "data").mkdir()
    (folder / "data/meta.mat").write_bytes(kit["data/meta.mat"])
    truth = folder / "ILSVRC2010_test_ground_truth.txt"
    moved = truth.rename(folder / "data" / truth.name)
    with pytest.raises(UsageError, match=r"data is the kit of 2012, not of 2010"):
        listed(folder, "test", classes=sorted(WNIDS), labels=str(moved))
