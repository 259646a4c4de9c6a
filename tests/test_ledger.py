from __future__ import annotations

import errno
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import zlib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import verify
from pipeline.errors import DataError, SetupError, UsageError
from pipeline.ledger.checksum import crc32_each, weighted_sums
from pipeline.ledger.file import encode, scan
from pipeline.ledger.proof import exactly_once
from pipeline.ledger.proof.exactly_once import prove
from pipeline.ledger.writer import About, Ledger
from pipeline.manifest import Manifest, Shard, Split, identity

HEAD = struct.Struct("<IIQII")  # as the docstring of ledger_file has it
N = 60


def data_set(folder: Path, samples: int, shard: int = 20) -> Path:
    """A manifest and nothing else: more is not read."""
    sizes = [min(shard, samples - first) for first in range(0, samples, shard)]
    shards = tuple(
        Shard(name=f"train-{k:06d}.tar", samples=size, bytes=1, sha256="", idx_sha256="")
        for k, size in enumerate(sizes)
    )
    folder.mkdir(exist_ok=True)
    Manifest(
        splits={"train": Split(shards=shards, index_sha256="")},
        classes=("a",),
        seed=0,
        sources={},
        plan="",
        stats_sha256="",
    ).save(folder)
    return folder


def about(data: Path, position: int, batch: int, rank: int, world: int, **other) -> About:
    samples = Manifest.load(data).splits["train"].samples
    fixed = {"split": "train", "seed": 7, "shuffle": "full", "view": "random", "colour": 0.1}
    facts = {"data_sha256": identity(data), "samples": samples, "device": "cpu", **fixed, **other}
    return About(position=position, batch_size=batch, rank=rank, world_size=world, **facts)


def order(samples: int, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and ids at [position, position + count), by any permutation an epoch."""
    epochs, places = np.divmod(np.arange(position, position + count), samples)
    orders = {e: np.random.default_rng(int(e)).permutation(samples) for e in np.unique(epochs)}
    return epochs, np.array([orders[e][p] for e, p in zip(epochs, places, strict=True)], np.int64)


def pixels(epochs: np.ndarray, ids: np.ndarray) -> torch.Tensor:
    values = (epochs * 1000 + ids)[:, None] % 1999 + np.arange(12)
    return torch.from_numpy(values.reshape(-1, 3, 2, 2).astype(np.float32))


def attempt(folder: Path, data: Path, position, batch, world, steps, damaged=(), **other) -> None:
    """All ranks of one attempt; `steps` of each, or a list of them by rank."""
    for rank in range(world):
        facts = about(data, position, batch, rank, world, **other)
        first, last = batch * rank // world, batch * (rank + 1) // world
        mine = steps if isinstance(steps, int) else steps[rank]
        with Ledger(folder, facts) as ledger:
            for step in range(mine):
                start = position + step * batch + first
                epochs, due = order(facts.samples, start, last - first)
                delivered = np.where(np.isin(due, damaged), (due + 1) % facts.samples, due)
                images = pixels(epochs, delivered)
                images = images if facts.device == "cpu" else images.half()
                ledger.record(start, due, delivered, images)


@pytest.fixture(name="data")
def sixty(tmp_path: Path) -> Path:
    return data_set(tmp_path / "data", N)


@pytest.fixture(name="run")
def three_attempts(tmp_path: Path, data: Path) -> Path:
    """Positions 0-83 on 2 ranks, 48-167 on 3, 168-257 on 1: four epochs and 18."""
    folder = tmp_path / "run" / "ledger"
    attempt(folder, data, 0, 12, 2, 7, damaged=[5])
    attempt(folder, data, 48, 12, 3, 10, damaged=[5])
    attempt(folder, data, 168, 10, 1, 9, damaged=[5])
    return folder.parent


def ledgers(run: Path) -> list[Path]:
    """In order of time: 0-1 the first attempt, 2-4 the second, 5 the third."""
    return sorted((run / "ledger").iterdir())


def frames(path: Path) -> list[bytes]:
    """The first line and each frame."""
    content = path.read_bytes()
    at = content.index(b"\n") + 1
    parts = [content[:at]]
    while at < len(content):
        length = HEAD.unpack_from(content, at)[1]
        parts.append(content[at : at + length])
        at += length
    return parts


def change(path: Path, frame: int, place: int, add: int) -> None:
    """Add to the 32-bit word number `place` after the head of a frame, and mend the CRC-32."""
    parts = frames(path)
    words = np.frombuffer(parts[frame + 1][HEAD.size :], "<u4").copy()
    words[place : place + 1] += np.uint32(add)
    body = parts[frame + 1][4 : HEAD.size] + words.tobytes()
    parts[frame + 1] = struct.pack("<I", zlib.crc32(body)) + body
    path.write_bytes(b"".join(parts))


def only(proof: exactly_once.Proof, kind: str) -> exactly_once.Finding:
    found = [finding for finding in proof.findings if finding.kind == kind]
    assert len(found) == 1, proof.findings
    assert "\n" not in found[0].reason
    return found[0]


@contextmanager
def temporary():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@st.composite
def histories(draw):
    """N, and attempts (position, batch, world, steps) each of which starts where one had got to."""
    samples, reached, attempts = draw(st.integers(1, 40)), 0, []
    for _ in range(draw(st.integers(1, 5))):
        batch = draw(st.integers(1, 30))
        world, steps = draw(st.integers(1, min(batch, 5))), draw(st.integers(0, 6))
        position = draw(st.integers(0, reached)) if draw(st.booleans()) else reached
        attempts.append((position, batch, world, steps))
        reached = max(reached, position + batch * steps)
    return samples, attempts, reached


@settings(max_examples=60, deadline=None)
@given(histories(), st.integers(1, 100), st.sets(st.integers(0, 39), max_size=4))
def test_any_history_of_restarts_is_proved(history, window, damaged):
    samples, attempts, reached = history
    with temporary() as folder, mock.patch.object(exactly_once, "WINDOW", window):
        data = data_set(folder / "data", samples)
        for one in attempts:
            attempt(folder / "ledger", data, *one, damaged=list(damaged))
        proof = prove(data, [folder])
        assert proof.findings == ()
        assert proof.epochs == tuple(range(reached // samples))
        assert (proof.position, proof.unfinished, proof.torn) == (reached, 0, 0)
        assert proof.worlds == tuple(world for _, _, world, _ in attempts)
        assert proof.deliveries == sum(batch * steps for _, batch, _, steps in attempts)
        assert proof.again == proof.compared == proof.deliveries - reached
        if samples > 1:
            assert proof.replaced == np.isin(order(samples, 0, reached)[1], list(damaged)).sum()


@settings(max_examples=60, deadline=None)
@given(histories(), st.data())
def test_a_lost_or_doubled_or_changed_frame_is_never_proved(history, choices):
    """Whatever happens to a frame whose positions nobody else delivered."""
    samples, attempts, _ = history
    position, batch, world, steps = attempts[-1]
    attempts[-1] = position, batch, world, max(steps, 2)
    with temporary() as folder:
        data = data_set(folder / "data", samples)
        attempt(folder / "ledger", data, *attempts[-1])
        after = position + batch * max(steps, 2)
        # Who goes on from there says that all before was consumed; and the epoch ends.
        attempt(folder / "ledger", data, after, batch, world, samples // batch + 1)
        if position:
            attempt(folder / "ledger", data, 0, position, 1, 1)
        assert prove(data, [folder]).findings == ()
        path = ledgers(folder)[choices.draw(st.integers(0, world - 1))]
        number = choices.draw(st.integers(0, max(steps, 2) - 1))
        harm = choices.draw(st.sampled_from(["lost", "doubled", "changed"]))
        if harm == "changed":
            change(path, number, 0, choices.draw(st.integers(1, 2**32 - 1)))
        else:
            parts = frames(path)
            parts[number + 1] *= 0 if harm == "lost" else 2
            path.write_bytes(b"".join(parts))
        assert prove(data, [folder]).findings


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


def test_a_torn_end_is_left_out_and_counted(run, data):
    """A writer killed at any byte: its frame does not count, nothing else is lost."""
    first, last = ledgers(run)[0], ledgers(run)[5]
    whole, whole_last = first.read_bytes(), last.read_bytes()
    size = len(frames(first)[-1])
    for cut in [1, 2, size - HEAD.size, size - 1]:
        first.write_bytes(whole[:-cut])
        proof = prove(data, [run])
        assert (proof.findings, proof.torn, proof.again) == ((), 1, 30)  # 72-83 came again
    first.write_bytes(whole[:-size] + bytes(size))  # the power went
    assert (prove(data, [run]).findings, prove(data, [run]).torn) == ((), 1)
    first.write_bytes(whole[:-size])
    assert (prove(data, [run]).findings, prove(data, [run]).torn) == ((), 0)
    last.write_bytes(whole_last[:-3])
    assert prove(data, [run]).position == 248
    assert "1 file with a torn end" in prove(data, [run]).summary()


def test_a_first_line_cut_short_counts_as_torn(run, data):
    new = ledgers(run)[5].with_name("2999.ledger")
    for content in (b"", ledgers(run)[5].read_bytes()[:20]):
        new.write_bytes(content)
        assert (prove(data, [run]).findings, prove(data, [run]).torn) == ((), 1)
    new.write_bytes(b"[]\n")
    assert "its first line is not that of a ledger" in only(prove(data, [run]), "unreadable").reason


def test_no_flipped_bit_is_overlooked(run, data):
    rng = np.random.default_rng(0)
    for _ in range(150):
        path = ledgers(run)[rng.integers(6)]
        whole = path.read_bytes()
        bit = int(rng.integers((whole.index(b"\n") + 1) * 8, len(whole) * 8))
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(harmed)
        proof = prove(data, [run])
        assert proof.findings or proof.torn, (path, bit)
        path.write_bytes(whole)


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


def test_killing_the_writer_loses_nothing_it_recorded(tmp_path, data):
    code = (
        "import os, signal, sys, numpy as np, torch\n"
        "from pipeline.ledger.writer import About, Ledger\n"
        "ledger = Ledger(sys.argv[1], About(**eval(sys.argv[2])))\n"
        "ids = np.arange(4)\n"
        "for k in range(9):\n"
        "    ledger.record(4 * k, ids + 4 * k, ids + 4 * k, torch.zeros(4, 3, 2, 2))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    ).replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])")
    facts = str(vars(about(data, 0, 4, 0, 1)))
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "run", facts], check=False)
    assert killed.returncode == -signal.SIGKILL
    proof = prove(data, [tmp_path / "run"])
    assert (proof.findings, proof.position, proof.torn) == ((), 36, 0)


def test_names_sort_by_time_and_never_meet(tmp_path, data):
    facts = about(data, 0, 4, 0, 1)
    paths = []
    for _ in range(20):
        with Ledger(tmp_path / "run", facts) as ledger:
            paths.append(ledger.path)
    assert paths == sorted(paths)
    assert len({path.name.rsplit("-")[-1] for path in paths}) == 20
    assert paths == sorted((tmp_path / "run").iterdir())


def test_about_eight_bytes_a_sample(tmp_path):
    data = data_set(tmp_path / "data", 12800, shard=1000)
    attempt(tmp_path / "run", data, 0, 128, 1, 100)
    (path,) = (tmp_path / "run").iterdir()
    assert path.stat().st_size / 12800 < 8.25


def test_ids_of_a_set_beyond_32_bits_fit(tmp_path, data):
    facts = replace(about(data, 0, 2, 0, 1), samples=1 << 33)
    due, given_ = np.array([1 << 32, 5]), np.array([1 << 32, (1 << 33) - 1])
    frame = encode(facts.id_type, 1 << 40, due, given_, np.array([1, 2], np.uint32))
    (tmp_path / "a.ledger").write_bytes(facts.header() + frame)
    file = scan(tmp_path / "a.ledger")
    told = file.between(0, 1 << 41)
    assert file.about == facts
    assert (told.due.tolist(), told.delivered.tolist()) == (due.tolist(), given_.tolist())
    assert told.positions.tolist() == [1 << 40, (1 << 40) + 1]
    assert file.between((1 << 40) + 1, 1 << 41).checksums.tolist() == [2]


def test_a_full_disk_is_one_clear_line(tmp_path, data):
    _, ids = order(N, 0, 4)
    ledger = Ledger(tmp_path / "run", about(data, 0, 4, 0, 1))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # A full disk takes what still fits, and then says so.
    with (
        mock.patch("pipeline.ledger.writer.os.write", side_effect=[3, full]),
        pytest.raises(SetupError, match=r"run/.*\.ledger cannot be written \(No space left"),
    ):
        ledger.record(0, ids, ids, torch.zeros(4, 3, 2, 2))
    with pytest.raises(ValueError, match="is closed"):
        ledger.record(4, ids, ids, torch.zeros(4, 3, 2, 2))
    ledger.close()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file cannot be written"):
        Ledger(tmp_path / "file", about(data, 0, 4, 0, 1))


def test_a_record_must_fit_together(tmp_path, data):
    with (
        Ledger(tmp_path / "run", about(data, 0, 4, 0, 1)) as ledger,
        pytest.raises(ValueError, match="4 ids, 3 delivered, 4 images"),
    ):
        ledger.record(0, np.arange(4), np.arange(3), torch.zeros(4, 3, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_host_checksums_are_those_of_zlib(dtype):
    images = (torch.randn(5, 3, 7, 7) * 100).to(dtype)
    expected = [zlib.crc32(image.numpy().tobytes()) for image in images]
    assert crc32_each(images).tolist() == expected
    across = images.permute(0, 2, 3, 1)
    expected = [zlib.crc32(np.ascontiguousarray(image).tobytes()) for image in across.numpy()]
    assert crc32_each(across).tolist() == expected


def test_device_checksums_are_the_sum_they_say():
    images = torch.randn(37, 3, 5, 5).half()  # more than are summed at a time
    weights = [int(word) | 1 for word in np.random.PCG64(0).random_raw(75)]
    for image, found in zip(images, weighted_sums(images).tolist(), strict=True):
        bits = image.numpy().view(np.int16).ravel().tolist()
        total = sum(bit * weight for bit, weight in zip(bits, weights, strict=True)) % 2**64
        assert found == (total ^ (total >> 32)) % 2**32
    with pytest.raises(ValueError, match="float32"):
        weighted_sums(images.float())


def test_device_checksums_see_a_single_bit_and_two_swapped_values():
    image = torch.randn(1, 3, 224, 224).half()
    known = weighted_sums(image)
    rng = np.random.default_rng(0)
    for place, bit in rng.integers(0, (3 * 224 * 224, 16), (100, 2)).tolist():
        other = image.numpy().copy()
        other.view(np.uint16).reshape(-1)[place] ^= 1 << bit
        assert weighted_sums(torch.from_numpy(other)) != known
    other = image.clone()
    other[0, 0, 0, 0], other[0, 0, 0, 1] = image[0, 0, 0, 1], image[0, 0, 0, 0]
    assert weighted_sums(other) != known


@pytest.mark.gpu
def test_a_gpu_writes_what_the_host_would(tmp_path, data):
    attempt(tmp_path / "run", data, 0, 12, 1, 5, device="gpu")
    with Ledger(tmp_path / "run", about(data, 0, 12, 0, 1, device="gpu")) as ledger:
        for step in range(5):
            epochs, due = order(N, 12 * step, 12)
            images = pixels(epochs, due).half().cuda()
            ledger.record(12 * step, due, due, images)
            images.zero_()  # the stream may do what it likes with them now
    proof = prove(data, [tmp_path / "run"])
    assert (proof.findings, proof.compared) == ((), 60)


def command(*arguments: object) -> int | None:
    with mock.patch.object(sys, "argv", ["verify", *map(str, arguments)]):
        return verify.main()


def test_the_command_proves_or_names(run, data, capsys):
    assert command(data, "--ledger", run, "--json") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["sound"] is True
    assert json.loads(out)["epochs"] == [0, 1, 2, 3]
    assert err.startswith("epochs 0-3 exactly once (4 x 60 samples), epoch 4 to 18; 3 attempts")
    ledgers(run)[3].unlink()
    with pytest.raises(DataError, match="do not prove") as error:
        command(data, "--ledger", run, "--json")
    assert error.value.exit_code == 4
    out, err = capsys.readouterr()
    assert json.loads(out)["findings"][0]["kind"] == "missing"
    assert "rank 1 should have, and left no ledger" in err
    with pytest.raises(UsageError):
        command(data, "--ledger", data)


def test_several_folders_are_one_run(tmp_path, data, capsys):
    attempt(tmp_path / "a", data, 0, 12, 2, 5)
    attempt(tmp_path / "b", data, 60, 6, 3, 10)
    assert command(data, "--ledger", tmp_path / "a", tmp_path / "b") == 0
    assert capsys.readouterr().err == (
        "epochs 0-1 exactly once (2 x 60 samples); 2 attempts on 2 and 3 ranks\n"
    )
