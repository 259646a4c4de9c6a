"""Helper processes: worker pools, isolated calls, and how they end with their parent."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import pickle
import resource
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
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
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, ParamSpec, Protocol, TypeVar, cast

from pipeline.tools.errors import DuetError
from pipeline.tools.watchdog import end_process_on_hang

READ_AHEAD = 16
"""Items that `read_ahead` reads or holds at a time."""
QUEUED = 2
"""Jobs per process that a pool holds: no process waits, and memory stays bounded."""
ISOLATED_SECONDS = 300.0
"""Time in which an isolated call returns, or counts as hung."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h

P = ParamSpec("P")
J = TypeVar("J")
R = TypeVar("R")


def tie_to_parent() -> None:
    """Initialize a helper process: it ignores Ctrl-C and SIGHUP, and is killed with its parent.

    Otherwise a parent that is killed (by hand, the scheduler, or for lack of memory) would leave
    helpers behind that hold memory and may still write.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    request_parent_death_signal(signal.SIGKILL)
    end_process_on_hang()


def request_parent_death_signal(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died between the two lines
            os._exit(1)


@contextmanager
def limit_memory(growth: int) -> Iterator[None]:
    """Let the block's allocations fail beyond so many bytes, those of native libraries as well.

    The limit is the process's: other threads share it meanwhile. Off Linux there is none.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + growth
    if before != resource.RLIM_INFINITY:
        limit = min(limit, before)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))


class Crash(Exception):
    """A process ended by a signal or without a result; the message is the signal's name.

    Attributes:
        signal: number of the signal; 0 without one.
        from_outside: whether a user, the scheduler or the kernel may have sent the signal.
    """

    def __init__(self, number: int, reason: str = "no result") -> None:
        super().__init__(signal.Signals(number).name if number else reason)
        self.signal = number
        self.from_outside = number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def call_isolated(call: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """Return what `call` returns in a fork of this process, which takes about 10 ms.

    The caller must have no other threads that hold locks.

    Raises:
        Crash: the process ended without returning it, or did not end in `ISOLATED_SECONDS`.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        # The parent's garbage is not this process's to finalize: DALI's would wait for threads that
        # were not forked.
        gc.freeze()
        code = 1
        try:
            os.close(ours)
            with open(theirs, "wb") as pipe:
                pickle.dump(call(*arguments, **options), pipe)
            code = 0
        finally:
            os._exit(code)  # run no exit handlers and flush no buffers of the parent
    os.close(theirs)
    with open(ours, "rb") as pipe:
        result = _read_until(pipe, time.monotonic() + ISOLATED_SECONDS)
    if result is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise Crash(0, f"no result in {ISOLATED_SECONDS:.0f} s")
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Crash(os.WTERMSIG(status))
    if os.waitstatus_to_exitcode(status) != 0:
        raise Crash(0)
    return cast(R, pickle.loads(result))


def _read_until(pipe: BinaryIO, deadline: float) -> bytes | None:
    """Return all that comes through a pipe; None if it is open at the deadline still."""
    found, poll = bytearray(), select.poll()
    poll.register(pipe, select.POLLIN)
    while poll.poll(1000 * max(deadline - time.monotonic(), 0)):
        if not (more := os.read(pipe.fileno(), 1 << 20)):
            return bytes(found)
        found += more
    return None


def read_ahead(read: Callable[[J], R], items: Iterable[J]) -> Iterator[R]:
    """Yield `read(item)` of each item, in order, read by `READ_AHEAD` threads.

    For small files of a store, which answers each request late, but many at once.
    """
    with ThreadPoolExecutor(READ_AHEAD, "read ahead") as pool:
        yield from _submit_in_order(pool, read, items, READ_AHEAD)


def _submit_in_order(
    pool: Executor, work: Callable[[J], R], items: Iterable[J], limit: int
) -> Iterator[R]:
    """Yield `work(item)` of each item, in order; the pool has at most `limit` of them."""
    rest, queue = iter(items), deque[Future[R]]()
    try:
        queue.extend(pool.submit(work, item) for item in itertools.islice(rest, limit))
        while queue:
            yield queue.popleft().result()
            queue.extend(pool.submit(work, item) for item in itertools.islice(rest, 1))
    finally:
        for future in queue:
            future.cancel()


def map_in_order(work: Callable[[J], R], jobs: Sequence[J], workers: int) -> Iterator[R]:
    """Yield `work(job)` of each job, in order, computed by processes.

    Processes, not threads: half of the time of a JPEG shard is spent in Python code. One worker or
    job is run in this process.

    Args:
        work: a function of a module.
        jobs: its arguments; they and the results must be picklable.
        workers: number of processes.

    Raises:
        DuetError: a process died.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from map(work, jobs)
        return
    with _start_pool(workers) as pool:
        try:
            yield from _submit_in_order(pool, work, jobs, QUEUED * workers)
        except KeyboardInterrupt:
            _terminate_children()
            raise
        except BrokenProcessPool as error:
            raise DuetError(
                "a process died (out of memory?); run the same command again, with fewer --workers"
            ) from error


class Pool(Protocol):
    """Runs tasks in other processes, here or on Ray."""

    def run(self, task: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
        """Run `task` for every job and yield the results as they come.

        Only a few jobs are taken in advance, so `jobs` may be long. An exception of a task is
        raised. A task whose process dies is run again; a job with a field `careful` has it set
        then.
        """


class LocalPool:
    """A `Pool` of processes of this machine; a context manager."""

    def __init__(self, workers: int) -> None:
        """Set the number of processes; they start when they are first needed."""
        self._workers = workers
        self._ending = False
        self._pool = _start_pool(workers)

    def run(self, task: Callable[[J], R], jobs: Iterable[J]) -> Iterator[R]:
        """See `Pool`."""
        todo = iter(jobs)
        running: dict[Future[R], J] = {}
        while True:
            died = self._submit(task, todo, running)
            if not running and not died:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    died.append(job)
            if died:
                # It is not known which process died of which job: all running jobs are suspects.
                died += running.values()
                running.clear()
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._pool = _start_pool(self._workers)
                yield from self._run_apart(task, died)

    def _submit(
        self, task: Callable[[J], R], todo: Iterator[J], running: dict[Future[R], J]
    ) -> list[J]:
        """Submit jobs until the queue is full; return a job that found all processes dead."""
        while len(running) < QUEUED * self._workers and (job := next(todo, None)) is not None:
            try:
                with defer_signals(signal.SIGINT, signal.SIGHUP):
                    running[self._pool.submit(task, job)] = job
            except BrokenProcessPool:
                return [job]
        return []

    def _run_apart(self, task: Callable[[J], R], jobs: list[J]) -> Iterator[R]:
        """Run jobs that may have killed their process, each in a process of its own."""
        with ThreadPoolExecutor(self._workers) as threads:
            try:
                futures = [threads.submit(self._run_alone, task, job) for job in jobs]
                for future in as_completed(futures):
                    yield future.result()
            except BaseException:
                self._ending = True
                threads.shutdown(wait=False, cancel_futures=True)
                _terminate_children()
                raise

    def _run_alone(self, task: Callable[[J], R], job: J) -> R:
        """Run a job in a process of its own: first unchanged, then with `careful` set."""
        for attempt in (job, make_careful(job)):
            if self._ending:
                break
            with _start_pool(1) as pool:
                try:
                    return pool.submit(task, attempt).result()
                except BrokenProcessPool:
                    continue
        raise DuetError(
            "a packing process died again and again (out of memory?); run the same command again, "
            "with fewer --workers"
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
            _terminate_children()
        self._pool.shutdown(wait=True, cancel_futures=True)


def make_careful(job: Any) -> Any:
    """Return a job with its field `careful` set, if it has one."""
    if any(field.name == "careful" for field in fields(job)):
        return replace(job, careful=True)
    return job


def _start_pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=tie_to_parent)


def _terminate_children() -> None:
    for process in active_children():  # half-written files are of no use
        process.terminate()


@contextmanager
def defer_signals(*numbers: int) -> Iterator[None]:
    """Deliver signals after the block; processes that it starts inherit the block, and get none."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
