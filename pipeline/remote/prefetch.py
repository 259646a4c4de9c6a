"""Threads that download shards before they are needed, in the order of need."""

from __future__ import annotations

import enum
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from pipeline.dataset.manifest import Shard
from pipeline.tools.errors import DuetError


class FetchOutcome(enum.Enum):
    """Result of one attempt to bring a shard into the cache."""

    HERE = enum.auto()
    BUSY = enum.auto()
    """Another thread or process downloads it."""
    NO_ROOM = enum.auto()
    """The cache is full of shards that are needed sooner."""


class ShardPrefetcher:
    """A queue of wanted shards, and at most `limit` daemon threads that empty it."""

    def __init__(
        self,
        fetch: Callable[[Shard, Sequence[Shard]], FetchOutcome],
        limit: int,
        stop: threading.Event,
    ) -> None:
        """Start no thread yet.

        Args:
            fetch: downloads a shard; its second argument is all wanted shards.
            limit: largest number of threads.
            stop: ends the threads when set.
        """
        self.wanted: tuple[Shard, ...] = ()
        """All shards of the last `request`, whether they have arrived or not."""
        self.limit = limit
        self._fetch = fetch
        self._stop = stop
        self._queue: deque[Shard] = deque()
        self._threads: set[threading.Thread] = set()
        self._changed = threading.Condition()

    def request(self, shards: Sequence[Shard]) -> None:
        """Replace the queue; downloads that have begun go on. Returns at once."""
        with self._changed:
            self.wanted = tuple(shards)
            self._queue = deque(shards)
            self._changed.notify_all()
            for _ in range(min(self.limit, len(shards)) - len(self._threads)):
                thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
                self._threads.add(thread)
                thread.start()

    def join(self, seconds: float) -> None:
        """Empty the queue and wait for the threads to end, at most so many seconds."""
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
                    continue  # whoever needs the shard tries again, and raises
                busy = busy + 1 if outcome is FetchOutcome.BUSY else 0
                if outcome is not FetchOutcome.HERE:
                    self._requeue(task[0], outcome, busy)
        finally:
            with self._changed:
                self._threads.discard(threading.current_thread())

    def _next(self) -> tuple[Shard, Sequence[Shard]] | None:
        with self._changed:
            if not self._queue or self._stop.is_set():
                # Under the lock, so that a request that comes now starts a new thread.
                self._threads.discard(threading.current_thread())
                return None
            return self._queue.popleft(), self.wanted

    def _requeue(self, shard: Shard, outcome: FetchOutcome, busy: int) -> None:
        """Put a shard back if it is still wanted; wait if nothing else can be downloaded."""
        with self._changed:
            if shard not in self.wanted or shard in self._queue:
                return
            if outcome is FetchOutcome.BUSY:
                self._queue.append(shard)  # there may be others that nobody downloads
            else:
                self._queue.appendleft(shard)  # what is needed first gets the next free space
            if outcome is FetchOutcome.NO_ROOM or busy >= len(self._queue):
                self._changed.wait(0.2)
