"""Work in order in threads and processes, and calls in a fork (`LocalPool`: test_packing_pool)."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from pathlib import Path

import pytest

from pipeline.tools import processes
from pipeline.tools.errors import DuetError
from pipeline.tools.processes import (
    QUEUED,
    READ_AHEAD,
    Crash,
    call_isolated,
    map_in_order,
    read_ahead,
)


class Finalized:
    """Garbage that only the collector finds, and that leaves a note when it is finalized."""

    def __init__(self, note: Path) -> None:
        self.note, self.own = note, self

    def __del__(self) -> None:
        self.note.touch()


def collect() -> int:
    """Make garbage; return how many objects the collector found."""
    own: list[object] = []
    own.append(own)
    del own
    return gc.collect()


def test_a_forked_call_collects_its_own_garbage_and_not_its_parents(tmp_path):
    gc.disable()
    try:
        Finalized(tmp_path / "note")
        assert call_isolated(collect) >= 1
        assert not (tmp_path / "note").exists()
    finally:
        gc.enable()
    gc.collect()
    assert (tmp_path / "note").exists()


def test_reads_come_in_order_and_no_further_ahead_than_they_may():
    taken: list[int] = []
    done = threading.Event()

    def read(number: int) -> int:
        if number == 0:
            done.wait(5)  # the first ends last
        return number**2

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    found = read_ahead(read, items())
    threading.Timer(0.05, done.set).start()
    assert next(found) == 0
    assert len(taken) == READ_AHEAD
    assert list(found) == [number**2 for number in range(1, 100)]


def test_reads_that_nobody_wants_any_more_are_not_begun():
    begun: list[int] = []

    def read(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise OSError("bad sector")
        return number

    found = read_ahead(read, itertools.count())
    assert list(itertools.islice(found, 3)) == [0, 1, 2]
    with pytest.raises(OSError, match="bad sector"):
        next(found)
    assert len(begun) <= READ_AHEAD + 3


def square(number: int) -> int:
    return number**2


def fail(number: int) -> int:
    if number == 5:
        raise ValueError("five")
    return number


def die(number: int) -> int:
    if number == 5:
        os._exit(1)
    return number


def test_a_forked_call_that_hangs_is_killed(monkeypatch):
    monkeypatch.setattr(processes, "ISOLATED_SECONDS", 0.3)
    with pytest.raises(Crash, match=r"no result in 0 s") as raised:
        call_isolated(time.sleep, 60)
    assert not raised.value.from_outside, "it is the file's fault, or the program's"
    assert call_isolated(len, bytes(10 << 20)) == 10 << 20
    assert call_isolated(bytes, 3 << 20) == bytes(3 << 20), "more than a pipe holds"


class Numbers(list[int]):
    """Jobs that count how many were taken."""

    taken = 0

    def __iter__(self):
        for number in super().__iter__():
            self.taken += 1
            yield number


def test_results_of_processes_come_in_order_and_few_jobs_are_taken_ahead():
    jobs = Numbers(range(40))
    found = map_in_order(square, jobs, 2)
    assert [next(found), next(found)] == [0, 1]
    assert jobs.taken == QUEUED * 2 + 1
    assert list(found) == [number**2 for number in range(2, 40)]


@pytest.mark.parametrize(("work", "error"), [(fail, "five"), (die, "a process died")])
def test_what_goes_wrong_in_a_process_ends_the_work(work, error):
    found: list[int] = []
    with pytest.raises((ValueError, DuetError), match=error):
        found.extend(map_in_order(work, range(1000), 2))
    assert found == [0, 1, 2, 3, 4][: len(found)]


def test_one_worker_or_job_is_this_process():
    assert list(map_in_order(lambda number: os.getpid(), [1, 2], 1)) == [os.getpid()] * 2
    assert list(map_in_order(lambda number: os.getpid(), [1], 8)) == [os.getpid()]
    assert list(map_in_order(square, [], 8)) == []
