"""Standard output and error of a command: any encoding, closed, full, and nothing raw on them."""

from __future__ import annotations

import codecs
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from pipeline.tools.text import escape_controls, hide_credentials

ASCII = {
    "×": "x",
    "±": "+-",
    "–": "-",
    "—": "-",
    "…": "...",
    "·": ".",
    "→": "->",
    "━": "=",
    "╌": "-",
    "°": " deg",
    **dict(zip("▁▂▃▄▅▆▇█", "_.-~=+*#", strict=True)),
}
"""Replacement of a character that the encoding lacks; of any other, its number is shown."""
_COLOR = re.compile("(\x1b\\[[0-9;]*m)")


class OutputError(Exception):
    """Standard output did not take what was written (a full disk, closed); it takes no more."""


def _replace_characters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    lost = error.object[error.start : error.end]
    shown = (ASCII.get(one) or one.encode("ascii", "backslashreplace").decode() for one in lost)
    return "".join(shown), error.end


codecs.register_error("duet", _replace_characters)


class _Output:
    """A standard stream that cleans text and fails at most once, from then on into nothing."""

    has_written = False
    """True once any of these streams was written to."""

    def __init__(self, stream: TextIO, clean: Callable[[str], str], is_vital: bool) -> None:
        self._stream, self._clean, self._is_vital = stream, clean, is_vital

    @property
    def rich_proxied_file(self) -> _Output:
        """The same stream for rich, whose own control characters must pass."""
        return _Output(self._stream, str, self._is_vital)

    def write(self, text: str) -> int:
        """Write a text."""
        _Output.has_written = True
        with self._fail_once():
            self._stream.write(self._clean(text))
        return len(text)

    def writelines(self, lines: Iterator[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand what was written to the system."""
        with self._fail_once():
            self._stream.flush()

    @contextmanager
    def _fail_once(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._close()
            raise
        except (OSError, ValueError) as error:  # ValueError: it was closed by Python code
            self._close()
            if self._is_vital:
                reason = getattr(error, "strerror", None) or "it is closed"
                raise OutputError(reason) from error

    def _close(self) -> None:
        """Send what follows, and what is still in the buffer, into nothing."""
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self._stream.fileno())
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def has_written() -> bool:
    """Return whether this process has written to the streams of `standard_streams`."""
    return _Output.has_written


@contextmanager
def standard_streams() -> Iterator[None]:
    """Replace `sys.stdout` and `sys.stderr` in the block by streams fit for any terminal.

    Characters that the encoding lacks are replaced, control characters of names and messages are
    escaped, and addresses lose their credentials on standard error. Writing to standard output
    raises `OutputError` where it is closed or full; standard error is silent then.
    """
    for name, flags in (("stdin", os.O_RDONLY), ("stdout", os.O_RDONLY), ("stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:  # closed; the next file that is opened would take its place
            number = os.open(os.devnull, flags)
            os.set_inheritable(number, number <= 2)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="duet")
    out, err = before
    sys.stdout = cast(TextIO, _Output(out, _make_cleaner(out), True))
    sys.stderr = cast(TextIO, _Output(err, _make_cleaner(err, hide_credentials), False))
    try:
        yield
    finally:
        for output in (sys.stdout, sys.stderr):
            with suppress(BrokenPipeError, OutputError):
                output.flush()
        sys.stdout, sys.stderr = before


def _make_cleaner(stream: TextIO, mask: Callable[[str], str] = str) -> Callable[[str], str]:
    """Return the function that cleans what is written; colors of a terminal pass."""
    if not stream.isatty():
        return lambda text: escape_controls(mask(text), keep="\n\t\r")

    def clean(text: str) -> str:
        parts = _COLOR.split(mask(text))
        parts[::2] = (escape_controls(part, keep="\n\t\r") for part in parts[::2])
        return "".join(parts)

    return clean
