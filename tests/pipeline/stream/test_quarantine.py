"""The quarantine file lists each damaged sample once, over restarts and processes."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.batches import Stream
from pipeline.tools.errors import DataError, UsageError
from tests.helpers.damage import (  # noqa: F401
    BAD,
    BATCHES,
    CUT,
    FLIPPED,
    SAMPLES,
    UNDECODABLE,
    ZEROED,
    six_damaged,
    taken,
    undecodable,
)


def test_strict_stops_at_what_an_earlier_run_has_listed(data, tmp_path):
    undecodable(data, 5)
    for strict in (False, True):
        options = {"quarantine": tmp_path / "q.jsonl", "strict": strict}
        with Stream(data, batch_size=SAMPLES, **options) as stream:
            if strict:
                with pytest.raises(DataError, match="sample 5 "):
                    next(stream)
            else:
                assert next(stream).replaced.sum() == 1


def test_a_list_moved_away_is_begun_anew_and_a_wrong_place_refused(damaged, tmp_path):
    path = tmp_path / "q.jsonl"
    with Stream(damaged, batch_size=1, once=True, quarantine=path, threads=1) as stream:
        while not path.exists():
            next(stream)
        path.unlink()
        list(stream)
    assert all(json.loads(row)["split"] == "train" for row in path.read_text().splitlines())
    for wrong in (tmp_path, tmp_path / "none" / "q.jsonl"):
        with pytest.raises(UsageError, match="another"):
            Stream(damaged, quarantine=wrong)


def test_each_damaged_sample_is_listed_once_with_its_reason(damaged, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    for _ in range(2):  # a restart
        streams = [
            Stream(damaged, batch_size=24, rank=rank, world_size=2, quarantine=path)
            for rank in range(2)
        ]
        for stream in streams:
            with stream:
                taken(stream, BATCHES)
    rows = {row["sample"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert len(path.read_text().splitlines()) == len(rows)
    assert set(rows) == BAD
    assert {row["split"] for row in rows.values()} == {"train"}
    assert rows[FLIPPED]["shard"] == "train-000001.tar"
    assert rows[FLIPPED]["key"] == "000001_00003"
    assert rows[FLIPPED]["reason"] == rows[ZEROED]["reason"] == "CRC-32 differs"
    assert rows[CUT[1]]["reason"] == "the shard ends before it does"
    assert "cannot be decoded" in rows[UNDECODABLE]["reason"]


def test_a_list_cut_short_by_a_kill_is_mended_and_a_strange_one_refused(damaged, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    path.write_text('{"split": "train", "sam')
    with Stream(damaged, batch_size=SAMPLES, quarantine=path) as stream:
        taken(stream, 1)
    assert {json.loads(row)["sample"] for row in path.read_text().splitlines()} == BAD
    path.write_text("hello\n")
    with pytest.raises(UsageError, match=r"quarantine\.jsonl is no list of damaged samples"):
        Stream(damaged, quarantine=path)


def test_damage_that_was_mended_is_no_damage(damaged, tiny_data, tmp_path):
    path = tmp_path / "quarantine.jsonl"
    with Stream(damaged, batch_size=SAMPLES, quarantine=path) as stream:
        taken(stream, 1)
    for shard in ("train-000001.tar", "train-000002.tar", "train-000004.tar"):
        shutil.copy(tiny_data / shard, damaged)
    with Stream(damaged, batch_size=SAMPLES, quarantine=path) as stream:
        (batch,) = taken(stream, 1)
    assert batch.replaced.sum() == 1
    assert set(stream.damaged) == {UNDECODABLE}
