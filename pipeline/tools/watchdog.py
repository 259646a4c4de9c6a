"""Calls that may not return: accesses to files on a mount that hangs, requests without an answer.

A thread that waits in the kernel for a disk or a mount cannot be interrupted, whether it waits in a
call or for a page of a file that is mapped into memory. What can be done is done by another thread:
it writes a line after `NOTICE` seconds, and after `LIMIT` seconds the access counts as lost. Then
whoever waits for the hung thread raises `Hang` and leaves it behind (`find_hang`). Where nobody
does, and the process is a command or a worker of ours, the process ends, as by `kill -9`: all that
is on the disk is whole then.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from types import TracebackType
from typing import Generic, TypeVar
from weakref import WeakSet

from pipeline.tools.errors import DuetError

NOTICE = 30.0
"""Seconds after which a line tells of an access that has not returned; again each time that they
have doubled."""
LIMIT = 300.0
"""Seconds after which it counts as lost."""
TICK = 5.0
"""Seconds between two looks at what is under way."""

T = TypeVar("T")


class NoAnswer(Exception):
    """A call in the background has not returned in time."""


class Hang(DuetError):
    """A file on a disk or a mount that does not answer; exit code 1: another start may work."""


class BackgroundCall(Generic[T]):
    """A call in a daemon thread of its own, which is abandoned when nobody waits for it."""

    def __init__(self, action: Callable[[], T], name: str = "request to a store") -> None:
        self._future = Future[T]()
        threading.Thread(target=self._run, args=(action,), name=name, daemon=True).start()

    def wait(self, seconds: float | None) -> bool:
        """Wait for the end of the call, at most so many seconds; return whether it has ended."""
        return bool(futures.wait([self._future], seconds).done)

    def result(self, seconds: float | None = None) -> T:
        """Return or raise what the call returned or raised.

        Raises:
            NoAnswer: it has not ended after `seconds`.
        """
        if not self.wait(seconds):
            raise NoAnswer(f"no answer for {seconds:g} s")
        return self._future.result()

    def _run(self, action: Callable[[], T]) -> None:
        try:
            self._future.set_result(action())
        except BaseException as error:  # handed to the waiting thread
            self._future.set_exception(error)


class FileAccess:
    """`with FileAccess(path):` around one access to a file whose mount may not answer.

    It costs a microsecond. Its seconds are counted in ticks of the watching thread, so that a
    process that was stopped for an hour has not waited for one.
    """

    __slots__ = ("path", "seconds", "told")

    def __init__(self, path: object) -> None:
        """Note the file for messages; nothing is opened."""
        self.path, self.seconds, self.told = path, 0.0, NOTICE

    def __enter__(self) -> None:
        _accesses[threading.get_ident()] = self
        if not _watching:
            _start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _accesses.pop(threading.get_ident(), None)

    def describe(self) -> str:
        """Return who waits for which file, and for how long."""
        return (
            f"process {os.getpid()} on {platform.node()} has waited {self.seconds:.0f} s "
            f"for {self.path}"
        )


_accesses: dict[int, FileAccess] = {}
"""Accesses under way by the number of their thread."""
_awaited: WeakSet[threading.Thread] = WeakSet()
"""Threads that others wait for, which ask `find_hang`."""
_watching: list[threading.Thread] = []
"""The watching thread, once there is one."""
_ends_process = threading.Event()


def end_process_on_hang() -> None:
    """Have a hang that nobody waits for end this process, as it does a command."""
    _ends_process.set()


def await_thread() -> None:
    """Announce that another thread waits for the caller's, and asks `find_hang`."""
    _awaited.add(threading.current_thread())


def find_hang(thread: threading.Thread) -> Hang | None:
    """Return the error of an access of a thread that counts as lost; None if there is none."""
    access = _accesses.get(thread.ident or 0)
    if access is None or access.seconds < LIMIT:
        return None
    return Hang(
        f"{access.describe()}: its disk or mount does not answer; mend that, and give the same "
        "command again"
    )


def _start() -> None:
    _watching.append(threading.Thread(target=_watch, name="watchdog", daemon=True))
    _watching[0].start()


def _watch() -> None:
    before = time.monotonic()
    while True:
        time.sleep(TICK)
        now = time.monotonic()
        look(min(now - before, 2 * TICK))
        before = now


def look(passed: float) -> None:
    """Count `passed` seconds more for each access under way; tell of those that take long."""
    for thread, access in list(_accesses.items()):
        access.seconds += passed
        if access.seconds >= LIMIT and not _is_awaited(thread) and _may_end_process():
            _tell(f"error: {access.describe()}: its disk or mount does not answer; mend that")
            os._exit(Hang.exit_code)
        if access.seconds >= access.told:
            access.told = 2 * access.seconds
            rest = f"; it is given up after {LIMIT:.0f} s" if access.seconds < LIMIT else ""
            _tell(f"{access.describe()}: its disk or mount does not answer{rest}")


def _is_awaited(number: int) -> bool:
    # A thread that has ended leaves its number to others.
    return any(thread.ident == number and thread.is_alive() for thread in list(_awaited))


def _may_end_process() -> bool:
    is_command = signal.getsignal(signal.SIGTERM) == signal.default_int_handler  # by `errors.run`
    return is_command or _ends_process.is_set()


def _tell(line: str) -> None:
    with suppress(OSError, ValueError):  # standard error may be closed, or on that mount
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _forget() -> None:
    # A forked child has none of its parent's threads.
    _accesses.clear()
    _awaited.clear()
    _watching.clear()


os.register_at_fork(after_in_child=_forget)
