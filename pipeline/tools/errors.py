"""What went wrong for the user, in one line, and the exit code that goes with it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

REBUILD = "delete the data set's folder and build it again"
"""The way out of damage that cannot be mended in place."""


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


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and leave the process with the exit code of DESIGN.

    A `DuetError` becomes one line on stderr; Ctrl-C and SIGTERM become exit code 130; a reader of
    our output that went away (`| head`) ends us quietly.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` tidies up, as Ctrl-C does
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
