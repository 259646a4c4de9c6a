"""Errors that the user can act on: one line each, and the exit code of the command."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

REBUILD = "delete the data set's folder and build it again"
"""Advice for damage that cannot be repaired in place."""


class DuetError(Exception):
    """A failure the user can act on; the message is one line with file, value and way out."""

    exit_code = 1


class UsageError(DuetError):
    """The command, its configuration or its input cannot work as given."""

    exit_code = 2


class SetupError(DuetError):
    """This machine or cluster lacks something the command needs."""

    exit_code = 3


class DataError(DuetError):
    """The data set is not what its manifest says."""

    exit_code = 4


def summarize_error(error: BaseException) -> str:
    """Return one line that says what an exception says.

    The system's words for an `OSError` with a number, `no KEY` for a `KeyError`, else the first
    line of the message; the name of the class if there is none.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or errno.errorcode.get(error.errno, str(error))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"no {lines[0]}" if isinstance(error, KeyError) else lines[0]


@contextmanager
def hint_resume(kept: str) -> Iterator[None]:
    """Say, where the user ends the block, that the same command resumes; `kept`: what stays."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped; {kept}, and the same command goes on from there\n")
        raise


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and end the process with its exit code.

    A `DuetError` becomes one line on stderr, Ctrl-C and SIGTERM become exit code 130. If the reader
    of standard output has gone (`| head`), the process ends with 141 and no message.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    try:
        sys.exit(main() or 0)
    except DuetError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout once more on exit: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
