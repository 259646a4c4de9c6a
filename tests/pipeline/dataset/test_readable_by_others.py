"""Other tools read what our builder makes: `webdataset`, DALI's own reader, and plain `tar`."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import wds2idx  # a module of the DALI wheel
import webdataset
from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from pipeline.dataset.manifest import Manifest
from pipeline.stream.config import StreamConfig
from pipeline.throughput.dali_reader import DaliReader
from tests.helpers.images import CLASSES, packed, rows_of

SPLITS = {"train": 48, "val": 20}


@pytest.fixture(scope="module")
def raw_data(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The validation images as a set of raw pixels."""
    out = tmp_path_factory.mktemp("raw") / "data"
    packed(out, train=image_folder / "val", samples_per_shard=10, encoding="raw")
    return out


def shards(data: Path, split: str) -> list[Path]:
    return [data / shard.name for shard in Manifest.load(data).splits[split].shards]


def indexed(data: Path, split: str) -> list[tuple[bytes, int]]:
    """Bytes and label of each sample, as our index has them."""
    tars = [path.read_bytes() for path in shards(data, split)]
    found = []
    for number, label, offset, size, _ in rows_of(data, split).tolist():
        found.append((tars[number][offset : offset + size], label))
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_webdataset_gives_every_image_and_label_in_our_order(tiny_data, split):
    paths = [str(path) for path in shards(tiny_data, split)]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False))
    assert [(one["jpg"], int(one["cls"])) for one in samples] == indexed(tiny_data, split)
    assert len({one["__key__"] for one in samples}) == len(samples) == SPLITS[split]


def test_webdataset_decodes_them(tiny_data, raw_data):
    paths = [str(path) for path in shards(tiny_data, "val")]
    for one in webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode("rgb8"):
        assert one["jpg"].shape == (256, 256, 3)
        assert one["cls"] in range(len(CLASSES))
    paths = [str(path) for path in shards(raw_data, "train")]
    decoded = list(webdataset.WebDataset(paths, shardshuffle=False, empty_check=False).decode())
    assert [(one["npy"].tobytes(), one["cls"]) for one in decoded] == indexed(raw_data, "train")


@pytest.mark.parametrize("split", SPLITS)
def test_dalis_own_reader_gives_every_image_and_label(tiny_data, split):
    """DALI reads with our `.idx`, and with the one that it makes up for itself."""
    paths = shards(tiny_data, split)
    for indices in ([str(path.with_suffix(".idx")) for path in paths], None):
        pipe = Pipeline(SPLITS[split], 1, None)
        with pipe:
            parts = fn.readers.webdataset(
                paths=[str(path) for path in paths],
                index_paths=indices,
                ext=["jpg", "cls"],
                missing_component_behavior="error",
            )
            pipe.set_outputs(*parts)
        pipe.build()
        jpegs, labels = pipe.run()
        found = [
            (np.asarray(jpegs.at(n)).tobytes(), int(bytes(labels.at(n))))
            for n in range(SPLITS[split])
        ]
        assert found == indexed(tiny_data, split)
    reader = DaliReader(tiny_data, StreamConfig(split=split, batch_size=8, threads=1))
    assert next(reader).shape == (8, 3, 224, 224)


@pytest.mark.parametrize("encoding", ["jpeg", "raw"])
def test_the_idx_files_are_what_wds2idx_writes(tiny_data, raw_data, encoding, tmp_path):
    tars = sorted((tiny_data if encoding == "jpeg" else raw_data).glob("*.tar"))
    assert len(tars) == {"jpeg": 7, "raw": 2}[encoding]
    for tar in tars:
        theirs = tmp_path / "theirs.idx"
        with wds2idx.IndexCreator(str(tar), str(theirs), verbose=False) as creator:
            creator.create_index()
        assert tar.with_suffix(".idx").read_bytes() == theirs.read_bytes()


@pytest.mark.skipif(shutil.which("tar") is None, reason="needs the tar utility")
@pytest.mark.parametrize("split", SPLITS)
def test_plain_tar_gives_every_image_and_label(tiny_data, split, tmp_path):
    for path in shards(tiny_data, split):
        subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True, capture_output=True)
    keys = sorted(path.stem for path in tmp_path.glob("*.jpg"))
    assert len(list(tmp_path.iterdir())) == 2 * SPLITS[split]
    found = [
        ((tmp_path / f"{key}.jpg").read_bytes(), int((tmp_path / f"{key}.cls").read_text()))
        for key in keys
    ]
    assert found == indexed(tiny_data, split)
    for data, _ in found:
        with Image.open(io.BytesIO(data)) as image:
            assert (image.size, image.mode) == ((256, 256), "RGB")


def test_pythons_tarfile_finds_plain_files_only(tiny_data):
    for path in tiny_data.glob("*.tar"):
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                assert member.isreg()
                assert (member.mtime, member.mode & 0o444) == (0, 0o444)
                assert Path(member.name).name == member.name
