"""Command-line arguments: parsing, and one check for each kind of value."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from pipeline.tools.errors import UsageError
from pipeline.tools.text import clean

T = TypeVar("T")

MOST_PROCESSES = 1024
"""Most helper processes of a command."""
MOST_SEED = 2**63 - 1
ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+:(/|$)")
"""Beginning of an address, also after `Path` has made one slash of two."""
_command_name = ""


def set_command_name(name: str) -> None:
    """Set the name under which this process's command was called, for its --help."""
    global _command_name
    _command_name = name


def format_command(prog: str, words: Sequence[str]) -> str:
    """Return a command as one would type it, without the credentials of addresses.

    Args:
        prog: its name, unless `set_command_name` has set another.
        words: the words after it.
    """
    return clean(shlex.join([*(_command_name or prog).split(), *words]))


def parse_options(
    kind: type[T], argv: Sequence[str] | None, prog: str, description: str | None = None
) -> T:
    """Parse the words of a command into a dataclass.

    Args:
        kind: the dataclass.
        argv: words after the command's name; None: those of this process.
        prog: name of the command, unless `set_command_name` has set another.
        description: text of --help, instead of the docstring of `kind`.

    Raises:
        UsageError: a word is empty, such as that of a variable of the shell which is not set, or
            a local file or folder is an address.
        SystemExit: code 2 for a wrong flag, 0 for --help (tyro has printed the text).
    """
    words = sys.argv[1:] if argv is None else list(argv)
    may_be_empty = set(_list_empty_flags(kind))
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=")
        if word.startswith("--") and equals and not value:
            name = flag
        elif not word:
            name = before if before.startswith("--") else "an argument"
        else:
            continue
        if name.replace("_", "-") not in may_be_empty:
            raise UsageError(f"{name} is empty (a variable that is not set?); give a value")
    name = _command_name or prog
    description = description and description.replace(prog, name)
    options = tyro.cli(kind, args=words, prog=name, description=description)
    for name, value in vars(options).items():
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and ADDRESS.match(str(path)):
                raise UsageError(
                    f"{name} {str(path).replace(':/', '://', 1)} is an address; name a local one"
                )
    return options


def _list_empty_flags(kind: Any) -> Iterator[str]:
    """Yield the flags of texts that are empty by default, in nested dataclasses too."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        inner = hints[field.name]
        if is_dataclass(inner):
            yield from _list_empty_flags(inner)
        elif field.default == "":
            yield "--" + field.name.replace("_", "-")


def require_range(flag: str, value: float, low: float, high: float, hint: str = "") -> None:
    """Check that a number of the command line is from `low` to `high`.

    Args:
        flag: name of the flag, or of the field that it sets.
        value: the number.
        low: least value.
        high: largest value.
        hint: the range in words, instead of "LOW to HIGH".

    Raises:
        UsageError: it is not.
    """
    if not low <= value <= high:  # NaN is neither
        name = "--" + flag.removeprefix("--").replace("_", "-")
        raise UsageError(f"{name} {value} is out of range; give {hint or f'{low} to {high}'}")
