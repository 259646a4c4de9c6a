"""`Prefetcher`: runs an iterator in a thread, ahead of need."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeAlias, TypeVar

from pipeline.tools.watchdog import await_thread, find_hang

T = TypeVar("T")
_Queue: TypeAlias = queue.Queue[tuple[T | None, BaseException | None]]
"""Pairs of an item and None, or of None and the error in its place; two Nones at the end."""

JOIN_TIMEOUT = 5.0
"""Seconds that the end of the interpreter waits for a thread that makes an item."""
POLL = 1.0
"""Seconds between two looks whether the thread hangs in a read."""


class Prefetcher(Generic[T]):
    """Takes the items of an iterator; a thread makes the next few of them in advance."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        """Start at once; at most `depth` items, and one in the making, wait to be taken."""
        self._queue: _Queue[T] = queue.Queue(depth)
        stop = threading.Event()
        # The thread must not refer to `self`: a forgotten Prefetcher could never be collected.
        thread = threading.Thread(target=_fill_queue, args=(items, self._queue, stop), daemon=True)
        thread.start()
        self._thread = thread
        self._finalizer = weakref.finalize(self, _stop_thread, thread, self._queue, stop)

    def take(self) -> T:
        """Return the next item; waits until it is made.

        Raises:
            StopIteration: there are no more items.
            Exception: the iterator raised it in place of the item; then StopIteration.
            Hang: the thread hangs in a read of a file, which cannot be interrupted.
        """
        if not self._finalizer.alive:
            raise StopIteration
        item, error = self._wait()
        if item is None:
            self.close()
            raise error or StopIteration
        return item

    @property
    def ready(self) -> int:
        """Number of items that can be taken without waiting."""
        return self._queue.qsize()

    def close(self) -> None:
        """Stop the thread and wait for its end; an item in the making is finished first.

        The thread is stopped as well at interpreter exit and when this is collected.
        """
        self._finalizer()
        while self._thread is not threading.current_thread() and self._thread.is_alive():
            if find_hang(self._thread):
                return  # the thread is left behind
            self._thread.join(POLL)

    def _wait(self) -> tuple[T | None, BaseException | None]:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=POLL)
            if hang := find_hang(self._thread):
                return None, hang


def _fill_queue(items: Iterator[T], made: _Queue[T], stop: threading.Event) -> None:
    await_thread()
    try:
        for item in items:
            made.put((item, None))
            if stop.is_set():
                return
        made.put((None, None))
    except BaseException as error:
        made.put((None, error))


def _stop_thread(thread: threading.Thread, made: _Queue[T], stop: threading.Event) -> None:
    stop.set()
    with contextlib.suppress(queue.Empty):  # make room for an item that waits for a slot
        while True:
            made.get_nowait()
    if thread is not threading.current_thread() and not find_hang(thread):
        thread.join(JOIN_TIMEOUT)
