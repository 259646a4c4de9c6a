"""The archives, kits and lists of ILSVRC2012 and 2010 in their real layout, with few images."""

from __future__ import annotations

import io
import tarfile
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from pipeline.sources import Listing, scan
from tests.helpers import tars

tar_of = partial(tars.tar_of, format=tarfile.GNU_FORMAT)

LEAVES, SYNSETS, VALIDATION = 1000, 1860, 50_000
WNIDS = [f"n{1440764 + 7919 * (387 * place % LEAVES):08d}" for place in range(LEAVES)]
"""The synset with ILSVRC2012_ID 1, 2, 3, ...: as in the real kit, not in the order of the wnids."""
TRUTH = np.random.default_rng(0).integers(1, LEAVES + 1, VALIDATION).tolist()
SHOWN = (1, 2, 3, 48_981, 50_000)
"""The validation images that the archives of the tests hold."""


def words(wnid: str) -> str:
    return f"words of {wnid}, others"


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


@cache
def meta(year: str = "2012") -> bytes:
    """Return meta.mat in its real structure: 1860 synsets, of which the first 1000 are leaves.

    That of 2010 has 1676 and, beside them, costs of mistakes.
    """
    count = SYNSETS if year == "2012" else 1676
    synsets = np.zeros(
        (count, 1),
        [
            (f"ILSVRC{year}_ID", object),
            ("WNID", object),
            ("words", object),
            ("gloss", object),
            ("num_children", object),
            ("children", object),
            ("wordnet_height", object),
            ("num_train_images", object),
        ],
    )
    for place in range(count):
        inner = place >= LEAVES
        wnid = f"n{90_000_000 + place:08d}" if inner else WNIDS[place]
        children = np.array([[1, 2, 3]], np.uint16) if inner else np.zeros((1, 0), np.uint8)
        synsets[place, 0] = (
            *(np.uint16(place + 1), wnid, words(wnid), "a gloss"),
            *(np.uint8(3 * inner), children, np.uint8(inner), np.uint16(0 if inner else 1300)),
        )
    file = io.BytesIO()
    costs = {} if year == "2012" else {"cost_matrix": np.zeros((LEAVES, LEAVES), np.uint8)}
    savemat(file, {"synsets": synsets} | costs, do_compression=True)
    return file.getvalue()


def write_2010(folder: Path, test_lines: int = 6) -> Path:
    """Write the downloads of ILSVRC-2010 but for the training images: three of each part."""
    truth = "".join(f"{number}\n" for number in TRUTH[:3]).encode()
    kit = {"readme.txt": b"x", "data/meta.mat": meta("2010"), "data/cost.txt": b"x"}
    kit |= {"data/ILSVRC2010_validation_ground_truth.txt": truth}
    members = {f"devkit-1.0/{name}": data for name, data in kit.items()}
    tar_of(folder / "ILSVRC2010_devkit-1.0.tar.gz", members, "w:gz", folders=["devkit-1.0"])
    lines = "".join(f"{number}\n" for number in TRUTH[3 : 3 + test_lines])
    (folder / "ILSVRC2010_test_ground_truth.txt").write_text(lines)
    for part, count in (("val", 3), ("test", 6)):
        names = (f"{part}/ILSVRC2010_{part}_{number + 1:08d}.JPEG" for number in range(count))
        contents = {name: name.encode() for name in names}
        tar_of(folder / f"ILSVRC2010_images_{part}.tar", contents, folders=[part])
    tar_of(folder / "patch_images.tar", {"patch_images/test/a.JPEG": b"x"})
    return folder


@pytest.fixture(name="kit")
def devkit() -> dict[str, bytes]:
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    return {
        "readme.txt": b"Introduction",
        "data/meta.mat": meta(),
        "data/ILSVRC2012_validation_ground_truth.txt": truth,
        "data/ILSVRC2012_clsloc_validation_blacklist.txt": b"36\n50\n",
        "evaluation/demo_val.m": b"% demo",
    }


def kit_archive(folder: Path, kit: dict[str, bytes]) -> Path:
    name = "ILSVRC2012_devkit_t12"
    return tar_of(
        folder / f"{name}.tar.gz",
        {f"{name}/{inside}": data for inside, data in kit.items()},
        "w:gz",
        folders=[name, f"{name}/data"],
    )


def val_tar(folder: Path, numbers=SHOWN) -> Path:
    contents = {val_name(number): b"%d" % number for number in numbers}
    return tar_of(folder / "ILSVRC2012_img_val.tar", contents)


def val_folder(folder: Path, numbers=SHOWN) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / val_name(number)).write_bytes(b"%d" % number)
    return folder


def train_tar(folder: Path, wnids: list[str], name: str = "ILSVRC2012_img_train") -> Path:
    """Write the archive as it is handed out: a tar of `<wnid>_<number>.JPEG` per class."""
    inner = {}
    for wnid in wnids:
        contents = {f"{wnid}_{number}.JPEG": wnid.encode() for number in (18, 3)}
        inner[f"{wnid}.tar"] = tar_of(folder / "inner.tar", contents).read_bytes()
    (folder / "inner.tar").unlink()
    return tar_of(folder / f"{name}.tar", inner)


@pytest.fixture(name="listed")
def scans(tmp_path):
    count = iter(range(1000))

    def scanned(source, split="val", **options) -> Listing:
        return scan(str(source), tmp_path / f".scratch{next(count)}", split=split, **options)

    return scanned
