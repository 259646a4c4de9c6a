"""Command-line arguments: parsing, and one check for each kind of value."""

from __future__ import annotations

import difflib
import io
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import ClassVar, TypeVar

import tyro

from pipeline.tools.errors import UsageError
from pipeline.tools.help import Flag, format_help, list_flags
from pipeline.tools.text import clean

MOST_PROCESSES = 1024
"""Most helper processes of a command."""
MOST_SEED = 2**63 - 1
ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+:(/|$)")
"""Beginning of an address, also after `Path` has made one slash of two."""
_command_name = ""


class Options:
    """Base class of the flags of a command: a frozen dataclass, whose docstring begins its help."""

    EXAMPLES: ClassVar[tuple[str, ...]] = ()
    """Calls that the help shows: the words after the name of the command."""
    SECTIONS: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Groups of flags in the help: title, and names of the fields. The others come first."""
    RENAMED: ClassVar[Mapping[str, str]] = {}
    """Old spellings of flags, which still work, and the new ones."""
    MEANT: ClassVar[Mapping[str, str]] = {}
    """Names that other programs give to a field, and the field: the way out of a wrong flag."""


T = TypeVar("T", bound=Options)


@contextmanager
def use_command_name(name: str) -> Iterator[None]:
    """Have a command be called `name` in its help and its errors, for as long as it runs."""
    global _command_name
    before, _command_name = _command_name, name
    try:
        yield
    finally:
        _command_name = before


def format_command(prog: str, words: Sequence[str]) -> str:
    """Return a command as one would type it, without the credentials of addresses.

    Args:
        prog: its name, unless `use_command_name` names another.
        words: the words after it.
    """
    return clean(shlex.join([*(_command_name or prog).split(), *words]))


def parse_options(
    kind: type[T], argv: Sequence[str] | None, prog: str, default: T | None = None
) -> T:
    """Parse the words of a command into a dataclass.

    Args:
        kind: the dataclass.
        argv: words after the command's name; None: those of this process.
        prog: name of the command, unless `use_command_name` names another.
        default: values of what is not given; None: those of `kind`.

    Raises:
        UsageError: a flag is unknown, missing, empty or has a value that it does not take, or a
            local file or folder is an address; one line.
        SystemExit: code 0 after --help.
    """
    words = rename_flags(kind, sys.argv[1:] if argv is None else argv)
    name = _command_name or prog
    if {"-h", "--help"} & set(words):
        sys.stdout.write(format_options(kind, name))
        raise SystemExit(0)
    check_flags(kind, words, name)
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            options = tyro.cli(kind, args=words, prog=name, default=default)
    except SystemExit as error:
        raise UsageError(f"{summarize_box(said.getvalue())}; {name} --help says more") from error
    assert options is not None
    for field, value in vars(options).items():
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and ADDRESS.match(str(path)):
                raise UsageError(
                    f"{field} {str(path).replace(':/', '://', 1)} is an address; name a local one"
                )
    return options


def rename_flags(kind: type[Options], words: Sequence[str]) -> list[str]:
    """Return the words of a command line with the new spelling of each flag."""
    found = []
    for word in words:
        flag, equals, value = word.partition("=")
        found.append(kind.RENAMED.get(flag.replace("_", "-"), flag) + equals + value)
    return found


def format_options(kind: type[Options], name: str, width: int | None = None) -> str:
    """Return the help of a command called `name`, in `width` columns or the terminal's."""
    return format_help(
        kind, name, description=kind.__doc__ or "", examples=kind.EXAMPLES,
        sections=kind.SECTIONS, width=width,
    )  # fmt: skip


def check_flags(kind: type[Options], words: Sequence[str], name: str) -> None:
    """Check that all flags are known and have a value that they take, each fault in one line.

    Args:
        kind: the dataclass.
        words: words of the command line; an old spelling is known, too.
        name: name of the command.

    Raises:
        UsageError: names the flag, and the nearest, what it takes, or the way to all flags.
    """
    known = {word: flag for flag in list_flags(kind) for word in flag.spellings}
    asking: Flag | None = None
    """The flag that the next word is a value of."""
    for word in rename_flags(kind, words):
        if word == "--":
            break
        name_of, equals, value = word.partition("=")
        if not word.startswith("--") and word not in known:
            _check_value(asking, word)
            asking = asking if asking and asking.is_list else None
            continue
        _refuse_no_value(asking)
        asking = known.get(name_of.replace("_", "-"))
        if asking is None:
            raise UsageError(_describe_unknown(kind, name_of.replace("_", "-"), known, name))
        if equals:
            _check_value(asking, value)
        if equals or asking.is_switch:
            asking = None
    _refuse_no_value(asking)


def _refuse_no_value(flag: Flag | None) -> None:
    if flag is not None and not flag.is_list:
        raise UsageError(f"{flag.names[-1]} has no value; give {flag.takes}")


def _check_value(flag: Flag | None, value: str) -> None:
    """Refuse an empty value, and one that is not of the flag's type; None: an argument's value."""
    if not value and (flag is None or not flag.may_be_empty):
        what = flag.names[-1] if flag else "an argument"
        raise UsageError(f"{what} is empty (a variable that is not set?); give a value")
    if flag is not None and not flag.accepts(value):
        raise UsageError(f"{flag.names[-1]} is {value!r}; it takes {flag.takes}")


def _describe_unknown(kind: type[Options], flag: str, known: Iterable[str], name: str) -> str:
    meant = kind.MEANT.get(flag[2:].replace("-", "_"))
    near = difflib.get_close_matches(flag, known, n=2)
    near = [f"--{meant.replace('_', '-')}"] if meant else near
    hint = f"did you mean {' or '.join(near)}?" if near else f"{name} --help lists them"
    return f"{name} has no flag {flag}; {hint}"


def summarize_box(text: str) -> str:
    """Return what a box of tyro's says about a wrong command line, in one line."""
    lines: list[str] = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()[1:]:  # the first is a title
        if re.search(r"\w", line):
            lines.append(line.strip("│"))
        elif lines:
            break  # a rule; tyro's advice is below it
    if lines and lines[0].lstrip().startswith("Missing from"):
        margins = [len(line) - len(line.lstrip()) for line in lines[1:]]  # texts are further right
        missing = [
            line.split()[0]
            for line, margin in zip(lines[1:], margins, strict=True)
            if margin == min(margins)
        ]
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return " ".join(" ".join(lines).split()).rstrip(".")


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
