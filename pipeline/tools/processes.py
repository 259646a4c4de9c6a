"""Helper processes that end when their parent does, however it ends.

A call in a process of its own: what it crashes, it crashes alone.

Small files of a target, read some ahead: a store answers each of them late, but many at once.

The same work on each of many shards, on all cores, with the results in order.

The processes of this machine that pack, and what happens when one of them dies.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from typing import Any, ParamSpec, Protocol, TypeVar, cast

from pipeline.tools.errors import DuetError

P = ParamSpec("P")
T = TypeVar("T")


class Crash(Exception):
    """The process ended by a signal or without a result; the message is the signal's name."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name if number else "no result")
        self.from_outside = number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def call_isolated(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Return what `call` returns in a fork of this process.

    Some 10 ms a call, so for suspects only. The caller must have no other threads that hold locks.

    Raises:
        Crash: the process did not live to return it.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(ours)
            with open(theirs, "wb") as pipe:
                pickle.dump(call(*arguments, **options), pipe)
            code = 0
        finally:
            os._exit(code)  # neither tidy up nor flush what is the parent's
    os.close(theirs)
    with open(ours, "rb") as pipe:
        result = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Crash(os.WTERMSIG(status))
    if os.waitstatus_to_exitcode(status) != 0:
        raise Crash(0)
    return cast(T, pickle.loads(result))


THREADS = 16

R = TypeVar("R")


def read_ahead(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield `read` of each item, in their order; at most `THREADS` are read or held at a time."""
    rest = iter(items)
    with ThreadPoolExecutor(THREADS, "read ahead") as pool:
        coming: deque[Future[R]] = deque()
        try:
            coming.extend(pool.submit(read, item) for item in itertools.islice(rest, THREADS))
            while coming:
                yield coming.popleft().result()
                coming.extend(pool.submit(read, item) for item in itertools.islice(rest, 1))
        finally:
            for future in coming:
                future.cancel()


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tie_to_parent() -> None:
    """Initialise a helper process: Ctrl-C is its parent's matter, and it dies with its parent.

    Without the second, a parent that is killed (by hand, the scheduler, or for want of memory)
    leaves helpers behind that hold memory and may still write.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    request_parent_death_signal(signal.SIGKILL)


def request_parent_death_signal(number: int) -> None:
    """Have this process get a signal when the thread that started it ends, however it ends."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died between the two lines
            os._exit(1)


Job = TypeVar("Job")
Result = TypeVar("Result")

QUEUED = 2
"""Jobs a process that are given out ahead: no process waits, and memory stays flat."""


def map_in_order(
    work: Callable[[Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[Result]:
    """Yield `work(job)` of each job, in order.

    Processes, not threads: of a JPEG shard, every second microsecond goes to Python. For a single
    worker or job there is no process but this one.

    Args:
        work: a function of a module.
        jobs: what it is called with; both, and what it returns, can be pickled.
        workers: processes.

    Raises:
        DuetError: a process died.
    """
    if min(workers, len(jobs)) <= 1:
        yield from map(work, jobs)
        return
    running: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=tie_to_parent
    ) as pool:
        try:
            for job in jobs:
                if len(running) >= QUEUED * workers:
                    yield running.popleft().result()
                running.append(pool.submit(work, job))
            while running:
                yield running.popleft().result()
        except KeyboardInterrupt:
            for process in active_children():  # what is half done is of no use to anybody
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise DuetError(
                "a process died (out of memory?); run the same command again, with fewer --workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


J = TypeVar("J")


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
        for attempt in (job, make_careful(job)):
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


def make_careful(job: Any) -> Any:
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
