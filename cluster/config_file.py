"""Settings from a TOML file and from flags, and back into a file."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from cluster.config import LENGTH, Config
from pipeline.tools.errors import UsageError

DATA_KEY = "data_sha256"
"""The one key of RUN/config.toml that is no setting: SHA-256 of the data set's manifest."""
TEXTS = tuple[str, ...]
EITHER = int | str

TYPES = get_type_hints(Config)


@dataclass(frozen=True, kw_only=True)
class Command:
    """Train both columns from a sealed data set; the same command again continues the run."""

    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")]
    """TOML file with any of the settings below; flags given here win over it."""
    data: str
    """Data set, made by pipeline.build_shards: a folder, or an address such as s3://bucket/folder."""
    run: Path
    """Folder for checkpoints and numbers; made if need be."""
    tuning: Path | None = None
    """A file of pipeline.throughput --tune; its settings win over CONFIG's, flags over both."""
    measure: bool = False
    """Do not train: say where a step's time goes, into RUN/measure.json and RUN/throughput.html."""
    settings: Annotated[Config, tyro.conf.OmitArgPrefixes]


@dataclass(frozen=True, kw_only=True)
class _Unchecked(Config):
    # Read without the checks: a value that cannot work gets our one line, not tyro's box.
    __doc__ = Config.__doc__

    def __post_init__(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class _Raw(Command):
    settings: Annotated[_Unchecked, tyro.conf.OmitArgPrefixes]


def parse(argv: Sequence[str]) -> Command:
    """Read the command line and the config file it names.

    Raises:
        UsageError: the file is missing or wrong, or a setting is; one line.
        SystemExit: code 2 for a wrong flag, 0 for --help (tyro has spoken).
    """
    user = list(argv)
    first = _read(user)
    table = load(first.config)
    if first.tuning is not None:
        table |= load(first.tuning)
    given = {word.split("=")[0] for word in user}
    if given & {f"--{name}" for name in LENGTH}:  # the file's other way to say it must not win
        table = {key: value for key, value in table.items() if key not in LENGTH}
    raw = _read([*_as_flags(table), *user])
    try:
        settings = Config(**asdict(raw.settings))
    except ValueError as error:
        raise UsageError(f"{error} ({raw.config} and the flags given)") from error
    return Command(
        config=raw.config, data=raw.data, run=raw.run, tuning=raw.tuning, measure=raw.measure,
        settings=settings,
    )  # fmt: skip


def _read(words: list[str]) -> _Raw:
    return tyro.cli(_Raw, args=words, prog="python -m cluster.train", description=Command.__doc__)


def load(path: Path) -> dict[str, Any]:
    """Read a config file, checking names and types of its keys but not yet their values.

    Raises:
        UsageError: names the file, the key and what it should be.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(f"config file {path} cannot be read ({reason}); see configs/") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config file {path} is not TOML: {error}") from error
    table.pop(DATA_KEY, None)
    for key, value in table.items():
        if key not in TYPES:
            near = difflib.get_close_matches(key, TYPES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(TYPES)}"
            raise UsageError(f"config file {path}: no setting {key!r}; {hint}")
        if not fits(value, TYPES[key]):
            raise UsageError(
                f"config file {path}: {key} is {value!r}; it takes {_words(TYPES[key])}"
            )
    return {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}


def fits(value: object, kind: Any) -> bool:
    """Whether a value of a TOML file is of the kind that a setting takes (one of `TYPES`)."""
    if kind == TEXTS:
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind == EITHER:
        return type(value) in (int, str)
    if choices := get_args(kind):
        return value in choices
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _words(kind: Any) -> str:
    if kind == TEXTS:
        return "a list of texts"
    if kind == EITHER:
        return "a whole number or text"
    if choices := get_args(kind):
        return " or ".join(repr(choice) for choice in choices)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]


def _as_flags(table: dict[str, Any]) -> list[str]:
    """Settings as flags, such that any word may follow: a list takes all words up to a flag."""
    lists = {key: value for key, value in table.items() if isinstance(value, tuple)}
    last = {"width": Config.width} | {key: table[key] for key in table if key not in lists}
    return [word for key, value in (lists | last).items() for word in as_flag(key, value)]


def as_flag(key: str, value: object) -> list[str]:
    """A setting as tyro's flags."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, tuple):
        return [f"--{name}", *value]
    return [f"--{name}", str(value)]


def as_toml(config: Config, data_sha256: str) -> str:
    """The effective config as a file that `parse` reads back to the same config."""
    lines = ["# Written by cluster.train: every setting of this run, as it was used."]
    for field in fields(config):
        value = getattr(config, field.name)
        lines.append(f"{field.name} = {json.dumps(value)}")
    lines.append("# The data set: SHA-256 of its manifest.json.")
    lines.append(f'{DATA_KEY} = "{data_sha256}"')
    return "\n".join(lines) + "\n"


def read_back(path: Path) -> tuple[Config, str]:
    """Read RUN/config.toml: the settings of the run, and the identity of its data set.

    Raises:
        UsageError: it cannot be read.
    """
    table = load(path)
    data = tomllib.loads(path.read_text(encoding="utf-8")).get(DATA_KEY, "")
    try:
        return Config(**table), str(data)
    except ValueError as error:
        raise UsageError(f"config file {path}: {error}") from error
