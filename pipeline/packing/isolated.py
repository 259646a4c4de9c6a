"""A call in a process of its own: what it crashes, it crashes alone."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")


class Crash(Exception):
    """The process ended by a signal or without a result; the message is the signal's name."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name if number else "no result")
        self.from_outside = number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def isolated(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Return what `call` returns in a fork of this process.

    Some 10 ms a call, so for suspects only. The caller must have no other threads that hold locks.

    Raises:
        Crash: the process did not live to return it.
    """
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(ours)
            with open(theirs, "wb") as pipe:
                pickle.dump(call(*arguments, **options), pipe)
            code = 0
        finally:
            os._exit(code)  # neither tidy up nor flush what is the parent's
    os.close(theirs)
    with open(ours, "rb") as pipe:
        result = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Crash(os.WTERMSIG(status))
    if os.waitstatus_to_exitcode(status) != 0:
        raise Crash(0)
    return cast(T, pickle.loads(result))
