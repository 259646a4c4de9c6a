"""Small files of a target, read some ahead: a store answers each of them late, but many at once."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

THREADS = 16

T = TypeVar("T")
R = TypeVar("R")


def ahead(read: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
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
