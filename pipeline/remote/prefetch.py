"""Threads that fetch what will be needed, in the order in which it will be."""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from pipeline.dataset.manifest import Shard
from pipeline.tools.errors import DuetError


class FetchOutcome(enum.Enum):
    """What came of a wish."""

    HERE = enum.auto()
    BUSY = enum.auto()
    """Another thread or process fetches it."""
    NO_ROOM = enum.auto()
    """The cache is full of what is needed sooner."""


class Prefetcher:
    """Wishes, and at most `limit` daemon threads that last as long as there are some."""

    def __init__(
        self,
        fetch: Callable[[Shard, Sequence[Shard]], FetchOutcome],
        limit: int,
        stop: threading.Event,
    ) -> None:
        """Start nothing yet.

        Args:
            fetch: fetches a shard, given all that is wished for.
            limit: most threads.
            stop: ends them.
        """
        self.wishes: tuple[Shard, ...] = ()
        """All of the last `wish`, whether it has come by now or not."""
        self.limit = limit
        self._fetch = fetch
        self._stop = stop
        self._queue: deque[Shard] = deque()
        self._threads: set[threading.Thread] = set()
        self._changed = threading.Condition()

    def wish(self, shards: Sequence[Shard]) -> None:
        """Replace all wishes that no thread has taken up; returns at once."""
        with self._changed:
            self.wishes = tuple(shards)
            self._queue = deque(shards)
            self._changed.notify_all()
            for _ in range(min(self.limit, len(shards)) - len(self._threads)):
                thread = threading.Thread(target=self._run, name="fetch ahead", daemon=True)
                self._threads.add(thread)
                thread.start()

    def join(self, seconds: float) -> None:
        """Wait until the threads have seen that they shall stop, at most so many seconds."""
        with self._changed:
            self._queue.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        end = time.monotonic() + seconds
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _run(self) -> None:
        busy = 0
        try:
            while (task := self._next()) is not None:
                try:
                    outcome = self._fetch(*task)
                except (DuetError, OSError):
                    continue  # who needs the shard tries again, and is told
                busy = busy + 1 if outcome is FetchOutcome.BUSY else 0
                if outcome is not FetchOutcome.HERE:
                    self._later(task[0], outcome, busy)
        finally:
            with self._changed:
                self._threads.discard(threading.current_thread())

    def _next(self) -> tuple[Shard, Sequence[Shard]] | None:
        with self._changed:
            if not self._queue or self._stop.is_set():
                # Under the lock, so that a wish that comes now starts a thread of its own.
                self._threads.discard(threading.current_thread())
                return None
            return self._queue.popleft(), self.wishes

    def _later(self, shard: Shard, outcome: FetchOutcome, busy: int) -> None:
        """Put a shard back, if it is still wished for, and wait where nothing else can be done."""
        with self._changed:
            if shard not in self.wishes or shard in self._queue:
                return
            if outcome is FetchOutcome.BUSY:
                self._queue.append(shard)  # there may be others that nobody fetches
            else:
                self._queue.appendleft(shard)  # what is needed first gets the next room
            if outcome is FetchOutcome.NO_ROOM or busy >= len(self._queue):
                self._changed.wait(0.2)
