"""Locks between processes that the kernel frees with their holder, however that ends (`flock`)."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

_held: set[int] = set()
"""Descriptors of the locks this process holds."""


def _forget_locks() -> None:
    # A forked child shares its parent's locks, and would keep them alive after the parent's death.
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


def try_lock(path: Path) -> int | None:
    """Take the lock at `path` (created if need be); None if another thread or process holds it.

    Returns:
        A descriptor for `unlock`.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    _held.add(descriptor)
    return descriptor


def unlock(descriptor: int) -> None:
    """Give a lock back."""
    if descriptor in _held:  # in a forked child it is closed, and the lock the parent's
        _held.discard(descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
