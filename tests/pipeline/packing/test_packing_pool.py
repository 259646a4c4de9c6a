from __future__ import annotations

import faulthandler
import os
import resource
import signal
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from pipeline.tools.errors import DuetError
from pipeline.tools.processes import Crash, LocalPool, call_isolated, limit_memory


@dataclass(frozen=True)
class Job:
    number: int
    notes: Path
    careful: bool = False


def square(job: Job) -> int:
    return job.number**2


def killed_the_first_time(job: Job) -> tuple[int, bool]:
    """Job 3 is killed once, as the kernel does when memory runs out."""
    note = job.notes / f"{job.number}"
    if job.number == 3 and not note.exists():
        note.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return job.number, job.careful


def dies_unless_careful(job: Job) -> tuple[int, bool]:
    if job.number == 3 and not job.careful:
        os.abort()
    return job.number, job.careful


def always_dies(job: Job) -> int:
    os.abort()


def disk_full(job: Job) -> int:
    raise OSError(28, "No space left on device", "/data/x.bin")


def test_a_killed_process_costs_nothing_but_time(tmp_path):
    jobs = [Job(number, tmp_path) for number in range(12)]
    with LocalPool(2) as pool:
        assert sorted(pool.run(square, jobs)) == [number**2 for number in range(12)]
        assert sorted(pool.run(killed_the_first_time, jobs)) == [(n, False) for n in range(12)]


def test_processes_that_die_while_nobody_looks_are_started_anew(tmp_path):
    """The pool breaks between two results: the next job finds no process to be given to."""
    jobs = [Job(number, tmp_path) for number in range(12)]
    with LocalPool(1) as pool:
        results = pool.run(square, jobs)
        first = next(results)
        broken = pool._pool
        for process in active_children():
            process.kill()
        with suppress(BrokenProcessPool):
            while True:
                broken.submit(os.getpid).result()
        assert sorted([first, *results]) == [number**2 for number in range(12)]


def test_a_job_that_kills_its_process_is_done_with_care(tmp_path):
    jobs = [Job(number, tmp_path) for number in range(6)]
    with LocalPool(2) as pool:
        done = sorted(pool.run(dies_unless_careful, jobs))
    assert done == [(number, number == 3) for number in range(6)]
    with LocalPool(1) as pool, pytest.raises(DuetError, match="died again and again"):
        list(pool.run(always_dies, jobs[:1]))


def test_what_a_task_raises_is_raised(tmp_path):
    with LocalPool(1) as pool, pytest.raises(OSError, match="No space left") as raised:
        list(pool.run(disk_full, [Job(0, tmp_path)]))
    assert raised.value.filename == "/data/x.bin"


def test_a_crash_is_told_from_a_kill():
    assert call_isolated(sorted, [3, 1, 2]) == [1, 2, 3]
    with pytest.raises(Crash, match="SIGSEGV") as crash:
        call_isolated(_signal_self, signal.SIGSEGV)
    assert not crash.value.from_outside
    with pytest.raises(Crash, match="SIGKILL") as crash:
        call_isolated(_signal_self, signal.SIGKILL)
    assert crash.value.from_outside
    with pytest.raises(Crash, match="no result"):
        call_isolated(_raise)


def _signal_self(number: int) -> None:
    faulthandler.disable()  # pytest's, which would print where
    os.kill(os.getpid(), number)


def _raise() -> None:
    raise ValueError


def test_memory_beyond_a_limit_is_an_error_and_not_the_end_of_the_machine():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with limit_memory(64 << 20), pytest.raises(MemoryError):
        np.empty(4 << 30, np.uint8)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert np.empty(4 << 30, np.uint8).nbytes == 4 << 30
