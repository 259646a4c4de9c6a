"""The card of a data set: read back by the libraries whose formats it is written in."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from pipeline import verify
from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.dataset.manifest import Manifest
from pipeline.describe import card
from pipeline.describe.__main__ import main
from pipeline.describe.card import CROISSANT, README, render_croissant, render_readme
from pipeline.describe.facts import gather_facts
from pipeline.remote.local import LocalDataset
from pipeline.tools.errors import UsageError
from tests.helpers.http_servers import complain

RECOMMENDED = 3
"""Warnings of keys that only the owner of a set can fill in: license, date and citation."""


@pytest.fixture(autouse=True)
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the page, which is not looked at here and takes a second."""
    monkeypatch.setattr("pipeline.describe.__main__.render_page", lambda *_: "")


def describe(data: Path | str, page: Path, *more: str) -> None:
    assert main([str(data), "--card", "--out", str(page), *more]) == 0


def read_croissant(data: Path):
    mlcroissant = pytest.importorskip("mlcroissant")
    found = mlcroissant.Dataset(jsonld=str(data / CROISSANT))
    issues = found.metadata.issues
    assert (len(issues.errors), len(issues.warnings)) == (0, RECOMMENDED), issues.report()
    return found


def test_croissant_gives_the_images_and_labels_of_the_set(data, tmp_path, monkeypatch):
    pytest.importorskip("mlcroissant")
    extract = pytest.importorskip("etils.epath").Path(tmp_path / "extract")
    monkeypatch.setattr("mlcroissant._src.operation_graph.operations.extract.EXTRACT_PATH", extract)
    describe(data, tmp_path / "page.html")
    found, manifest = read_croissant(data), Manifest.load(data)
    members = {}
    for shard in manifest.splits["val"].shards:
        with tarfile.open(data / shard.name) as tar:
            members |= {one.name: tar.extractfile(one).read() for one in tar.getmembers()}
    images = {row["val/key"].decode(): row["val/image"] for row in found.records("val")}
    assert len(images) == manifest.splits["val"].samples
    assert all(one.size == (256, 256) for one in images.values())
    labels = {
        row["val-labels/key"].decode(): row["val-labels/label"]
        for row in found.records("val-labels")
    }
    assert labels == {key: int(members[f"{key}.cls"]) for key in images}
    named = [(row["classes/label"], row["classes/name"]) for row in found.records("classes")]
    assert [
        (number, getattr(name, "decode", lambda name=name: name)()) for number, name in named
    ] == list(enumerate(manifest.classes))
    files = {one["@id"]: one for one in json.loads((data / CROISSANT).read_text())["distribution"]}
    for split in manifest.splits.values():
        for shard in split.shards:
            assert files[shard.name]["sha256"] == shard.sha256
            assert files[shard.name]["contentSize"] == f"{shard.bytes} B"


def test_the_hub_reads_the_metadata(data, tmp_path, capsys):
    describe(data, tmp_path / "page.html", "--json")
    written = json.loads(capsys.readouterr().out)["card"]
    assert written == [str(data / README), str(data / CROISSANT)]
    found = pytest.importorskip("huggingface_hub").DatasetCard.load(data / README)
    assert found.data.size_categories == ["n<1K"]
    assert found.data.task_categories == ["image-classification"]
    (config,) = found.data.configs
    assert config["data_files"] == [
        {"split": "train", "path": "train-*.tar"},
        {"split": "validation", "path": "val-*.tar"},
    ]
    assert "| train | 48 | 5 |" in found.text
    assert "| 0 | apple | 12 | 5 |" in found.text
    assert str(tmp_path) not in found.text


def test_a_card_is_no_part_of_the_set_and_is_replaced_by_its_like(data, tmp_path):
    before = (data / MANIFEST).read_bytes()
    describe(data, tmp_path / "page.html")
    first = [(data / name).read_bytes() for name in (README, CROISSANT)]
    describe(data, tmp_path / "page.html")
    assert [(data / name).read_bytes() for name in (README, CROISSANT)] == first
    assert (data / MANIFEST).read_bytes() == before
    assert verify.main([str(data)]) == 0


def test_a_page_of_the_users_own_is_kept(data, tmp_path):
    (data / README).write_text("mine")
    with pytest.raises(UsageError, match="is no card that this command wrote") as raised:
        describe(data, tmp_path / "page.html")
    complain(raised)
    assert (data / README).read_text() == "mine"
    assert not (data / CROISSANT).exists()


def test_where_no_set_is_nothing_is_made(tmp_path):
    with pytest.raises(UsageError, match="is not a folder; build it"):
        describe(tmp_path / "none", tmp_path / "page.html")
    assert not (tmp_path / "none").exists()


def test_a_write_that_fails_leaves_the_card_of_before(data, tmp_path, monkeypatch):
    describe(data, tmp_path / "page.html")
    before = (data / README).read_bytes()

    def fail(*_: object) -> str:
        raise OSError("full")

    monkeypatch.setattr(card, "render_readme", fail)
    with pytest.raises(OSError, match="full"):
        describe(data, tmp_path / "page.html")
    assert (data / README).read_bytes() == before


def test_a_card_is_written_into_a_store(data, tmp_path, request):
    system = fsspec.filesystem("memory")
    system.put(str(data), "/carded/set", recursive=True)
    request.addfinalizer(lambda: system.rm("/carded", recursive=True))
    describe("memory://carded/set", tmp_path / "page.html", "--cache", str(tmp_path / "cache"))
    assert system.cat_file(f"/carded/set/{README}").startswith(b'---\npretty_name: "set"\n')
    table = json.loads(system.cat_file(f"/carded/set/{CROISSANT}"))
    assert table["url"] == "memory://carded/set"


def test_a_web_server_takes_no_card(server, tmp_path):
    with pytest.raises(UsageError, match="cards are written to folders and to object stores"):
        describe(server.address, tmp_path / "page.html", "--cache", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["raw", "foreign", "unlabelled", "withdrawn"])
def test_sets_of_other_kinds_are_valid(kind, tiny_data, raw_data, tmp_path):
    """Samples that are not known are not described."""
    source = raw_data if kind == "raw" else tiny_data
    facts = gather_facts(str(source), LocalDataset(source))
    changes = {
        "raw": {},
        "foreign": {"foreign": True},
        "unlabelled": {"classes": ()},
        "withdrawn": {"withdrawn_sha256": "0" * 64},
    }[kind]
    facts = replace(facts, manifest=replace(facts.manifest, **changes))
    (tmp_path / CROISSANT).write_text(render_croissant(facts, "set", source / MANIFEST))
    records = {one["@id"] for one in json.loads((tmp_path / CROISSANT).read_text())["recordSet"]}
    assert (
        records
        == {
            "raw": {"classes", "train", "train-labels", "val", "val-labels"},
            "foreign": {"classes"},
            "unlabelled": {"train", "val"},
            "withdrawn": {"classes"},
        }[kind]
    )
    read_croissant(tmp_path)


def test_croissant_has_the_hash_of_a_purged_shard(tiny_data):
    facts = gather_facts(str(tiny_data), LocalDataset(tiny_data))
    name = facts.splits[0].split.shards[0].name
    facts = replace(facts, manifest=replace(facts.manifest, purged={name: "0" * 64}))
    card = json.loads(render_croissant(facts, "set", tiny_data / MANIFEST))
    hashes = {one["@id"]: one.get("sha256") for one in card["distribution"]}
    assert hashes[name] == "0" * 64


def test_names_are_shown_as_they_are(tiny_data):
    facts = gather_facts(str(tiny_data), LocalDataset(tiny_data))
    classes = ("<script>x</script>", "a|b", "c\n# d", "[e](f)")
    facts = replace(facts, manifest=replace(facts.manifest, classes=classes))
    text = render_readme(facts, 'a"b: c')
    assert 'pretty_name: "a\\"b: c"' in text
    assert "| 0 | &lt;script&gt;x&lt;/script&gt; |" in text
    assert "| 1 | a\\|b |" in text
    assert "\n# d" not in text
    assert "\\[e\\](f)" in text
