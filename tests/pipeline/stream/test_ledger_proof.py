"""Ledgers of a run prove exactly once, or name what is missing or wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.stream.ledger.proof import prove
from pipeline.stream.ledger.writer import Ledger
from pipeline.tools.errors import UsageError
from tests.helpers.ledgers import (  # noqa: F401
    N,
    about,
    attempt,
    change,
    frames,
    ledgers,
    only,
    order,
    pixels,
    sixty,
    three_attempts,
)


def test_the_summary_says_what_was_proved(run, data):
    proof = prove(data, [run])
    assert proof.findings == ()
    assert proof.summary() == (
        "epochs 0-3 exactly once (4 x 60 samples), epoch 4 to 18; 3 attempts on 2, 3 and 1 ranks, "
        "36 samples delivered again after restarts, all identical; 4 replaced"
    )
    assert proof == prove(data, [run / "ledger", run])  # the same files are counted once


def test_a_lost_file_is_named_by_attempt_and_rank(run, data):
    ledgers(run)[3].unlink()
    proof = prove(data, [run])
    missing = only(proof, "missing")
    # Rank 1 of 3 has places 4-7 of each 12; what lies below 84 was delivered before.
    assert missing.count == 4 * (168 - 84) // 12
    assert (missing.position, missing.epoch) == (88, 1)
    assert "positions 88-91, 100-103," in missing.reason
    assert "attempt 2 (from position 48, 3 ranks): rank 1 should have, and left no ledger" in (
        missing.reason
    )
    never = [finding for finding in proof.findings if finding.kind == "never"]
    assert [finding.epoch for finding in never] == [1, 2]
    assert (
        never[0].ids
        == tuple(
            sorted(
                order(N, 0, 120)[1][[p for p in range(88, 120) if (p - 48) % 12 in (4, 5, 6, 7)]]
            )
        )[:10]
    )


def test_a_lost_frame_is_named_twice(run, data):
    path = ledgers(run)[4]
    parts = frames(path)
    path.write_bytes(b"".join(parts[:6] + parts[7:]))
    proof = prove(data, [run])
    jump = only(proof, "out of line")
    assert "frame 5 holds 4 samples from position 128, but its rank was due at position 116" in (
        jump.reason
    )
    assert jump.files == (path.name,)
    missing = only(proof, "missing")
    assert (missing.position, missing.count, missing.files) == (116, 4, (path.name,))


def test_a_changed_id_is_due_twice_and_another_never(run, data):
    path = ledgers(run)[5]
    _, ids = order(N, 178, 10)
    other = int(order(N, 168, 1)[1][0])
    change(path, 1, 0, (other - int(ids[0])) % 2**32)
    proof = prove(data, [run])
    twice, never = only(proof, "twice"), only(proof, "never")
    assert (twice.epoch, twice.ids, never.ids) == (2, (other,), (int(ids[0]),))
    key = f"(train-{other // 20:06d}.tar, key {other // 20:06d}_{other % 20:05d})"
    assert f"sample {other} {key} at positions 168, 178" in twice.reason


def test_an_id_beyond_the_set_is_named(run, data):
    change(ledgers(run)[5], 1, 0, 1000)
    assert "the split has only 60 samples" in only(prove(data, [run]), "unknown id").reason


@pytest.mark.parametrize(("place", "what"), [(0, "ids"), (7, "pixels")])
def test_a_replay_that_differs_is_named_with_both_files(run, data, place, what):
    change(ledgers(run)[0], 5, place, 1)  # 6 ids, then 6 checksums, from position 60 on
    finding = only(prove(data, [run]), "replay")
    position = 60 + place % 6
    assert f"tell of other {what} at 1 position: at position {position} (epoch 1)" in finding.reason
    assert finding.files == (ledgers(run)[0].name, ledgers(run)[2 + place % 6 // 4].name)


def test_a_replacement_that_differs_is_named(tmp_path, data):
    attempt(tmp_path / "run", data, 0, 12, 1, 5, damaged=[5])
    attempt(tmp_path / "run", data, 0, 12, 1, 5)
    finding = only(prove(data, [tmp_path / "run"]), "replay")
    assert "sample 5 was due and 6 delivered, and the second time 5 and 5" in finding.reason


def test_a_rank_with_the_slice_of_another_is_named(tmp_path, data):
    facts = about(data, 0, 12, 0, 2)
    for rank in (0, 1):
        with Ledger(tmp_path / "run", replace(facts, rank=rank)) as ledger:
            for step in range(20):
                epochs, due = order(N, 12 * step, 6)
                ledger.record(12 * step, due, due, pixels(epochs, due))
    proof = prove(data, [tmp_path / "run"])
    assert "20 more" not in only(proof, "out of line").reason
    assert "frame 0 holds 6 samples from position 0, but its rank was due at position 6" in (
        only(proof, "out of line").reason
    )
    assert "rank 1 should have" in only(proof, "missing").reason


def test_a_restart_too_far_ahead_is_a_gap(tmp_path, data):
    attempt(tmp_path / "run", data, 0, 12, 2, 5)
    attempt(tmp_path / "run", data, 72, 12, 2, 5)
    missing = only(prove(data, [tmp_path / "run"]), "missing")
    assert "nobody delivered positions 60-71 (12 samples, from epoch 1 on)" in missing.reason
    assert "attempt 1 ended at 60, and attempt 2 began at 72" in missing.reason


def test_a_beginning_that_no_ledger_tells_of_is_a_gap(tmp_path, data):
    attempt(tmp_path / "run", data, 30, 12, 1, 5)
    missing = only(prove(data, [tmp_path / "run"]), "missing")
    assert "positions 0-29" in missing.reason
    assert "no ledger tells of what was before" in missing.reason


def test_a_gap_of_many_epochs_costs_nothing(tmp_path, data):
    attempt(tmp_path / "run", data, 0, 12, 2, 5)
    attempt(tmp_path / "run", data, 12 * 10**12, 12, 2, 5)
    proof = prove(data, [tmp_path / "run"])
    assert only(proof, "missing").count == 12 * 10**12 - 60
    assert proof.epochs[0] == 0


@pytest.mark.parametrize(
    "harm",
    [
        {"samples": 61},
        {"seed": 8},
        {"shuffle": "block 16"},
        {"data_sha256": "0" * 64},
        {"split": "val"},
    ],
)
def test_a_foreign_ledger_is_refused_by_name(run, data, harm):
    attempt(run / "ledger", data, 0, 12, 1, 1, **harm)
    with pytest.raises(UsageError) as error:
        prove(data, [run])
    value = str(next(iter(harm.values())))[:12]
    assert value in str(error.value)
    assert harm.keys() == {"split"} or ledgers(run)[6].name in str(error.value)


def test_where_there_is_no_ledger_the_folder_is_named(tmp_path, data):
    with pytest.raises(UsageError, match=r"nowhere holds no ledger"):
        prove(data, [tmp_path / "nowhere"])


def test_ranks_stopped_in_the_midst_of_a_step_are_no_gap(run, data):
    attempt(run / "ledger", data, 258, 12, 3, [4, 3, 4])
    proof = prove(data, [run])
    assert proof.findings == ()
    # Batches from 258, 270, 282, 294; of the last one rank 1 lacks 298-301.
    assert (proof.position, proof.unfinished) == (298, 4)
    assert "4 samples of the last batches on some ranks only" in proof.summary()
    attempt(run / "ledger", data, 306, 12, 3, 1)  # but nobody may go on from beyond them
    assert only(prove(data, [run]), "missing").count == 4


def test_a_rank_that_lags_far_behind_is_a_gap(run, data):
    attempt(run / "ledger", data, 258, 12, 3, [14, 3, 14])
    assert "attempt 4 (from position 258, 3 ranks): rank 1 should have" in (
        only(prove(data, [run]), "missing").reason
    )


def test_pixels_of_other_devices_are_not_compared(run, data):
    attempt(run / "ledger", data, 240, 12, 2, 3, device="gpu", damaged=[5])
    attempt(run / "ledger", data, 252, 12, 2, 2, device="gpu", damaged=[5])
    proof = prove(data, [run])
    assert proof.findings == ()
    assert (proof.again, proof.compared) == (36 + 18 + 24, 36 + 24)
    assert "the pixels of 18 were made otherwise, and not compared" in proof.summary()
    change(ledgers(run)[9], 0, 6, 1)  # a GPU's checksum differs from the other GPU's
    assert "pixels" in only(prove(data, [run]), "replay").reason


def test_lists_are_cut_and_the_rest_is_counted(tmp_path, data):
    for start in range(0, 12 * 40, 24):
        attempt(tmp_path / "run", data, start, 12, 1, 1)
    proof = prove(data, [tmp_path / "run"])
    kinds = [finding.kind for finding in proof.findings]
    assert kinds.count("missing") == 10
    assert "9 more of the kind 'missing'" in [finding.reason for finding in proof.findings]
