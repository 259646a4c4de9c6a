"""Streams of versions of a data set: chosen, one after the other, without what was withdrawn."""

from __future__ import annotations

import itertools
import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.batches import Batch, Stream
from pipeline.dataset.image_stats import Statistics
from pipeline.dataset.manifest import Manifest, identity, version_folder
from pipeline.dataset.segments import Segment, append_version
from pipeline.remote.dataset import open_dataset
from pipeline.stream import shard_reader
from pipeline.stream.config import StreamConfig
from pipeline.stream.ledger.proof import prove
from pipeline.stream.shard_reader import ShardReader
from pipeline.tools.errors import DataError, UsageError
from tests.helpers.ledgers import change, ledgers
from tests.helpers.versions import append_samples, make_identity, withdraw

SMALL = {"batch_size": 12, "seed": 3, "threads": 1, "size": 32}


@pytest.fixture(name="data")
def grown(data: Path, more_data: Path) -> Path:
    """Append 12 samples to a copy of the tiny set of 48, as version 2."""
    append_samples(data, more_data, statistics=more_data)
    return data


def list_identities(data: Path) -> list[str]:
    """Identities of all versions, the oldest first."""
    newest = Manifest.load(data).number
    return [identity(data / version_folder(number)) for number in range(1, newest + 1)]


def make_segments(data: Path, position: int) -> tuple[Segment, ...]:
    """Segments of a run that found version 2 when it was stopped at a position."""
    one, two = list_identities(data)[:2]
    return append_version(append_version((), 0, one, 48), position, two, 60)


def read(data: Path, count: int, **settings) -> list[Batch]:
    with Stream(data, **SMALL | settings) as stream:
        return list(itertools.islice(stream, count))


def ids_of(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.ids.tolist()]


def images_of(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


def test_the_newest_is_read_or_a_version_by_number_or_identity(data, tiny_data):
    one, two = list_identities(data)
    for version, expected, samples in (
        (None, two, 60), (2, two, 60), (two, two, 60), (1, one, 48), (one[:8], one, 48),
        ("1", one, 48), ("latest", two, 60), (((one, 48, 0, 0),), one, 48),
    ):  # fmt: skip
        with Stream(data, **SMALL, version=version) as stream:
            assert (stream.data_sha256, stream.samples) == (expected, samples), version
    assert torch.equal(images_of(read(data, 5, version=1)), images_of(read(tiny_data, 5)))
    assert set(ids_of(read(data, 5))) == set(range(60))
    assert Stream.from_config(data, StreamConfig(**SMALL, version=1)).samples == 48


@pytest.mark.parametrize("version", ["xyz", 1.5, [], [1], ((make_identity(1), 5, 3, 0),), b"1"])
def test_what_names_no_version_is_refused(version):
    with pytest.raises(ValueError, match=r"version|segment") as caught:
        StreamConfig(version=version)
    assert "\n" not in str(caught.value)


def test_versions_that_do_not_exist_or_fit_are_refused(data, tiny_data):
    for version, words in (
        (3, "versions 1 to 2"),
        (0, "not version 0"),
        ("f" * 64, "no version f"),
    ):
        with pytest.raises(UsageError, match=words):
            Stream(data, **SMALL, version=version)
    with pytest.raises(ValueError, match="in a mixture name a version by its folder"):
        Stream({data: 1, tiny_data: 1}, **SMALL, version=1)
    mixture = {data / version_folder(1): 0.5, tiny_data: 0.5}
    with Stream(mixture, **SMALL) as stream:
        assert stream.samples == 96
    segments = make_segments(data, 20)
    for settings, words in (
        ({"where": {"label": 0}}, "where"), ({"weights": "balanced"}, "weights"),
        ({"split_by": {"train": 1.0}}, "split_by"), ({"labels": np.zeros(48)}, "labels"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"segments, which do not go with {words}"):
            StreamConfig(version=segments, **settings)
    wrong = (segments[0]._replace(samples=24), segments[1]._replace(position=24))
    with pytest.raises(UsageError, match="48 samples in split 'train', and its segment 24"):
        Stream(data, **SMALL, version=wrong)


def test_a_state_of_before_the_set_has_grown_is_resumed_with_its_own_version(data, tiny_data):
    with Stream(tiny_data, **SMALL) as stream:
        whole = list(itertools.islice(stream, 6))
        state = whole[2].position, stream.state_dict() | {"position": whole[2].position}
    with Stream(data, **SMALL) as stream, pytest.raises(ValueError, match="data_sha256"):
        stream.load_state_dict(state[1])
    with Stream(data, **SMALL, version=state[1]["data_sha256"]) as stream:
        stream.load_state_dict(state[1])
        again = list(itertools.islice(stream, 3))
    assert torch.equal(images_of(again), images_of(whole[3:]))


def test_a_run_goes_on_with_the_new_version_at_the_border_of_an_epoch(data, tiny_data):
    segments = make_segments(data, 20)
    assert [segment[1:] for segment in segments] == [(48, 0, 0), (60, 48, 1)]
    batches = read(data, 10, version=segments, batch_size=18)  # 48 is inside the third
    ids = ids_of(batches)
    alone = ids_of(read(tiny_data, 3, batch_size=18))[:48]
    assert ids[:48] == alone
    assert sorted(ids[48:108]) == list(range(48, 108))  # ids count on from version to version
    second = ids_of(read(data, 7, position=60, batch_size=18))  # as version 2 alone in epoch 1
    assert [i - 48 for i in ids[48:108]] == second[:60]
    with Stream(data, **SMALL | {"batch_size": 18}, version=segments, position=36) as stream:
        batch = next(stream)
        assert torch.equal(batch.images, batches[2].images)
        assert batch.labels.tolist() == batches[2].labels.tolist()
        assert stream.samples == 60
        assert stream[0].pixels.shape == stream[48].pixels.shape
        assert (stream[0].pixels == stream[48].pixels).all()  # the same image in both versions
    parts = [
        read(data, 10, version=segments, batch_size=18, rank=rank, world_size=3, prefetch=1 + rank)
        for rank in range(3)
    ]
    joined = [torch.cat([part[step].images for part in parts]) for step in range(10)]
    assert all(torch.equal(one, batch.images) for one, batch in zip(joined, batches, strict=True))


def test_pixels_stay_normalized_as_the_run_began(data, tiny_data, more_data):
    segments = make_segments(data, 20)
    means = [
        Statistics.load(one, Manifest.load(one)).channel_mean for one in (tiny_data, more_data)
    ]
    assert not np.allclose(*means)
    with Stream(data, **SMALL, version=2) as stream:
        assert (stream.channel_mean == means[1]).all()
    for once in (False, True):
        with Stream(data, **SMALL, version=segments, once=once) as stream:
            assert (stream.channel_mean == means[0]).all()
    # A pass reads the last version alone, with its own ids.
    seen = read(data, 9, version=segments, once=True)
    assert ids_of(seen) == list(range(60))
    raw = {"mean": None, "crop": "center", "dtype": "uint8", "colour": 0}
    ours, plain = (read(data, 9, once=True, version=v, **raw) for v in (segments, 2))
    assert torch.equal(images_of(ours), images_of(plain))


def test_a_state_goes_on_as_long_as_the_versions_before_it_are_the_same(data):
    early, late = make_segments(data, 20), make_segments(data, 60)
    with Stream(data, **SMALL, version=early) as stream:
        states = [stream.state_dict() | {"position": position} for position in (36, 48, 60)]
    plain = {key: value for key, value in states[0].items() if key != "segments"}
    json.dumps(states)
    with Stream(data, **SMALL, version=late) as stream:
        for state in (plain, *states[:2]):
            stream.load_state_dict(state)
        with pytest.raises(ValueError, match="from position 48 on its version was another"):
            stream.load_state_dict(states[2])


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_withdrawn_samples_are_delivered_by_no_version(data, tmp_path, shuffle):
    gone = {3, 17, 18, 50}
    before = read(data, 9, version=1, shuffle=shuffle, window=2)
    withdraw(data, gone)
    quarantine = tmp_path / "quarantine.jsonl"
    settings = {"shuffle": shuffle, "window": 2, "quarantine": quarantine}
    for version, samples in ((1, 48), (2, 60)):
        # `strict` is about damage: what was withdrawn is replaced.
        batches = read(data, samples // 12, version=version, strict=version == 2, **settings)
        ids = ids_of(batches)
        assert not gone & set(ids)
        missing = set(range(samples)) - set(ids)
        assert missing == {one for one in gone if one < samples}
        replaced = [flag for batch in batches for flag in batch.replaced.tolist()]
        assert sum(replaced) == len(missing)
    rows = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert {(row["sample"], row["reason"]) for row in rows} == {(one, "withdrawn") for one in gone}
    first = read(data, 4, version=1, shuffle=shuffle, window=2)
    for one, other in zip(before, first, strict=False):  # all else is what it was
        same = ~other.replaced
        assert torch.equal(one.images[same], other.images[same])
    with Stream(data, **SMALL) as stream:
        assert stream.samples == 56
        assert stream.damaged == {}


def test_reads_of_a_version_are_watched_where_its_shards_are(data, monkeypatch):
    watched = []
    monkeypatch.setattr(
        shard_reader, "FileAccess", lambda path: nullcontext(watched.append(Path(path)))
    )
    reader = ShardReader(open_dataset(data, version=1), "train")
    reader.read(np.arange(4))
    reader.close()
    assert len(watched) == 4
    assert all(path.is_file() for path in watched)


def test_an_evaluation_gives_withdrawn_samples_no_weight(data):
    withdraw(data, [0, 5], "val")
    (batch, *_) = read(data, 2, version=1, split="val", once=True, crop="center")
    assert batch.weights.tolist() == [0, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]
    with Stream(data, **SMALL, split="val", version=1) as stream:
        with pytest.raises(DataError, match="withdrawn; the newest version of the set is without"):
            stream[5]
        assert stream[1].id == 1


def test_withdrawn_samples_of_raw_images_are_replaced_also_when_they_are_mapped(raw_data, tmp_path):
    root = Path(shutil.copytree(raw_data, tmp_path / "raw"))
    withdraw(root, [7])
    batches = read(root, 12, version=1)  # each sample three times: mapped from the second on
    assert 7 not in ids_of(batches)
    assert sum(int(batch.replaced.sum()) for batch in batches) == 3


def run_ledger(data: Path, run: Path, segments, position: int, batches: int, world: int) -> int:
    for rank in range(world):
        settings = {"rank": rank, "world_size": world, "ledger": run / "ledger"}
        read(data, batches, version=segments, position=position, **settings)
    return position + 12 * batches


@pytest.fixture(name="two_starts")
def cut_and_grown(data: Path, tmp_path: Path) -> Path:
    """Ledgers of a run in version 1 to position 60, and again from 36 on with version 2 from 48."""
    run, (one, two) = tmp_path / "run", list_identities(data)
    run_ledger(data, run, one, 0, 5, 2)
    proof = prove(data, [run])
    assert (proof.findings, proof.epochs, proof.segments, proof.samples) == ((), (0,), (), 48)
    run_ledger(data, run, append_version((Segment(one, 48),), 36, two, 60), 36, 11, 3)
    return run


def test_a_ledger_proves_each_epoch_against_its_version(data, two_starts, tiny_data):
    proof = prove(data, [two_starts])
    assert proof.findings == ()
    assert proof.epochs == (0, 1, 2)
    assert proof.superseded == 12  # what the first start had read of version 1 beyond 48
    assert [(s.number, s.samples, s.position, s.epochs) for s in proof.segments] == [
        (1, 48, 0, (0,)), (2, 60, 48, (1, 2)),
    ]  # fmt: skip
    assert proof.summary() == (
        "epoch 0 of version 1 exactly once (1 x 48 samples), epochs 1-2 of version 2 exactly once "
        "(2 x 60 samples); 2 attempts on 2 and 3 ranks, 12 samples delivered again after restarts, "
        "all identical; 12 samples of an older version made again"
    )
    with pytest.raises(UsageError, match="of another data set"):
        prove(tiny_data, [two_starts])


def test_an_error_in_a_later_version_is_found(data, two_starts):
    files = ledgers(two_starts)
    sound = files[-1].read_bytes()
    change(files[-1], 3, 0, 1)  # the last rank's slice at 36 + 3 * 12 is in version 2
    found = {finding.kind: finding for finding in prove(data, [two_starts]).findings}
    assert found.keys() == {"twice", "never"}
    assert {finding.epoch for finding in found.values()} == {1}
    (twice,) = found["twice"].ids
    assert 48 <= twice < 108
    assert f"sample {twice} (train-" in found["twice"].reason
    files[-1].write_bytes(sound)
    change(files[-1], 3, 0, 2**32 - 48)  # an id of version 1
    kinds = {finding.kind for finding in prove(data, [two_starts]).findings}
    assert "unknown id" in kinds
    files[-1].write_bytes(sound)
    assert prove(data, [two_starts]).findings == ()
    files[-1].unlink()
    (gap,) = [one for one in prove(data, [two_starts]).findings if one.kind == "missing"]
    assert (gap.epoch, gap.position, gap.count) == (1, 56, 36)  # 44-47 are in the first start


def test_what_was_withdrawn_between_two_starts_is_replaced_in_the_second(data, tmp_path):
    run, (one, _) = tmp_path / "run", list_identities(data)
    run_ledger(data, run, one, 0, 5, 1)
    delivered = ids_of(read(data, 5, version=1))
    withdraw(data, [delivered[30], delivered[40]])  # after the checkpoint at 24
    run_ledger(data, run, one, 24, 6, 2)
    proof = prove(data, [run])
    assert proof.findings == ()
    assert (proof.epochs, proof.again) == ((0, 1), 36)
    assert proof.replaced == 4  # both, in both epochs
    first = ledgers(run)[0]
    change(first, 3, 2, 1)  # another sample that was due, and not withdrawn
    kinds = {finding.kind for finding in prove(data, [run]).findings}
    assert "replay" in kinds
