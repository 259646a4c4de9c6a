"""`Prefetcher`: runs an iterator in a thread, ahead of need."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

JOIN_TIMEOUT = 5.0
"""Seconds that the end of the interpreter waits for a thread that makes an item."""


class Prefetcher(Generic[T]):
    """Takes the items of an iterator; a thread makes the next few of them in advance."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        """Start at once; at most `depth` items, and one in the making, wait to be taken."""
        self._queue: queue.Queue[_PrefetchedItem[T]] = queue.Queue(depth)
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
        """
        if not self._finalizer.alive:
            raise StopIteration
        made = self._queue.get()
        if made.item is None:
            self.close()
            raise made.error or StopIteration
        return made.item

    @property
    def ready(self) -> int:
        """Number of items that can be taken without waiting."""
        return self._queue.qsize()

    def close(self) -> None:
        """Stop the thread and wait for its end; an item in the making is finished first.

        The thread is stopped as well at interpreter exit and when this is collected.
        """
        self._finalizer()
        if self._thread is not threading.current_thread():
            self._thread.join()


class _PrefetchedItem(Generic[T]):
    def __init__(self, item: T | None = None, error: BaseException | None = None) -> None:
        self.item = item
        self.error = error


def _fill_queue(
    items: Iterator[T], made: queue.Queue[_PrefetchedItem[T]], stop: threading.Event
) -> None:
    try:
        for item in items:
            made.put(_PrefetchedItem(item))
            if stop.is_set():
                return
        made.put(_PrefetchedItem())
    except BaseException as error:
        made.put(_PrefetchedItem(error=error))


def _stop_thread(
    thread: threading.Thread, made: queue.Queue[_PrefetchedItem[T]], stop: threading.Event
) -> None:
    stop.set()
    while True:  # make room for an item that waits for a slot
        try:
            made.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():
        thread.join(JOIN_TIMEOUT)
