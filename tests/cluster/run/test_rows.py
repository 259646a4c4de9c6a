"""Rows outlive disks: full for a while, gone for a while, or losing what they were given."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from cluster.run import jsonl as rows_module
from cluster.run.jsonl import Rows, cut_rows
from pipeline.tools.errors import SetupError


def write(path: Path, steps: range, tail: str = "") -> Path:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)
    return path


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


@given(st.integers(0, 20), st.integers(0, 25), st.sampled_from(["", "{", '{"step": 2', "\0\0"]))
def test_no_row_after_the_step_and_no_half_row_stays(tmp_path_factory, count, step, tail):
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", range(1, count + 1), tail)
    cut_rows(path, step)
    assert steps_in(path) == list(range(1, min(count, step) + 1))


def test_a_missing_file_stays_missing(tmp_path):
    cut_rows(tmp_path / "rows.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_a_garbled_whole_row_ends_what_is_kept(tmp_path):
    path = write(tmp_path / "rows.jsonl", range(1, 3), "garbage\n" + json.dumps({"step": 3}) + "\n")
    cut_rows(path, 10)
    assert steps_in(path) == [1, 2]


def test_a_page_that_was_lost_in_a_crash_ends_what_is_kept(tmp_path):
    path = write(tmp_path / "rows.jsonl", range(1, 200))
    content = bytearray(path.read_bytes())
    content[500:700] = bytes(200)
    path.write_bytes(content)
    cut_rows(path, 150)
    kept = steps_in(path)
    assert kept == list(range(1, len(kept) + 1))
    assert 500 - 15 < path.stat().st_size <= 500


def on_a_small_disk(folder: Path) -> None:
    """Rows under a limit on the size of files, which the kernel enforces."""
    told: list[str] = []
    rows = Rows(folder / "rows.jsonl", 0, told.append)
    rows.add({"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))  # in the second row
    for step in (2, 3):
        rows.add({"step": step})
        assert steps_in(folder / "rows.jsonl") == [1]  # no half row
    with pytest.raises(SetupError, match=r"rows.jsonl lacks 2 rows \(File too large\)"):
        rows.sync()
    free = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_FSIZE, free)
    rows.add({"step": 4})
    assert steps_in(folder / "rows.jsonl") == [1, 2, 3, 4]  # at once
    rows.sync()
    rows.close()
    (folder / "told").write_text("\n".join(told))


def test_rows_outlive_a_full_disk_in_their_order(tmp_path):
    process = mp.get_context("spawn").Process(target=on_a_small_disk, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert steps_in(tmp_path / "rows.jsonl") == [1, 2, 3, 4]
    first, second = (tmp_path / "told").read_text().splitlines()
    assert "cannot be written (File too large)" in first
    assert "no row is lost" in second


@pytest.fixture(name="folder")
def run_folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_rows_are_not_said_to_be_there_while_their_folder_is_away(folder, tmp_path):
    rows = Rows(folder / "rows.jsonl", 0, pytest.fail)
    rows.add({"step": 1})
    folder.rename(tmp_path / "away")
    rows.add({"step": 2})
    with pytest.raises(SetupError, match=r"rows.jsonl lacks rows \(No such file or directory\)"):
        rows.sync()
    (tmp_path / "away").rename(folder)
    rows.add({"step": 3})
    rows.sync()
    rows.close()
    assert steps_in(folder / "rows.jsonl") == [1, 2, 3]


@pytest.mark.parametrize("instead", [None, "something else\n"])
def test_a_file_that_somebody_deleted_or_replaced_is_written_again(folder, tmp_path, instead):
    path = write(folder / "rows.jsonl", range(1, 3))
    rows = Rows(path, 2, pytest.fail)
    rows.add({"step": 3})
    path.unlink()
    if instead:
        path.write_text(instead)
    rows.sync()
    rows.add({"step": 4})
    rows.sync()
    rows.close()
    assert steps_in(path) == [1, 2, 3, 4]


def test_what_the_system_took_and_then_lost_is_written_again(folder, monkeypatch):
    """After an fsync that failed, Linux drops the pages and calls the next fsync a success."""
    told: list[str] = []
    path = write(folder / "rows.jsonl", range(1, 3))
    rows = Rows(path, 2, told.append)
    for step in (3, 4):
        rows.add({"step": step})

    def failing(file: int) -> None:
        os.ftruncate(file, os.fstat(file).st_size - 20)  # the pages that never reached the disk
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(rows_module.os, "fsync", failing)
        with pytest.raises(SetupError, match=r"lacks 2 rows \(Input/output error\)"):
            rows.sync()
    rows.sync()
    rows.close()
    assert steps_in(path) == [1, 2, 3, 4]
    assert told == []  # whoever called has said it


def test_a_run_that_never_saves_still_puts_its_rows_on_the_disk(folder, monkeypatch):
    monkeypatch.setattr(rows_module, "MOST", 100)
    rows = Rows(folder / "rows.jsonl", 0, pytest.fail)
    for step in range(100):
        rows.add({"step": step})
        assert sum(map(len, rows._rows)) <= 100
    rows.close()
    assert steps_in(folder / "rows.jsonl") == list(range(100))


def test_a_file_that_cannot_be_opened_is_a_line(folder):
    (folder / "rows.jsonl").mkdir()
    with pytest.raises(SetupError, match=r"rows.jsonl cannot be written \(Is a directory\)"):
        Rows(folder / "rows.jsonl", 0, pytest.fail)
