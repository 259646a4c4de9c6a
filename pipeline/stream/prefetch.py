"""An iterator that is run ahead of need, in a thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

JOIN_SECONDS = 5.0
"""How long the end of the interpreter waits for a thread that is in the middle of something."""


class Prefetcher(Generic[T]):
    """The items of an iterator, the next few of them made beforehand."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        """Start at once; at most `depth` items (and one in the making) wait to be taken."""
        self._queue: queue.Queue[_Made[T]] = queue.Queue(depth)
        stop = threading.Event()
        # The thread must not know `self`: a forgotten Prefetcher could then never be collected.
        thread = threading.Thread(target=_make, args=(items, self._queue, stop), daemon=True)
        thread.start()
        self._thread = thread
        self._finalizer = weakref.finalize(self, _end, thread, self._queue, stop)

    def take(self) -> T:
        """Return the next item, waiting for it if need be.

        Raises:
            StopIteration: there are no more.
            Exception: what the iterator raised in its place; once, then StopIteration.
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
        """Items that can be taken without waiting."""
        return self._queue.qsize()

    def close(self) -> None:
        """Stop the thread and wait for its end, once the item in the making is made.

        At interpreter exit, and when nobody refers to this any more, it is stopped too.
        """
        self._finalizer()
        if self._thread is not threading.current_thread():
            self._thread.join()


class _Made(Generic[T]):
    def __init__(self, item: T | None = None, error: BaseException | None = None) -> None:
        self.item = item
        self.error = error


def _make(items: Iterator[T], made: queue.Queue[_Made[T]], stop: threading.Event) -> None:
    try:
        for item in items:
            made.put(_Made(item))
            if stop.is_set():
                return
        made.put(_Made())
    except BaseException as error:
        made.put(_Made(error=error))


def _end(thread: threading.Thread, made: queue.Queue[_Made[T]], stop: threading.Event) -> None:
    stop.set()
    while True:  # make room for an item that waits to be put down
        try:
            made.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():
        thread.join(JOIN_SECONDS)
