"""A version without some samples: nobody delivers them, and a purge overwrites their bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline import withdraw as command
from pipeline.batches import Stream
from pipeline.dataset.aggregates import NAME as AGGREGATES
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.index import load_index
from pipeline.dataset.manifest import NAME, Manifest, identity
from pipeline.dataset.versions import load_withdrawn, parse_withdrawn
from pipeline.describe import __main__ as describe
from pipeline.options import WithdrawOptions
from pipeline.remote.dataset import open_dataset
from pipeline.remote.target import FolderTarget, StoreTarget
from pipeline.tools.errors import DataError, UsageError
from pipeline.tools.files import sha256
from pipeline.verify import check, verify
from pipeline.withdraw import make_version
from tests.helpers.build_targets import Here, complaint, memory_address  # noqa: F401
from tests.helpers.foreign_shards import index, made_by_webdataset  # noqa: F401 - a fixture
from tests.helpers.http_servers import Server
from tests.helpers.images import folder_per_class, jpeg, packed
from tests.pipeline.packing.test_additions import add, everything, names


@pytest.fixture(scope="module", params=["jpeg", "raw"])
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("first")
    folder_per_class(root / "train", 5)
    folder_per_class(root / "val", 2, first_seed=500)
    settings = {"size": 64, "samples_per_shard": 6, "encoding": request.param}
    packed(root / "data", train=root / "train", val=root / "val", **settings)
    return root / "data"


@pytest.fixture
def data(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "data"))


def withdraw(data: object, *keys: str, **settings) -> Manifest:
    if keys:
        path = Path(settings.pop("file"))
        path.write_text("".join(f"{key}\n" for key in keys))
        settings["keys"] = path
    return make_version(WithdrawOptions(data=str(data), workers=1, **settings), pool=Here())


def test_withdrawn_samples_are_gone_from_the_index_and_listed(data, tmp_path):
    before, rows = names(data), load_index(data, "train", Manifest.load(data))
    tars = {path.name: path.read_bytes() for path in data.glob("*.tar")}
    manifest = withdraw(data, "cat/001.jpg", "dog/003.jpg", file=tmp_path / "keys")
    gone = [before.index(name) for name in ("cat/001.jpg", "dog/003.jpg")]
    assert manifest.change == {
        "withdrawn": 3,
        "withdrawn_from": {"train": 2, "val": 1},
    }  # cat/001.jpg is in val, too
    left = [name for place, name in enumerate(before) if place not in gone]
    assert names(data) == left
    after = load_index(data, "train", manifest)
    assert after["crc"].tolist() == np.delete(rows["crc"], gone).tolist()
    listed = load_withdrawn(data, manifest)
    assert sum(map(len, listed.values())) == 3
    for row in rows[gone].tolist():
        assert row[2:5] in [tuple(one) for one in listed[f"train-{row[0]:06d}.tar"]]
    assert {path.name: path.read_bytes() for path in data.glob("*.tar")} == tars
    for version in (1, 2):
        assert verify(data, decode=True, version=version) == []


def test_statistics_are_those_of_a_fresh_build_without_them(data, first, tmp_path):
    """Raw images give the same numbers, JPEGs all but what the encoding of those gone lost."""
    gone = ("cat/001.jpg", "dog/003.jpg")
    manifest = withdraw(data, *gone, file=tmp_path / "keys")
    shutil.copytree(first.parent / "train", tmp_path / "train")
    for name in gone:
        (tmp_path / "train" / name).unlink()
    packed(tmp_path / "fresh", train=tmp_path / "train", size=64, encoding=manifest.encoding)
    ours, fresh = (Statistics.load(one, Manifest.load(one)) for one in (data, tmp_path / "fresh"))
    if manifest.encoding == "raw":
        assert manifest.stats_sha256 == Manifest.load(tmp_path / "fresh").stats_sha256
    assert np.abs(ours.channel_mean - fresh.channel_mean).max() < 0.1
    assert np.abs(ours.mean_picture - fresh.mean_picture).max() < 10  # of 18 images
    assert np.abs(ours.covariance - fresh.covariance).max() < 0.01 * fresh.covariance.max()


def test_a_class_is_withdrawn_and_its_label_stays(data):
    manifest = withdraw(data, class_name="bird")
    assert manifest.classes == ("apple", "bird", "cat", "dog")
    assert manifest.change == {"withdrawn": 7, "withdrawn_from": {"train": 5, "val": 2}}
    assert set(load_index(data, "train", manifest)["label"].tolist()) == {0, 2, 3}
    assert verify(data) == []
    with pytest.raises(UsageError, match=r"'bird' of .* has no samples left"):
        withdraw(data, class_name="bird")


def test_a_purge_overwrites_the_bytes_and_nothing_else(data, tmp_path):
    rows = load_index(data, "train", Manifest.load(data))
    tars = {path.name: path.read_bytes() for path in data.glob("*.tar")}
    place = names(data).index("dog/003.jpg")
    manifest = withdraw(data, "dog/003.jpg", file=tmp_path / "keys", purge=True)
    assert sorted(manifest.purged) == sorted(load_withdrawn(data, manifest))
    shard, _, offset, size, _ = rows[place].tolist()
    name = f"train-{shard:06d}.tar"
    now = (data / name).read_bytes()
    assert now[offset : offset + size] == bytes(size)
    assert len(now) == len(tars[name])
    differ = np.flatnonzero(np.frombuffer(now, "u1") != np.frombuffer(tars[name], "u1"))
    assert set(differ.tolist()) <= set(range(offset - 2048, offset + size + 1024))
    for other in tars.keys() - manifest.purged.keys():
        assert (data / other).read_bytes() == tars[other]
    for version in (1, 2):
        assert verify(data, decode=True, version=version) == []
    (data / name).write_bytes(now.replace(b"ustar", b"ustaR", 1))
    assert verify(data, version=1) != []


def test_what_was_withdrawn_before_can_be_purged_later(data, tmp_path):
    with pytest.raises(UsageError, match="nothing was withdrawn"):
        withdraw(data, purge=True)
    withdraw(data, "dog/003.jpg", file=tmp_path / "keys")
    manifest = withdraw(data, purge=True)
    assert (manifest.number, manifest.change["withdrawn"]) == (3, 0)
    assert withdraw(data, purge=True).number == 3
    assert verify(data) == []


def test_a_purge_that_is_cut_goes_on(data, tmp_path, monkeypatch):
    create = FolderTarget.create

    @contextmanager
    def cut(self, name, *, durable=True):
        if name.endswith(".tar"):
            raise KeyboardInterrupt
        with create(self, name, durable=durable) as file:
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(FolderTarget, "create", cut)
        with pytest.raises(KeyboardInterrupt):
            withdraw(data, "dog/003.jpg", file=tmp_path / "keys", purge=True)
    report = check(data)
    assert report.damage == []
    assert report.unpurged == sorted(Manifest.load(data).purged)
    assert withdraw(data, purge=True).number == 2
    assert check(data).unpurged == []


def test_cut_before_the_end_the_old_version_is_whole(data, tmp_path, monkeypatch):
    create, text = FolderTarget.create, (data / NAME).read_bytes()

    @contextmanager
    def cut(self, name, *, durable=True):
        if name == NAME:
            raise KeyboardInterrupt
        with create(self, name, durable=durable) as file:
            yield file

    with monkeypatch.context() as patch:
        patch.setattr(FolderTarget, "create", cut)
        with pytest.raises(KeyboardInterrupt):
            withdraw(data, class_name="cat")
    assert (data / NAME).read_bytes() == text
    assert verify(data) == []
    assert withdraw(data, class_name="cat").number == 2
    assert verify(data) == []


@pytest.mark.parametrize("where", ["folder", "address"])
def test_an_image_goes_with_those_whose_place_it_took(data, first, tmp_path, memory, where):
    """A withdrawn name is withdrawn as older versions have it, too: it was replaced twice."""
    out = data
    if where == "address":
        out, target = memory, StoreTarget(memory)
        for path in first.iterdir():
            with target.create(path.name) as file:
                file.write(path.read_bytes())
    for version in (2, 3):
        new = tmp_path / f"{version}" / "dog" / "003.jpg"
        new.parent.mkdir(parents=True)
        new.write_bytes(jpeg(900 + version))
        add(out, new.parent.parent, replace=True)
    withdraw(out, "cat/000.jpg", file=tmp_path / "keys")
    manifest = withdraw(out, "dog/003.jpg", file=tmp_path / "keys", purge=True)
    read = StoreTarget(memory).read if where == "address" else lambda n: (data / n).read_bytes()
    text = read(f"{manifest.tables_in}/withdrawn.jsonl")
    listed = parse_withdrawn(text, str(manifest.withdrawn_sha256), "")
    place = names(first).index("dog/003.jpg")
    shard, _, offset, size, crc = load_index(first, "train", Manifest.load(first))[place].tolist()
    assert (offset, size, crc) in listed[f"train-{shard:06d}.tar"]
    assert read(f"train-{shard:06d}.tar")[offset : offset + size] == bytes(size)
    # of cat/000.jpg one in train and one in val, of dog/003.jpg three
    assert sum(map(len, listed.values())) == 5
    if where == "folder":
        for version in range(1, 6):
            assert verify(data, decode=True, version=version) == []


def test_withdrawn_images_are_not_added_again(data, first, tmp_path):
    withdraw(data, "dog/003.jpg", file=tmp_path / "keys")
    manifest = add(data, first.parent / "train")
    assert manifest.number == 2  # nothing but what is there, and what was withdrawn
    extra = folder_per_class(tmp_path / "extra", 1, first_seed=900)
    for path in extra.glob("*/000.jpg"):
        path.rename(path.with_name("900.jpg"))
    shutil.copy(first.parent / "train/dog/003.jpg", extra / "dog/again.jpg")
    manifest = add(data, extra)
    assert (manifest.number, manifest.change["added"], manifest.rejected) == (3, 4, 1)
    (row,) = map(json.loads, (data / manifest.tables_in / "rejects.jsonl").open())
    assert row["reason"] == "it was withdrawn from the data set"
    assert (
        load_withdrawn(data, manifest).keys()
        == load_withdrawn(data, Manifest.load(data / "versions/000002")).keys()
    )
    assert verify(data) == []


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["cat/000.jpg", "cat/999.jpg"], r"no sample cat/999\.jpg; nothing is withdrawn"),
        ([""], "names no sample"),
    ],
)
def test_a_key_that_is_not_there_withdraws_nothing(data, tmp_path, keys, words):
    text = (data / NAME).read_bytes()
    with pytest.raises(UsageError, match=words) as raised:
        withdraw(data, *keys, file=tmp_path / "keys")
    complaint(raised)
    assert (data / NAME).read_bytes() == text


def test_a_split_is_not_emptied_and_other_refusals(data, tmp_path):
    every = [*names(data)]
    with pytest.raises(UsageError, match=r"split train of .* would have no samples left"):
        withdraw(data, *every, file=tmp_path / "keys")
    with pytest.raises(UsageError, match="has no class 'cow'; give the name of one of its 4"):
        withdraw(data, class_name="cow")
    with pytest.raises(UsageError, match="holds no data set"):
        withdraw(tmp_path / "none", class_name="cat")
    with pytest.raises(UsageError, match="exclude each other"):
        withdraw(data, keys=tmp_path / "keys", class_name="cat")
    with pytest.raises(UsageError, match="name what to withdraw"):
        withdraw(data)
    (data / "train.names.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.names\.txt is damaged"):
        withdraw(data, "cat/000.jpg", file=tmp_path / "keys")
    assert Manifest.load(data).number == 1


@pytest.mark.parametrize("has_sums", [True, False])
def test_a_damaged_image_can_be_withdrawn(data, tmp_path, has_sums):
    manifest = Manifest.load(data)
    if not has_sums:
        (data / AGGREGATES).unlink()
    place = names(data).index("dog/003.jpg")
    row = load_index(data, "train", manifest)[place]
    shard = data / manifest.splits["train"].shards[row["shard"]].name
    content = bytearray(shard.read_bytes())
    content[int(row["offset"]) + int(row["size"]) // 2] ^= 255
    shard.write_bytes(content)
    manifest = withdraw(data, "dog/003.jpg", file=tmp_path / "keys")
    assert manifest.splits["train"].samples == 19
    with pytest.raises(UsageError, match="to finish a purge, give --purge alone"):
        withdraw(data, "dog/003.jpg", file=tmp_path / "keys", purge=True)
    for name in withdraw(data, purge=True).purged:
        assert sha256(data / name) == Manifest.load(data).purged[name]


def test_samples_of_another_tool_are_withdrawn_by_their_keys(made, tmp_path):
    data = Path(shutil.copytree(made, tmp_path / "data"))
    index(data)
    key = (data / "train.keys.txt").read_text().splitlines()[3]
    manifest = withdraw(data, key, file=tmp_path / "keys", purge=True)
    assert manifest.splits["train"].samples == 19
    assert key not in (data / manifest.tables_in / "train.keys.txt").read_text().splitlines()
    for version in (1, 2):
        assert verify(data, decode=True, version=version) == []
    with pytest.raises(UsageError, match="another tool"):
        add(data, made)


def test_samples_are_withdrawn_and_purged_at_an_address(memory, first, tmp_path):
    target = StoreTarget(memory)
    for path in first.iterdir():
        with target.create(path.name) as file:
            file.write(path.read_bytes())
    manifest = withdraw(memory, "dog/003.jpg", file=tmp_path / "keys", purge=True)
    data = Path(shutil.copytree(first, tmp_path / "data"))
    assert withdraw(data, "dog/003.jpg", file=tmp_path / "keys", purge=True) == manifest
    for name in manifest.purged:
        assert target.read(name) == (data / name).read_bytes()


def test_no_stream_delivers_what_was_withdrawn(data, tmp_path):
    """A stream of the version before draws other samples in their place, also after a purge."""
    gone = names(data).index("dog/003.jpg")
    settings = {"batch_size": 20, "crop": "whole", "size": 64, "mean": "channel", "version": 1}
    with Stream(data, **settings) as stream:
        assert gone in next(stream).ids.tolist()
    withdraw(data, "dog/003.jpg", file=tmp_path / "keys", purge=True)
    with Stream(data, **settings) as stream:
        batch = next(stream)
        assert gone not in batch.ids.tolist()
        assert len(batch.ids) == 20
    with Stream(data, **settings | {"version": 2}) as stream:
        assert stream.samples == 19


def test_describe_shows_the_history(data, tmp_path, capsys, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    withdraw(data, class_name="cat", purge=True)
    assert describe.main([str(data)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("version ")]
    identities = [identity(data)[:16], identity(data / "versions/000001")[:16]]
    assert [line.split()[2] for line in lines] == identities
    assert lines[0].endswith("7 withdrawn, 7 purged")
    assert "7 withdrawn, 7 purged" in Path("data-describe.html").read_text()
    assert describe.main([str(data), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [one["number"] for one in facts["versions"]] == [2, 1]


def test_the_command_reports_the_new_version(data, tmp_path, capsys):
    assert command.main([str(data), "--class", "cat", "--workers", "1", "--json"]) == 0
    out = capsys.readouterr()
    facts = json.loads(out.out)
    counts = {"train": 5, "val": 2}
    assert (facts["version"], facts["new"]) == (2, True)
    assert facts["change"] == {"withdrawn": 7, "withdrawn_from": counts}
    assert f"version 2 of {data}: class cat, 7 samples withdrawn (train 5, val 2), " in out.err


def test_the_command_tells_names_from_samples_and_what_was_purged_before(data, tmp_path, capsys):
    """A name that both splits have is one name."""
    (tmp_path / "keys").write_text("dog/000.jpg\ndog/003.jpg\n")
    arguments = [str(data), "--keys", str(tmp_path / "keys"), "--workers", "1"]
    assert command.main(arguments) == 0
    assert "2 names, 3 samples withdrawn (train 2, val 1)" in capsys.readouterr().err
    shards = len(load_withdrawn(data, Manifest.load(data)))
    for number, words in (
        (3, f"3 withdrawn samples in {shards} shards are gone, {shards} shards rewritten"),
        (3, f"3 withdrawn samples in {shards} shards were gone already, and nothing was done"),
    ):
        assert command.main([str(data), "--purge", "--workers", "1", "--json"]) == 0
        out = capsys.readouterr()
        assert (json.loads(out.out)["version"], words in out.err) == (number, True), out.err
    assert json.loads(out.out) | {"new": False, "purged": 3, "rewritten": 0} == json.loads(out.out)


def test_names_may_come_from_a_pipe(data, capsys):
    out, into = os.pipe()
    os.write(into, b"dog/003.jpg\n")
    os.close(into)
    with os.fdopen(out):
        assert command.main([str(data), "--keys", f"/dev/fd/{out}", "--workers", "1"]) == 0
    assert "1 name, 1 sample withdrawn (train 1)" in capsys.readouterr().err


def test_a_purge_does_not_take_a_damaged_shard_for_a_sound_one(data, tmp_path):
    withdraw(data, "dog/003.jpg", file=tmp_path / "keys")
    (name,) = load_withdrawn(data, Manifest.load(data))
    path, before = data / name, (data / NAME).read_bytes()
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=f"shard {name} of .* is damaged .*; nothing is withdrawn"):
        withdraw(data, purge=True)
    assert path.read_bytes() == damaged
    assert (data / NAME).read_bytes() == before


def test_a_purged_shard_of_a_store_is_sound_in_every_version(data, tmp_path):
    purged = withdraw(data, "dog/003.jpg", file=tmp_path / "keys", purge=True).purged
    first = Manifest.load(data / "versions/000001")
    shards = [one for one in first.split("train", data).shards if one.name in purged]
    with Server(data) as server:
        found = open_dataset(server.address, cache=tmp_path / "cache", version=1)
        for shard in shards:
            assert sha256(found.fetch_shard(shard)) == purged[shard.name]
            assert server.counts[shard.name] == 1, "it was taken for damaged, and fetched again"
        found.close()
    assert shards


@pytest.mark.parametrize("many", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_withdrawals_and_purges_that_are_killed(data, tmp_path, many):
    """Each version is whole at any moment; the end has the bytes of work that nobody killed."""
    keys, first = ("dog/003.jpg", "cat/000.jpg"), shutil.copytree(data, tmp_path / "first")

    def work(out: Path) -> None:
        settings = {} if Manifest.load(out).number > 1 else {"file": tmp_path / "keys"}
        withdraw(out, *(keys if settings else ()), purge=True, **settings)

    begun = time.monotonic()
    work(whole := Path(shutil.copytree(first, tmp_path / "whole")))
    seconds, expected = time.monotonic() - begun, everything(whole)
    manifests, kills, draw = {(data / NAME).read_bytes(), expected[NAME]}, 0, random.Random(0)
    while kills < many:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work(data)
                code = 0
            finally:
                os._exit(code)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
        assert (data / NAME).read_bytes() in manifests
        for version in range(1, Manifest.load(data).number + 1):
            assert verify(data, version=version) == []
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            assert everything(data) == expected
            shutil.rmtree(data)
            shutil.copytree(first, data)
    work(data)
    assert everything(data) == expected
