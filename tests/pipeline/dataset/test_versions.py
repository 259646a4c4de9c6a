"""Versions of a data set: manifests that name their parents, found by number or identity."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset.index import INDEX_DTYPE
from pipeline.dataset.manifest import (
    NAME,
    Manifest,
    find_root,
    identity,
    tables_folder,
    version_folder,
)
from pipeline.dataset.versions import (
    WITHDRAWN,
    WithdrawnSample,
    find_version,
    find_withdrawn,
    format_withdrawn,
    list_versions,
    load_withdrawn,
    parse_version,
    read_local,
)
from pipeline.remote.dataset import open_dataset
from pipeline.tools.errors import DamagedFile, DuetError, UsageError
from tests.helpers.http_servers import Server

FIRST = "0" * 64


@pytest.fixture(name="chain")
def three_versions(data: Path, tmp_path: Path) -> Path:
    """Copy a data set, and write two more versions of it with the same samples."""
    root = tmp_path / "chain"
    root.mkdir()
    for path in data.iterdir():
        if path.is_file():
            (root / path.name).write_bytes(path.read_bytes())
    for number in (2, 3):
        add_version(root, number)
    return root


def add_version(root: Path, number: int) -> None:
    before = Manifest.load(root)
    place = version_folder(number)
    (root / version_folder(before.number)).mkdir(parents=True, exist_ok=True)
    (root / version_folder(before.number) / NAME).write_bytes((root / NAME).read_bytes())
    (root / place).mkdir()
    names = ["stats.npz", "rejects.jsonl", "duplicates.jsonl"]
    names += [f"{split}.index.npy" for split in before.splits]
    for name in names:
        text = (root / before.tables_in / name).read_bytes()
        (root / place / name).write_bytes(text)
    gone = format_withdrawn({"train-000000.tar": (WithdrawnSample(512, 10, number),)})
    (root / place / WITHDRAWN).write_bytes(gone)
    after = replace(
        before,
        number=number,
        parent=identity(root),
        tables_in=place,
        change={"added": number},
        withdrawn_sha256=hashlib.sha256(gone).hexdigest(),
    )
    after.save(root / place)
    after.save(root)


def read_chain(root: Path):
    return list(list_versions(read_local(root), str(root)))


def test_a_first_version_has_none_of_the_new_keys(data):
    table = json.loads((data / NAME).read_bytes())
    assert not {"number", "parent", "tables_in", "change", "purged"} & table.keys()
    manifest = Manifest.load(data)
    assert (manifest.number, manifest.parent, manifest.tables_in) == (1, None, "")
    assert manifest.text() == (data / NAME).read_bytes()
    assert find_root(data) == data == tables_folder(data, manifest)


def test_a_version_is_found_by_nothing_by_number_and_by_identity(chain):
    found = read_chain(chain)
    assert [one.number for one in found] == [3, 2, 1]
    read = read_local(chain)
    for one in found:
        for name in (one.number, one.identity, one.identity[:8]):
            assert find_version(read, name, "x") == one
    assert find_version(read, None, "x") == find_version(read, "latest", "x") == found[0]
    for wrong, words in (
        (4, "versions 1 to 3"),
        (0, "versions 1 to 3"),
        (FIRST, "no version 0000"),
    ):
        with pytest.raises(UsageError, match=words):
            find_version(read, wrong, "x")


def test_a_version_opens_by_its_folder_and_by_its_number(chain):
    for number in (1, 2, 3):
        folder = chain / version_folder(number)
        dataset = open_dataset(chain, version=number)
        assert dataset.root == chain == find_root(folder)
        manifest = Manifest.load(dataset.folder)
        assert manifest.number == number == Manifest.load(folder).number
        assert (tables_folder(folder, manifest) / "train.index.npy").is_file()
        shard = manifest.splits["train"].shards[0]
        assert dataset.fetch_shard(shard) == chain / shard.name
        assert dataset.list_withdrawn()["train-000000.tar"][0].crc == 3
        assert open_dataset(folder).folder == folder
    assert open_dataset(chain).folder == chain


def test_versions_open_from_a_store(chain, tmp_path):
    with Server(chain) as server:
        address = server.address
        for number in (1, 2, 3):
            one = open_dataset(address, cache=tmp_path / "cache", version=number)
            manifest = Manifest.load(one.folder)
            assert manifest.number == number
            assert (tables_folder(one.folder, manifest) / "train.index.npy").is_file()
            assert one.list_withdrawn()["train-000000.tar"][0].crc == 3
            assert one.fetch_shard(manifest.splits["train"].shards[0]).is_file()
            one.close()
        second = open_dataset(
            address, cache=tmp_path / "cache", version=identity(chain / version_folder(2))
        )
        assert Manifest.load(second.folder).number == 2
        second.close()
        with pytest.raises(UsageError, match="versions 1 to 3, not version 9"):
            open_dataset(address, cache=tmp_path / "cache", version=9)
        (chain / version_folder(1) / NAME).unlink()
        with pytest.raises(DuetError, match=r"000001/manifest\.json"):
            open_dataset(address, cache=tmp_path / "cache", version=1)


def test_a_damaged_parent_is_named(chain):
    path = chain / version_folder(1) / NAME
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"seed": ', b'"seed": 1'))
    with pytest.raises(DamagedFile, match=r"000001/manifest\.json cannot be read"):
        read_chain(chain)
    path.write_bytes((chain / version_folder(2) / NAME).read_bytes())
    with pytest.raises(DamagedFile, match="it is that of version 2"):
        find_version(read_local(chain), 1, str(chain))
    replace(Manifest.parse(text, "x"), seed=99).save(path.parent)
    with pytest.raises(DamagedFile, match="not the one that version 2 was made from"):
        read_chain(chain)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("number", 0, "not that of a version"),
        ("number", 4, "tables_in is"),
        ("parent", None, "has no parent"),
        ("tables_in", "../000003", "not the folder of version 3"),
        ("change", {"added": -1}, "change has -1 added"),
        ("purged", {"../x.tar": FIRST}, "no table of shards"),
        ("withdrawn_sha256", "zz", "not a SHA-256"),
    ],
)
def test_a_manifest_of_a_version_that_cannot_be_is_refused(chain, key, value, words):
    bad = replace(Manifest.load(chain), **{key: value})
    with pytest.raises(DamagedFile, match=words):
        Manifest.parse(bad.text() if bad.number > 1 else _with(bad, key, value), "x")


def _with(manifest: Manifest, key: str, value: object) -> bytes:
    table = json.loads(replace(manifest, number=3).text()) | {key: value}
    del table["manifest_sha256"]
    return json.dumps(table).encode()


def test_the_list_of_withdrawn_samples_is_checked(chain):
    newest = Manifest.load(chain)
    path = chain / newest.tables_in / WITHDRAWN
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DamagedFile, match="not the list that was written"):
        load_withdrawn(chain, newest)
    for line in (
        b"1\n",
        b'{"shard": "../x.tar", "samples": []}\n',
        b'{"shard": "x.tar", "samples": [[1]]}\n',
    ):
        path.write_bytes(line)
        bad = replace(newest, withdrawn_sha256=hashlib.sha256(line).hexdigest())
        with pytest.raises(DamagedFile, match="line 1 is not a row"):
            load_withdrawn(chain, bad)


def test_withdrawn_samples_are_found_in_an_index():
    rows = np.zeros(6, INDEX_DTYPE)
    rows["shard"], rows["offset"] = [0, 0, 1, 1, 2, 0], [512, 1024, 512, 1024, 512, 4096]
    gone = {
        "b.tar": (WithdrawnSample(1024, 1, 1),),
        "a.tar": (WithdrawnSample(4096, 1, 1), WithdrawnSample(7, 1, 1)),
        "other.tar": (WithdrawnSample(512, 1, 1),),
    }
    assert find_withdrawn(gone, ["a.tar", "b.tar", "c.tar"], rows).tolist() == [3, 5]
    assert find_withdrawn({}, ["a.tar"], rows).tolist() == []


@pytest.mark.parametrize(
    ("text", "version"), [("", None), ("latest", "latest"), ("12", 12), ("0123abcd", "0123abcd")]
)
def test_a_flag_names_a_version(text, version):
    assert parse_version(text, "--data-version") == version


@pytest.mark.parametrize("text", ["newest", "-1", "abc", "0123ABCD", "1.5"])
def test_another_word_is_no_version(text):
    with pytest.raises(UsageError, match=r"--data-version .* is no version"):
        parse_version(text, "--data-version")
