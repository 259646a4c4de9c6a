"""The file of a rank: its writer killed, its disk full, its end torn; its size and names."""

from __future__ import annotations

import errno
import os
import signal
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from pipeline.stream.ledger.format import encode_frame, scan_ledger
from pipeline.stream.ledger.proof import prove
from pipeline.stream.ledger.writer import Ledger
from pipeline.tools.errors import SetupError, UsageError
from tests.helpers.ledgers import (  # noqa: F401
    HEAD,
    N,
    about,
    attempt,
    data_set,
    frames,
    ledgers,
    only,
    order,
    pixels,
    sixty,
    three_attempts,
)
from tests.helpers.processes import run_command


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


def test_killing_the_writer_loses_nothing_it_recorded(tmp_path, data):
    code = (
        "import os, signal, sys, numpy as np, torch\n"
        "from pipeline.stream.ledger.writer import Ledger, LedgerHeader\n"
        "ledger = Ledger(sys.argv[1], LedgerHeader(**eval(sys.argv[2])))\n"
        "ids = np.arange(4)\n"
        "for k in range(9):\n"
        "    ledger.record(4 * k, ids + 4 * k, ids + 4 * k, torch.zeros(4, 3, 2, 2))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    ).replace("sys.argv[1]", "__import__('pathlib').Path(sys.argv[1])")
    facts = str(vars(about(data, 0, 4, 0, 1)))
    killed = run_command([sys.executable, "-c", code, tmp_path / "run", facts])
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
    frame = encode_frame(facts.id_type, 1 << 40, due, given_, np.array([1, 2], np.uint32))
    (tmp_path / "a.ledger").write_bytes(facts.to_line() + frame)
    file = scan_ledger(tmp_path / "a.ledger")
    found = file.read(0, 1 << 41)
    assert file.header == facts
    assert (found.due.tolist(), found.delivered.tolist()) == (due.tolist(), given_.tolist())
    assert found.positions.tolist() == [1 << 40, (1 << 40) + 1]
    assert file.read((1 << 40) + 1, 1 << 41).checksums.tolist() == [2]


def test_a_full_disk_is_one_clear_line(tmp_path, data):
    _, ids = order(N, 0, 4)
    ledger = Ledger(tmp_path / "run", about(data, 0, 4, 0, 1))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    # A full disk takes what still fits, and then says so.
    with (
        mock.patch("pipeline.stream.ledger.writer.os.write", side_effect=[3, full]),
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
