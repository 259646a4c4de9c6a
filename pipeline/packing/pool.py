"""The processes of this machine that pack, and what happens when one of them dies."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import fields, replace
from multiprocessing import active_children, get_context
from types import TracebackType
from typing import Any, Protocol, TypeVar

from pipeline.tools.errors import DuetError
from pipeline.tools.processes import tie_to_parent

J = TypeVar("J")
R = TypeVar("R")


class Pool(Protocol):
    """Runs tasks somewhere; `cluster.build_shards` brings one that runs them on Ray."""

    def run(self, task: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
        """Do `task` for every job and give the results as they come.

        Only a few jobs are taken ahead, so `jobs` may be long. What a task raises is raised. A
        task whose process dies is done again; a job with a field `careful` has it set then.
        """


class LocalPool:
    """A `Pool` of processes of this machine, used as a context manager."""

    def __init__(self, workers: int) -> None:
        """Start `workers` processes when they are first needed."""
        self._workers = workers
        self._ending = False
        self._pool = self._started()

    def run(self, task: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
        """Do `task` for every job; see `Pool`."""
        todo = iter(jobs)
        running: dict[Future[R], J] = {}
        while True:
            died = self._give(task, todo, running)
            if not running and not died:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    died.append(job)
            if died:
                # Which process died, and of which job, is not known: all that were under way.
                died += running.values()
                running.clear()
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._pool = self._started()
                yield from self._apart(task, died)

    def _give(
        self, task: Callable[[J], R], todo: Iterator[J], running: dict[Future[R], J]
    ) -> list[J]:
        """Give out jobs until enough are under way; return one that found all processes dead."""
        while len(running) < 2 * self._workers and (job := next(todo, None)) is not None:
            try:
                with _interrupts_later():
                    running[self._pool.submit(task, job)] = job
            except BrokenProcessPool:
                return [job]
        return []

    def _apart(self, task: Callable[[J], R], jobs: list[J]) -> Iterator[R]:
        """Do jobs that may have killed their process, each in one of its own, side by side."""
        with ThreadPoolExecutor(self._workers) as threads:
            try:
                futures = [threads.submit(self._alone, task, job) for job in jobs]
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                self._ending = True
                threads.shutdown(wait=False, cancel_futures=True)
                _terminate()
                raise

    def _alone(self, task: Callable[[J], R], job: J) -> R:
        """Do a job in a process of its own: first as it is, then carefully."""
        for attempt in (job, as_careful(job)):
            if self._ending:
                break
            with self._started(1) as pool:
                try:
                    return pool.submit(task, attempt).result()
                except BrokenProcessPool:
                    continue
        raise DuetError(
            "a packing process died again and again (out of memory?); run the same command again, "
            "with fewer --workers"
        )

    def _started(self, workers: int | None = None) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            workers or self._workers, mp_context=get_context("spawn"), initializer=tie_to_parent
        )

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._ending = True
            _terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)


def as_careful(job: Any) -> Any:
    """Return a job with its field `careful` set, if it has one."""
    if any(field.name == "careful" for field in fields(job)):
        return replace(job, careful=True)
    return job


def _terminate() -> None:
    for process in active_children():  # a file half written is of no use to anybody
        process.terminate()


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Hold Ctrl-C back while processes start: they inherit that, and have nothing to say to it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
