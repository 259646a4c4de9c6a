"""Shards in the form in which other tools write them."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.index_shards import IndexOutcome, index_folder
from pipeline.options import IndexConfig
from tests.helpers.images import jpeg, rows_of
from tests.helpers.processes import call_command

KINDS = [{}, {"subsampling": 0}, {"mode": "L"}, {"progressive": True}, {"quality": 60}]
"""JPEGs that people have: 4:2:0, 4:4:4, grey, progressive, small."""


def make_image(seed: int) -> bytes:
    return jpeg(seed, 256, 256, **KINDS[seed % len(KINDS)])


@pytest.fixture(name="made", scope="module")
def made_by_webdataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards by webdataset.ShardWriter: 20 training images in 3, 6 for validation in 1."""
    folder = tmp_path_factory.mktemp("foreign")
    for split, count, first in (("train", 20, 0), ("validation", 6, 100)):
        pattern = str(folder / f"in1k-{split}-%02d.tar")
        with webdataset.ShardWriter(pattern, maxcount=8, verbose=0) as writer:
            for n in range(count):
                key = f"{split}/n{n:05d}"
                writer.write({"__key__": key, "jpg": make_image(first + n), "cls": n % 4})
    return folder


@pytest.fixture(name="folder")
def copy_of_made(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "d"))


def index(folder: Path, **settings) -> IndexOutcome:
    return index_folder(IndexConfig(folder=str(folder), **settings))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return call_command([sys.executable, "-m", "pipeline.index_shards", *arguments])


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def flip(folder: Path, sample: int) -> None:
    """Do damage to a training image."""
    row = rows_of(folder, "train")[sample]
    with (folder / f"in1k-train-{row['shard']:02d}.tar").open("r+b") as file:
        file.seek(int(row["offset"]) + 300)
        file.write(b"!!")
