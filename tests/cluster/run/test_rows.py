"""Rows outlive disks: full for a while, gone for a while, or losing what they were given."""

from __future__ import annotations

import errno
import json
import os
import resource
from itertools import combinations
from pathlib import Path

import pytest
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st

from cluster.run import jsonl as rows_module
from cluster.run.jsonl import Rows, cut_rows, find_ordered
from pipeline.tools.errors import SetupError


def write(path: Path, steps: range, tail: str = "") -> Path:
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + tail)
    return path


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_bytes().splitlines()]


@given(st.integers(0, 20), st.integers(0, 25), st.sampled_from(["", "{", '{"step": 2', "\0\0"]))
def test_no_row_after_the_step_and_no_half_row_stays(tmp_path_factory, count, step, tail):
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", range(1, count + 1), tail)
    cut_rows(path, step, pytest.fail)
    assert steps_in(path) == list(range(1, min(count, step) + 1))


def test_a_missing_file_stays_missing(tmp_path):
    cut_rows(tmp_path / "rows.jsonl", 3, pytest.fail)
    assert list(tmp_path.iterdir()) == []


@given(st.data())
def test_one_damaged_byte_costs_one_row(tmp_path_factory, data):
    """Whatever it turns a row into: two, another step, no JSON, no UTF-8."""
    count = data.draw(st.integers(3, 30))
    cut = data.draw(st.integers(1, count + 3))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"position": 8 * n, "step": n, "loss": 1 / n}) for n in range(1, count + 1)]
    content = bytearray("".join(line + "\n" for line in lines).encode())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    told: list[str] = []
    cut_rows(path, cut, told.append)
    hit = bytes(content[:place]).count(b"\n")  # and with a lost end of line, the next
    whole = {line.encode() for n, line in enumerate(lines) if n not in (hit, hit + 1)}
    left = path.read_bytes().splitlines()
    assert [line for line in left if line in whole] == [
        line.encode() for n, line in enumerate(lines[:cut]) if n not in (hit, hit + 1)
    ]
    assert not any(line.encode() in left for line in lines[cut:])
    strangers = [line for line in left if line.decode(errors="replace") not in lines]
    assert len(told) <= 1
    if hit + 2 < min(count, cut) and any(b"step" not in line for line in strangers):
        assert f"line {hit + 1}" in told[0]
    cut_rows(path, cut, told.append)  # again: the same
    assert path.read_bytes().splitlines() == left


def test_damaged_rows_are_told_and_the_rest_stays(tmp_path):
    garbled = "garbage\n" + "".join(json.dumps({"step": step}) + "\n" for step in (3, 900, 4, 0, 5))
    path = write(tmp_path / "rows.jsonl", range(1, 3), garbled)
    told: list[str] = []
    cut_rows(path, 4, told.append)
    assert len(path.read_bytes().splitlines()) == 6
    assert told == [f"{path} has 2 damaged rows, first in line 3; it stays, and so do the others"]


def test_steps_in_order_are_most_of_them():
    assert find_ordered([]) == []
    assert find_ordered([-1, -1]) == []
    assert list(find_ordered([1, 2, 2, -1, 3])) == [0, 1, 2, 4]
    assert list(find_ordered([1, 9, 2, 3, 0, 4])) == [0, 2, 3, 5]


@given(st.lists(st.integers(-1, 12), max_size=9))
def test_no_longer_series_of_steps_is_in_order(steps):
    places = [place for place, step in enumerate(steps) if step >= 0]
    best = max(
        length
        for length in range(len(places) + 1)
        for chosen in combinations(places, length)
        if sorted(steps[place] for place in chosen) == [steps[place] for place in chosen]
    )
    found = find_ordered(steps)
    assert len(found) == best
    assert [steps[place] for place in found] == sorted(steps[place] for place in found)


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
