"""Errors that the user can act on: one line each, and the exit code of the command."""

from __future__ import annotations

import errno
import gc
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from pipeline.tools.stdio import OutputError, standard_streams
from pipeline.tools.text import clean, first_line

MEDIUM_ERRORS = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)
"""Numbers of an OSError by which a disk says that it cannot read a place of a file."""
SYSTEM_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ENOTCONN)
"""Numbers of an OSError that say nothing about the file: of the process, the machine or a mount."""
REBUILD = "make the data set anew, in another folder"
"""Advice for damage that cannot be repaired in place."""


class DuetError(Exception):
    """A failure the user can act on; the message is one line with file, value and way out.

    The line is fit for any terminal and log: no credentials, no control characters.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(clean(str(message)))


class UsageError(DuetError):
    """The command, its configuration or its input cannot work as given."""

    exit_code = 2


class SetupError(DuetError):
    """This machine or cluster lacks something the command needs."""

    exit_code = 3


class DataError(DuetError):
    """The data set is not what its manifest says."""

    exit_code = 4


class DamagedFile(DataError):
    """A file beside the shards that cannot be used."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path} cannot be read ({reason}); {REBUILD}")
        self.path, self.reason = str(path), reason
        """The file, and the damage in words."""

    def __reduce__(self) -> tuple[type[DamagedFile], tuple[str, str]]:
        return type(self), (self.path, self.reason)  # or no helper process could hand it over


class DamagedSource(UsageError):
    """A tar, parquet file or folder of images that cannot be read from a place on."""

    def __init__(
        self, message: str, source: str, offset: int = 0, reason: str = "", lost: int = 0
    ) -> None:
        """Describe the damage.

        Args:
            message: the line that refuses the source.
            source: path or address of the file or folder.
            offset: byte, of a parquet file row, from which on it cannot be read.
            reason: the fault in words.
            lost: bytes, of a parquet file rows, that cannot be read; 0 where nobody knows.
        """
        super().__init__(message)
        self.source, self.offset, self.reason, self.lost = source, offset, reason, lost

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.source, self.offset, self.reason, self.lost)


class Interrupted(KeyboardInterrupt):
    """An end that the user wanted, and of which a line has told what becomes of the work."""


def check_platform() -> None:
    """Raise unless this is Linux: DALI has builds for no other system.

    Raises:
        SetupError: it is not; names what would do.
    """
    if sys.platform != "linux":
        raise SetupError(
            "Duet runs on Linux (x86-64 or aarch64), and on Windows in WSL 2; "
            f"this is {sys.platform}"
        )


def refuse_forbidden(error: BaseException) -> None:
    """Refuse a file that may not be read, which says nothing about its content.

    Raises:
        SetupError: `error` is of a lack of permission.
    """
    if isinstance(error, PermissionError):
        raise SetupError(
            f"{error.filename} cannot be read ({error.strerror}); mend its permissions"
        ) from error


def summarize_error(error: BaseException) -> str:
    """Return one line that says what an exception says.

    The system's words for an `OSError` with a number, `no KEY` for a `KeyError`, else the first
    line of the message; the name of the class if there is none.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or errno.errorcode.get(error.errno, str(error))
    line = first_line(str(error)) or type(error).__name__
    return f"no {line}" if isinstance(error, KeyError) else line


@contextmanager
def hint_resume(kept: str) -> Iterator[None]:
    """Say, where the user ends the block, that the same command resumes; `kept`: what stays.

    Raises:
        Interrupted: the user has ended it.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        sys.stderr.write(f"\nstopped; {kept}, and the same command resumes there\n")
        raise Interrupted from error


def handle_end(handler: Callable[[int, FrameType | None], Any]) -> dict[int, Any]:
    """Have a handler called at SIGTERM, and at SIGHUP: the terminal or the connection is gone.

    A SIGHUP that is ignored stays so, as `nohup` wants it.

    Returns:
        The handlers of before.
    """
    before: dict[int, Any] = {signal.SIGTERM: signal.signal(signal.SIGTERM, handler)}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, handler)
    return before


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and end the process with its exit code.

    A `DuetError` becomes one line on stderr, Ctrl-C, SIGTERM and SIGHUP become exit code 130. If
    the reader of standard output has gone (`| head`), the process ends with 141 and no message.
    """
    if sys.platform == "linux":
        handle_end(signal.default_int_handler)  # cleans up as Ctrl-C does
    with standard_streams():
        code, said = _call(main)
        with suppress(BrokenPipeError):
            sys.stderr.write(said)
    # The interpreter's last collections would visit all that torch made: 0.8 CPU seconds.
    gc.freeze()
    sys.exit(code)


def _call(main: Callable[[], int | None]) -> tuple[int, str]:
    """Return the exit code of an entry point, and what is to be said on stderr."""
    try:
        try:
            check_platform()
            code = main() or 0
        except SystemExit as error:  # tyro's, for --help or a wrong flag
            said = "" if isinstance(error.code, int | None) else f"{error.code}\n"
            code = error.code if isinstance(error.code, int) else int(bool(said))
            sys.stderr.write(said)
        sys.stdout.flush()
    except DuetError as error:
        return error.exit_code, f"error: {error}\n"
    except OutputError as error:
        return 1, f"error: standard output cannot be written ({error}); name a file with room\n"
    except Interrupted:
        return 130, ""
    except KeyboardInterrupt:
        return 130, "\ninterrupted\n"
    except BrokenPipeError:
        return 141, ""
    except OSError as error:  # of a file or disk that no other place has named better
        is_name = error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
        named = f"{clean(str(error.filename))}: " if error.filename is not None else ""
        code = UsageError.exit_code if is_name else SetupError.exit_code
        return code, f"error: {named}{summarize_error(error)}; mend it, or name another\n"
    except MemoryError as error:
        return SetupError.exit_code, (
            f"error: out of memory ({summarize_error(error)}); ask for less, or use a larger "
            "machine\n"
        )
    except Exception:
        return 1, traceback.format_exc()
    return code, ""
