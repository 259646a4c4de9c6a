"""Helper processes that end when their parent does, however it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def tie_to_parent() -> None:
    """Initialise a helper process: Ctrl-C is its parent's matter, and it dies with its parent.

    Without the second, a parent that is killed (by hand, the scheduler, or for want of memory)
    leaves helpers behind that hold memory and may still write.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signalled_with_parent(signal.SIGKILL)


def signalled_with_parent(number: int) -> None:
    """Have this process get a signal when the thread that started it ends, however it ends."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died between the two lines
            os._exit(1)
