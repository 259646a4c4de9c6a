"""ILSVRC2012 and 2010 as they are handed out: archives of the real layout, with few images."""

from __future__ import annotations

import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pipeline.sources import Listing
from pipeline.tools.errors import UsageError
from tests.helpers.ilsvrc import (  # noqa: F401
    SHOWN,
    TRUTH,
    VALIDATION,
    WNIDS,
    devkit,
    kit_archive,
    scans,
    tar_of,
    train_tar,
    val_folder,
    val_name,
    val_tar,
    words,
    write_2010,
)

ORDER = sorted(WNIDS)


def label_of(number: int) -> int:
    return ORDER.index(WNIDS[TRUTH[number - 1] - 1])


def kit_folder(folder: Path, kit: dict[str, bytes]) -> Path:
    root = folder / "ILSVRC2012_devkit_t12"
    for name, data in kit.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@cache
def solution_text() -> str:
    boxes = "85 1 499 272"
    lines = ["ImageId,PredictionString"]
    for place in np.random.default_rng(1).permutation(VALIDATION).tolist():
        wnid = WNIDS[TRUTH[place] - 1]
        lines.append(f"{val_name(place + 1)[:-5]},{wnid} {boxes} {wnid} {boxes} ")
    return "\n".join(lines) + "\n"


def solution(folder: Path, *_) -> Path:
    path = folder / "LOC_val_solution.csv"
    path.write_text(solution_text())
    return path


def synset_list(folder: Path, *_) -> Path:
    path = folder / "imagenet_2012_validation_synset_labels.txt"
    path.write_text("".join(f"{WNIDS[number - 1]}\n" for number in TRUTH))
    return path


def name_list(folder: Path, *_) -> Path:
    path = folder / "val_wnids.txt"
    path.write_text(
        "".join(
            f"{val_name(place + 1)} {WNIDS[number - 1]}\n" for place, number in enumerate(TRUTH)
        )
    )
    return path


def mapping(folder: Path) -> None:
    lines = [f"{wnid} {words(wnid)}\n" for wnid in ORDER]
    (folder / "LOC_synset_mapping.txt").write_text("".join(lines))


def check_validation(listing: Listing, titles: bool) -> None:
    assert listing.classes == tuple(ORDER)
    assert listing.rows["label"].tolist() == [label_of(number) for number in SHOWN]
    assert [name.rpartition("/")[2] for name in listing.names] == [*map(val_name, SHOWN)]
    assert listing.titles == (tuple(map(words, ORDER)) if titles else None)
    assert listing.rejected == VALIDATION - len(SHOWN)
    assert next(listing.rejects()).reason.startswith("no image: ")


@pytest.mark.parametrize("write_images", [val_tar, lambda folder: val_folder(folder / "val")])
@pytest.mark.parametrize("labels", [kit_archive, kit_folder, solution, synset_list])
def test_validation_images_get_their_classes_from_what_lies_beside(
    write_images, labels, kit, tmp_path, listed
):
    source = write_images(tmp_path)
    labels(tmp_path, kit)
    check_validation(listed(source), titles=labels in (kit_archive, kit_folder))


@pytest.mark.parametrize("labels", [kit_archive, kit_folder, solution, synset_list, name_list])
def test_validation_images_get_their_classes_from_what_is_given(labels, kit, tmp_path, listed):
    source = val_tar(tmp_path / "here")
    (tmp_path / "there").mkdir()
    given = labels(tmp_path / "there", kit)
    mapping(tmp_path / "here")
    listing = listed(source, labels=str(given))
    check_validation(listing, titles=True)
    if labels is not name_list:  # which has no name to be found by
        again = listed(source, labels=str(given.parent))
        assert again.rows.tolist() == listing.rows.tolist()


@pytest.mark.parametrize("labels", [kit_archive, kit_folder, solution, synset_list])
def test_labels_inside_the_folder_of_the_images(labels, kit, tmp_path, listed):
    source = val_folder(tmp_path / "val")
    labels(source, kit)
    mapping(source)
    check_validation(listed(source), titles=True)


def test_a_kit_beside_the_classes_is_no_class(kit, tmp_path, listed):
    for wnid in WNIDS[:2]:
        tar_of(tmp_path / "train" / f"{wnid}.tar", {f"{wnid}_1.JPEG": b"x"})
    kit_folder(tmp_path / "train", kit)
    listing = listed(tmp_path / "train", "train")
    assert listing.classes == tuple(sorted(WNIDS[:2]))
    assert listing.titles == tuple(map(words, listing.classes))


def test_the_training_archive_has_titles_from_the_kit_beside_it(kit, tmp_path, listed):
    wnids = WNIDS[::4]
    source = train_tar(tmp_path / "d", wnids)
    kit_archive(tmp_path / "d", kit)
    val_tar(tmp_path / "d")
    listing = listed(source, "train")
    assert listing.classes == tuple(sorted(wnids))
    assert listing.titles == tuple(map(words, listing.classes))
    assert len(listing) == 2 * len(wnids)
    assert listing.full_name(1) == f"{source}/{WNIDS[0]}.tar/{WNIDS[0]}_3.JPEG"
    data = source.read_bytes()
    for place in range(len(listing)):
        row = listing.rows[place]
        text = data[row["place"] :][: row["size"]].decode()
        assert text == listing.classes[row["label"]]
    # The folder of all that was downloaded is a source of both splits.
    assert listed(tmp_path / "d", "train").rows.tolist() == listing.rows.tolist()
    check_validation(listed(tmp_path / "d", classes=ORDER), titles=True)


def kaggle(root: Path, layout: str = "ILSVRC/") -> Path:
    sets = root / layout / "Data/CLS-LOC"
    for wnid in WNIDS[:3]:
        (sets / "train" / wnid).mkdir(parents=True)
        for number in (18, 3):
            (sets / "train" / wnid / f"{wnid}_{number}.JPEG").write_bytes(b"x")
    val_folder(sets / "val")
    (sets / "test").mkdir()
    (sets / "test/ILSVRC2012_test_00000001.JPEG").write_bytes(b"x")
    (root / layout / "Annotations").mkdir()
    (root / layout / "ImageSets").mkdir()
    solution(root)
    mapping(root)
    (root / "LOC_sample_submission.csv").write_text("ImageId,PredictionString\n")
    (root / "LOC_train_solution.csv").write_text("ImageId,PredictionString\n")
    return root


@pytest.mark.parametrize("layout", ["ILSVRC/", ""])
def test_kaggles_tree(layout, tmp_path, listed):
    root = kaggle(tmp_path / "kaggle", layout)
    sets = root / layout / "Data/CLS-LOC"
    for source in (root, root / layout, sets, sets / "train"):
        listing = listed(source, "train")
        assert listing.classes == tuple(sorted(WNIDS[:3]))
        assert listing.titles == tuple(map(words, listing.classes))
        assert len(listing) == 6
    for source in (root, sets / "val"):
        check_validation(listed(source, classes=ORDER), titles=True)


def test_sorted_validation_images_need_no_truth(tmp_path, listed):
    members = {f"{wnid}/{val_name(place + 1)}": b"x" for place, wnid in enumerate(WNIDS[:4])}
    listing = listed(tar_of(tmp_path / "val.tar", members))
    assert listing.classes == tuple(sorted(WNIDS[:4]))
    with pytest.raises(UsageError, match=r"says itself of which class .* leave --val-labels x out"):
        listed(tmp_path / "val.tar", labels="x")


def test_images_in_a_folder_of_the_tar_are_unsorted_too(tmp_path, listed):
    source = tar_of(
        tmp_path / "v.tar", {f"./val/{val_name(number)}": b"x" for number in SHOWN}, folders=["val"]
    )
    synset_list(tmp_path)
    check_validation(listed(source), titles=False)


def test_images_without_a_label_are_rejected(tmp_path, listed):
    source = val_folder(tmp_path / "val", (1, 2, 3, 50_001))
    (source / "stray.JPEG").write_bytes(b"x")
    (source / "notes.txt").write_bytes(b"x")
    (source / "lost.JPEG").symlink_to("nowhere")
    labels = tmp_path / "labels.txt"
    labels.write_text(f"{WNIDS[5]}\n{WNIDS[3]}\n{WNIDS[5]}\n{WNIDS[1]}\n\n")
    listing = listed(source, labels=str(labels))
    assert [listing.classes[label] for label in listing.rows["label"]] == [
        *(WNIDS[5], WNIDS[3], WNIDS[5])
    ]
    assert listing.classes == tuple(sorted((WNIDS[1], WNIDS[3], WNIDS[5])))
    found = {Path(one.name).name: one.reason.partition(":")[0] for one in listing.rejects()}
    assert found == {
        val_name(50_001): "no label",
        "stray.JPEG": "no label",
        "notes.txt": "no image",
        "lost.JPEG": "no regular file",
        "ILSVRC2012_val_00000004": "no image",
    }


def test_a_kaggle_line_without_a_class_leaves_its_image_out(tmp_path, listed):
    source = val_folder(tmp_path / "val", (1, 2, 3))
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        f"ILSVRC2012_val_00000002,{WNIDS[0]} 1 2 3 4\n"
        "ILSVRC2012_val_00000003,\n"
        f"ILSVRC2012_val_00000001,{WNIDS[1]} 1 2 3 4\n"
    )
    listing = listed(source)
    assert [listing.classes[label] for label in listing.rows["label"]] == [WNIDS[1], WNIDS[0]]
    assert [one.name for one in listing.rejects()] == [f"{source}/{val_name(3)}"]


def test_titles_from_a_list_of_words(tmp_path, listed):
    for name in (*WNIDS[:2], "n99999999"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "1.JPEG").write_bytes(b"x")
    (tmp_path / "classes.txt").write_bytes(b"\xff\xff is no text, and none of our business")
    first, second = WNIDS[:2]
    (tmp_path / "words.txt").write_text(f"{first}\ttench\n{second}\tgold\x1bfish, Carassius\n")
    listing = listed(tmp_path / "train", "train")
    named = dict(zip(listing.classes, listing.titles, strict=True))
    assert named == {first: "tench", second: "gold\\x1bfish, Carassius", "n99999999": "n99999999"}


@pytest.mark.parametrize("unpacked", [False, True])
def test_the_parts_of_2010_get_their_classes_from_its_kit_and_ground_truth(
    unpacked, kit, tmp_path, listed
):
    """The oracle reads the numbers as the kit's readme says: images by name, 1-based IDs."""
    folder = write_2010(tmp_path / "d")
    wnids = WNIDS[:4]
    train_tar(folder, wnids, "ILSVRC2010_images_train")
    kit_archive(folder, kit)  # that of 2012 beside it, with other numbers of other images
    wanted = {"val": TRUTH[:3], "test": TRUTH[3:9]}
    for part, numbers in wanted.items():
        source = folder / f"ILSVRC2010_images_{part}.tar"
        if unpacked:
            with tarfile.open(source) as tar:
                tar.extractall(folder, filter="data")
            source = folder / part
        listing = listed(source, part, classes=ORDER)
        assert [name.rpartition("/")[2] for name in listing.names] == [
            f"ILSVRC2010_{part}_{number + 1:08d}.JPEG" for number in range(len(numbers))
        ]
        found = [listing.classes[label] for label in listing.rows["label"]]
        assert found == [WNIDS[number - 1] for number in numbers]
        assert listing.titles == tuple(map(words, ORDER))
        assert listing.rejected == 0
    train = listed(folder, "train")
    assert (train.classes, train.rejected) == (tuple(sorted(wnids)), 0)
    assert train.titles == tuple(map(words, train.classes))
    assert any("patch_images.tar is not applied" in note for note in train.notes)
    # The folder of all that was downloaded is a source of the other parts, too.
    for part, numbers in wanted.items():
        assert len(listed(folder, part, classes=ORDER)) == len(numbers)


def test_labels_of_2010_can_be_given(tmp_path, listed):
    folder = write_2010(tmp_path / "d")
    test = folder / "ILSVRC2010_images_test.tar"
    elsewhere = test.rename(tmp_path / test.name)
    with pytest.raises(UsageError, match=r"^test set .* has no ground truth in or beside it; give"):
        listed(elsewhere, "test", classes=ORDER)
    truth = folder / "ILSVRC2010_test_ground_truth.txt"
    for given in (truth, folder):
        assert len(listed(elsewhere, "test", classes=ORDER, labels=str(given))) == 6
    kit = folder / "ILSVRC2010_devkit-1.0.tar.gz"
    with pytest.raises(UsageError, match=r"devkit.* name none of the images .*ILSVRC2010_val_0000"):
        listed(elsewhere, "test", classes=ORDER, labels=str(kit))
