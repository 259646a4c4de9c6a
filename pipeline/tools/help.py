"""The flags of a command, read from its dataclass, and its --help.

tyro parses. Its own help has neither groups nor examples, and takes longer to read the texts of
seventy fields than all of `duet train --help` takes here.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro

WIDEST = 100
"""Most columns of a line: longer ones are hard to read."""
NAMES = 28
"""Columns before the text of a flag."""
KINDS: dict[object, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}
"""Values of a type, as help shows them."""
NAMED = {"data": "DATA", "run": "RUN", "replicas": "N"}
"""Values of fields that have a name of their own."""


class Flag(NamedTuple):
    """A flag or argument of a command."""

    field: str
    """Name of the field that it sets."""
    names: tuple[str, ...]
    """Spellings, such as -k and --k, the one that help shows first; of an argument its metavar."""
    metavar: str
    """Value that it takes, as help shows it; "" for a switch."""
    kind: str
    """Type of its value, or of one of them: N, X, TEXT, PATH; "" for any other."""
    choices: tuple[str, ...]
    """Values that it takes; empty: any of its type."""
    text: str
    default: str
    """Default as help shows it; "" where there is nothing to show."""
    is_required: bool
    is_positional: bool
    is_list: bool
    """True if it takes any number of values."""
    is_switch: bool
    """True if it takes no value; --no-NAME is its opposite."""
    may_be_empty: bool
    """True if its value may be the empty text."""

    @property
    def spellings(self) -> tuple[str, ...]:
        """All words by which it may be given; none for an argument."""
        if self.is_positional:
            return ()
        return (*self.names, f"--no-{self.names[-1][2:]}") if self.is_switch else self.names

    @property
    def takes(self) -> str:
        """The values that it takes, in words."""
        if self.choices:
            return " or ".join(self.choices)
        return {"N": "a whole number", "X": "a number"}.get(self.kind, "one")

    def accepts(self, value: str) -> bool:
        """Return whether a word is of its type; what the value may be is checked elsewhere."""
        if self.choices:
            return value in self.choices
        try:
            {"N": int, "X": float}.get(self.kind, str)(value)
        except ValueError:
            return False
        return True

    @property
    def title(self) -> str:
        """Name and value as help shows them."""
        if self.is_positional:
            return self.metavar
        name = self.names[0]
        if self.is_switch and self.default:
            name = f"--[no-]{name[2:]}"
        return f"{name} {self.metavar}".rstrip()


def list_flags(kind: Any, *, with_text: bool = False) -> list[Flag]:
    """List the flags of a dataclass; those of a dataclass in it are in its field's place.

    Args:
        kind: the dataclass; what a dataclass in it holds has no prefix.
        with_text: read the texts from the source, too: 10 ms a file.
    """
    hints = get_type_hints(kind, include_extras=True)
    texts = read_field_texts(kind) if with_text else {}
    found: list[Flag] = []
    for one in fields(kind):
        hint, markers = hints[one.name], list[Any]()
        if get_origin(hint) is Annotated:
            hint, *markers = get_args(hint)
        if tyro.conf.Suppress in markers:
            continue
        if is_dataclass(hint):
            found += list_flags(hint, with_text=with_text)
        else:
            found.append(_make_flag(one, hint, markers, texts.get(one.name, "")))
    return found


def _make_flag(one: Field[Any], hint: Any, markers: Sequence[Any], text: str) -> Flag:
    given = {
        key: value
        for marker in markers
        for key in ("name", "metavar", "aliases")
        if (value := getattr(marker, key, None)) is not None
    }
    kind, choices, is_list = _describe_type(hint)
    metavar = "{" + ",".join(choices) + "}" if choices else NAMED.get(one.name, kind or "VALUE")
    metavar = given.get("metavar", f"{metavar} ..." if is_list else metavar)
    is_positional = tyro.conf.Positional in markers
    name = "--" + str(given.get("name", one.name)).replace("_", "-")
    is_required = one.default is MISSING and one.default_factory is MISSING
    return Flag(
        field=one.name,
        names=(metavar,) if is_positional else (*given.get("aliases", ()), name),
        metavar="" if hint is bool else metavar,
        kind=kind,
        choices=choices,
        text=text,
        default="" if is_required else _format_default(one.default),
        is_required=is_required,
        is_positional=is_positional,
        is_list=is_list,
        is_switch=hint is bool,
        may_be_empty=one.default == "",
    )


def _describe_type(hint: Any) -> tuple[str, tuple[str, ...], bool]:
    """Return the kind of a type's values, its choices, and whether it takes several values."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        kinds = [one for one in arguments if one is not NoneType]
        return _describe_type(kinds[0]) if len(kinds) == 1 else ("", (), False)
    if get_origin(hint) is Literal:
        return "", tuple(map(str, arguments)), False
    if get_origin(hint) is tuple:
        kind, choices, _ = _describe_type(arguments[0])
        return kind, choices, True
    return KINDS.get(hint, ""), (), False


def _format_default(value: object) -> str:
    if value is MISSING or value is None or value is False or value in ("", ()):
        return ""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def read_field_texts(kind: type) -> dict[str, str]:
    """Return the text below each field of a class and its bases, as one line; {} without source."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        path = getattr(sys.modules[base.__module__], "__file__", None)
        if path is None or not Path(path).is_file():
            continue
        body = _read_classes(path).get(base.__name__, [])
        for one, following in itertools.pairwise(body):
            match one, following:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


@cache
def _read_classes(path: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return {one.name: one.body for one in tree.body if isinstance(one, ast.ClassDef)}


def format_help(
    kind: Any,
    name: str,
    *,
    description: str,
    examples: Sequence[str] = (),
    sections: Mapping[str, Sequence[str]] | None = None,
    width: int | None = None,
) -> str:
    """Return the --help of a command.

    Args:
        kind: dataclass of its flags.
        name: name of the command.
        description: text below the usage; indented lines stay as they are.
        examples: words after the name, each a call; `#` begins a remark.
        sections: title of each group of flags, and the fields that set them; the flags of no
            group come first.
        width: columns; None: the terminal's.
    """
    width = min(width or shutil.get_terminal_size().columns, WIDEST)
    flags = list_flags(kind, with_text=True)
    arguments = [one for one in flags if one.is_positional]
    needed = [one for one in flags if one.is_required and not one.is_positional]
    options = [one for one in flags if not one.is_positional]
    words = [one.metavar if one.is_required else f"[{one.metavar}]" for one in arguments]
    words += [f"{one.names[0]} {one.metavar}" for one in needed]
    usage = textwrap.wrap(
        " ".join(["usage:", name, *words, "[flags]"]), width, subsequent_indent=" " * 7
    )
    lines = [*usage, "", *_wrap_paragraphs(description, width), ""]
    if arguments:
        for one in arguments:
            lines += _format_flag(one, width)
        lines.append("")
    grouped = sections or {}
    placed = {field for names in grouped.values() for field in names}
    rest = [one.field for one in options if one.field not in placed]
    for title, names in {"flags": rest, **grouped}.items():
        members = [one for field in names for one in options if one.field == field]
        lines.append(f"{title}:")
        for one in members:
            lines += _format_flag(one, width)
        lines.append("")
    if examples:
        lines += ["examples:", *(f"  {name} {example}" for example in examples), ""]
    return "\n".join(lines)


def _wrap_paragraphs(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        is_code = paragraph.startswith(" ")
        lines += ["", *(paragraph.splitlines() if is_code else wrap(paragraph, width))]
    return lines[1:]


def _format_flag(flag: Flag, width: int) -> list[str]:
    text = flag.text
    if flag.default and not flag.is_switch and "default:" not in text:
        text += f" (default {flag.default})"
    column = wrap(text, width - NAMES)
    title = f"  {flag.title}"
    if len(title) > NAMES - 2:
        return [title, *(" " * NAMES + line for line in column)]
    first, *more = column or [""]
    return [f"{title:<{NAMES}}{first}".rstrip(), *(" " * NAMES + line for line in more)]


def wrap(text: str, width: int) -> list[str]:
    """Wrap a text into lines of at most `width` columns, the last of which is not a lone word."""
    text = " ".join(text.split())
    for columns in range(width, width // 2, -1):
        lines = textwrap.wrap(text, columns, break_long_words=False, break_on_hyphens=False)
        if len(lines) < 2 or " " in lines[-1]:
            return lines
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
