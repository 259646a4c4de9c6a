"""The same work on each of many shards, on all cores, with the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import TypeVar

from pipeline.tools.errors import DuetError
from pipeline.tools.processes import tie_to_parent

Job = TypeVar("Job")
Result = TypeVar("Result")

QUEUED = 2
"""Jobs a process that are given out ahead: no process waits, and memory stays flat."""


def in_order(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
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
