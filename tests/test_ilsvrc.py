"""ILSVRC2012 as it is handed out: archives of the real layout, with few pictures."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.errors import UsageError
from pipeline.sources import Listing, scan

LEAVES, SYNSETS, VALIDATION = 1000, 1860, 50_000
WNIDS = [f"n{1440764 + 7919 * (387 * place % LEAVES):08d}" for place in range(LEAVES)]
"""The synset with ILSVRC2012_ID 1, 2, 3, ...: as in the real kit, not in the order of the wnids."""
ORDER = sorted(WNIDS)
TRUTH = np.random.default_rng(0).integers(1, LEAVES + 1, VALIDATION).tolist()
SHOWN = (1, 2, 3, 48_981, 50_000)
"""The validation pictures that the archives of the tests hold."""


def words(wnid: str) -> str:
    return f"words of {wnid}, others"


def label_of(number: int) -> int:
    return ORDER.index(WNIDS[TRUTH[number - 1] - 1])


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


@pytest.fixture(scope="session")
def meta() -> bytes:
    """meta.mat in its real structure: 1860 synsets, the first 1000 at the bottom of the tree."""
    synsets = np.zeros(
        (SYNSETS, 1),
        [
            ("ILSVRC2012_ID", object),
            ("WNID", object),
            ("words", object),
            ("gloss", object),
            ("num_children", object),
            ("children", object),
            ("wordnet_height", object),
            ("num_train_images", object),
        ],
    )
    for place in range(SYNSETS):
        inner = place >= LEAVES
        wnid = f"n{90_000_000 + place:08d}" if inner else WNIDS[place]
        children = np.array([[1, 2, 3]], np.uint16) if inner else np.zeros((1, 0), np.uint8)
        synsets[place, 0] = (
            *(np.uint16(place + 1), wnid, words(wnid), "a gloss"),
            *(np.uint8(3 * inner), children, np.uint8(inner), np.uint16(0 if inner else 1300)),
        )
    file = io.BytesIO()
    savemat(file, {"synsets": synsets}, do_compression=True)
    return file.getvalue()


@pytest.fixture(scope="session")
def kit(meta) -> dict[str, bytes]:
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    return {
        "readme.txt": b"Introduction",
        "data/meta.mat": meta,
        "data/ILSVRC2012_validation_ground_truth.txt": truth,
        "data/ILSVRC2012_clsloc_validation_blacklist.txt": b"36\n50\n",
        "evaluation/demo_val.m": b"% demo",
    }


def tar_of(path: Path, members: dict[str, bytes], mode: str = "w", folders=()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=tarfile.GNU_FORMAT) as tar:
        for name in folders:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def kit_archive(folder: Path, kit: dict[str, bytes]) -> Path:
    name = "ILSVRC2012_devkit_t12"
    return tar_of(
        folder / f"{name}.tar.gz",
        {f"{name}/{inside}": data for inside, data in kit.items()},
        "w:gz",
        folders=[name, f"{name}/data"],
    )


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


def val_tar(folder: Path, numbers=SHOWN) -> Path:
    contents = {val_name(number): b"%d" % number for number in numbers}
    return tar_of(folder / "ILSVRC2012_img_val.tar", contents)


def val_folder(folder: Path, numbers=SHOWN) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / val_name(number)).write_bytes(b"%d" % number)
    return folder


def train_tar(folder: Path, wnids: list[str]) -> Path:
    """As handed out: a tar per class, in no order that matters, of `<wnid>_<number>.JPEG`."""
    inner = {}
    for wnid in wnids:
        contents = {f"{wnid}_{number}.JPEG": wnid.encode() for number in (18, 3)}
        inner[f"{wnid}.tar"] = tar_of(folder / "inner.tar", contents).read_bytes()
    (folder / "inner.tar").unlink()
    return tar_of(folder / "ILSVRC2012_img_train.tar", inner)


@pytest.fixture
def listed(tmp_path):
    count = iter(range(1000))

    def scanned(source, split="val", **options) -> Listing:
        return scan(str(source), tmp_path / f".scratch{next(count)}", split=split, **options)

    return scanned


def check_validation(listing: Listing, titles: bool) -> None:
    assert listing.classes == tuple(ORDER)
    assert listing.rows["label"].tolist() == [label_of(number) for number in SHOWN]
    assert [name.rpartition("/")[2] for name in listing.names] == [*map(val_name, SHOWN)]
    assert listing.titles == (tuple(map(words, ORDER)) if titles else None)
    assert listing.rejected == VALIDATION - len(SHOWN)
    assert next(listing.rejects()).reason.startswith("no picture: ")


@pytest.mark.parametrize("pictures", [val_tar, lambda folder: val_folder(folder / "val")])
@pytest.mark.parametrize("labels", [kit_archive, kit_folder, solution, synset_list])
def test_validation_pictures_get_their_classes_from_what_lies_beside(
    pictures, labels, kit, tmp_path, listed
):
    source = pictures(tmp_path)
    labels(tmp_path, kit)
    check_validation(listed(source), titles=labels in (kit_archive, kit_folder))


@pytest.mark.parametrize("labels", [kit_archive, kit_folder, solution, synset_list, name_list])
def test_validation_pictures_get_their_classes_from_what_is_given(labels, kit, tmp_path, listed):
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
def test_labels_inside_the_folder_of_the_pictures(labels, kit, tmp_path, listed):
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


def test_sorted_validation_pictures_need_no_truth(tmp_path, listed):
    members = {f"{wnid}/{val_name(place + 1)}": b"x" for place, wnid in enumerate(WNIDS[:4])}
    listing = listed(tar_of(tmp_path / "val.tar", members))
    assert listing.classes == tuple(sorted(WNIDS[:4]))
    with pytest.raises(UsageError, match=r"says itself of which class .* leave --val-labels x out"):
        listed(tmp_path / "val.tar", labels="x")


def test_pictures_in_a_folder_of_the_tar_are_unsorted_too(tmp_path, listed):
    source = tar_of(
        tmp_path / "v.tar", {f"./val/{val_name(number)}": b"x" for number in SHOWN}, folders=["val"]
    )
    synset_list(tmp_path)
    check_validation(listed(source), titles=False)


def test_pictures_without_a_label_are_rejected(tmp_path, listed):
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
    assert {Path(name).name: reason.partition(":")[0] for name, reason in listing.rejects()} == {
        val_name(50_001): "no label",
        "stray.JPEG": "no label",
        "notes.txt": "no picture",
        "lost.JPEG": "no regular file",
        "ILSVRC2012_val_00000004": "no picture",
    }


def test_a_kaggle_line_without_a_class_leaves_its_picture_out(tmp_path, listed):
    source = val_folder(tmp_path / "val", (1, 2, 3))
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        f"ILSVRC2012_val_00000002,{WNIDS[0]} 1 2 3 4\n"
        "ILSVRC2012_val_00000003,\n"
        f"ILSVRC2012_val_00000001,{WNIDS[1]} 1 2 3 4\n"
    )
    listing = listed(source)
    assert [listing.classes[label] for label in listing.rows["label"]] == [WNIDS[1], WNIDS[0]]
    assert [name for name, _ in listing.rejects()] == [f"{source}/{val_name(3)}"]


def test_labels_of_other_pictures_are_refused(tmp_path, listed):
    (tmp_path / "labels.txt").write_text("a.jpg cat\nb.jpg dog\n")
    with pytest.raises(UsageError, match=r"labels .*labels.txt name none of the pictures of .*a;"):
        listed(val_tar(tmp_path), labels=str(tmp_path / "labels.txt"))


def test_without_ground_truth_it_says_what_to_give(tmp_path, listed):
    for source in (val_tar(tmp_path), val_folder(tmp_path / "val")):
        with pytest.raises(
            UsageError, match=r"no ground truth .* give --val-labels FILE: ILSVRC20"
        ):
            listed(source)


def _bomb(kit):
    return {**kit, "data/meta.mat": kit["data/meta.mat"] + bytes(65 << 20)}


def _mat_bomb(kit):
    raw = zlib.compress(bytes(70 << 20), 9)
    part = (15).to_bytes(4, "little") + len(raw).to_bytes(4, "little") + raw
    return {**kit, "data/meta.mat": kit["data/meta.mat"][:128] + part}


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
