"""Learning rates set by hand: the file RUN/rates.toml, which a training run takes and puts aside.

    lr = 0.001            # of the weights
    lr_bias = 0.002       # of the biases
    lr.conv1 = 0          # of one layer's weights; lr_bias.conv1 of its biases; 0 freezes
    drop = true           # divide all rates by plateau_factor

A value is absolute and holds until the schedule, or another such file, sets that rate again. What
was taken after step S becomes RUN/rates-applied-S.toml: a run that goes on from before S takes it
again after S, so that it comes out the same; delete it to prevent that.
"""

from __future__ import annotations

import re
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from cluster.rate_events import BY_HAND, Event, Recipe
from cluster.run.events import Tell, Warned
from model.changes import nearest, rate_names
from model.schedule import DROP
from pipeline.tools.files import sync_folder

FILE = "rates.toml"
APPLIED = re.compile(r"rates-applied-(\d+)(?:-(\d+))?\.toml")
SETTLED = 0.2
"""Seconds for which a file must not change before it is read: it may be half written."""


def parse(text: str, recipe: Recipe) -> dict[str, float]:
    """Read the settings of a file.

    Raises:
        ValueError: one line that says what is wrong and what would do.
    """
    # In TOML nothing can be a value and a table: `lr.conv1` must be a name of its own.
    quoted = re.sub(r"(?m)^(\s*)((?:lr|lr_bias)\.\w+)(\s*=)", r'\1"\2"\3', text)
    try:
        table = tomllib.loads(quoted)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is not TOML ({error}); write lines such as lr = 0.001") from error
    known = [*rate_names(recipe.layers), DROP]
    settings: dict[str, float] = {}
    for name, value in _flat(table).items():
        if name not in known:
            raise ValueError(f"no rate is called {name!r}; {nearest(name, known)}")
        settings |= _setting(name, value, recipe)
    if not settings:
        raise ValueError("it sets nothing; write lines such as lr = 0.001")
    return settings


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """Names with dots, also of what was written as tables (`[lr]`, `conv1 = 0`)."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found


def _setting(name: str, value: object, recipe: Recipe) -> dict[str, float]:
    if name == DROP:
        if not isinstance(value, bool):
            raise ValueError(f"drop is {value!r}; it takes true")
        return recipe.drop() if value else {}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= sys.float_info.max:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it takes a number from 0 up")
    return {name: float(value)}  # type: ignore[arg-type]


def take(run: Path, step: int, recipe: Recipe, tell: Tell) -> Event | None:
    """Take RUN/rates.toml, if there is one, and put it aside; never raises.

    A file that cannot be used is put aside as rates-bad-STEP.toml, with a warning.
    """
    path = run / FILE
    try:
        raw = _settled(path)
        if raw is None:
            return None
        try:
            settings = parse(_text(raw), recipe)
        except ValueError as error:
            aside = _move(path, f"rates-bad-{step}")
            tell(Warned(f"{path} is passed over: {error} (it is now {aside.name})"))
            return None
        _move(path, f"rates-applied-{step}")
    except OSError as error:
        tell(Warned(f"{path} cannot be used ({error.strerror}); the rates stay as they are"))
        return None
    return Event(step, BY_HAND, settings)


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not text; write lines such as lr = 0.001") from error


def _settled(path: Path) -> bytes | None:
    """What is in a file that nobody is writing any more; None if there is none yet."""
    if not path.exists():
        return None
    raw = path.read_bytes()
    time.sleep(SETTLED)
    if not raw.strip() or path.read_bytes() != raw:
        return None  # still being written: next time
    return raw


def _move(path: Path, name: str) -> Path:
    """Rename a file to NAME.toml, or to NAME-2.toml and so on if that is taken."""
    aside = path.with_name(f"{name}.toml")
    number = 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{name}-{number}.toml")
    path.rename(aside)
    sync_folder(path.parent)
    return aside


def applied(run: Path, recipe: Recipe, tell: Tell) -> list[Event]:
    """What was taken before, in order; a file that cannot be read any more is named and left."""
    found = []
    for path in run.glob("rates-applied-*.toml"):
        if match := APPLIED.fullmatch(path.name):
            found.append((int(match[1]), int(match[2] or 1), path))
    events = []
    for step, _, path in sorted(found):
        try:
            events.append(Event(step, BY_HAND, parse(path.read_text(encoding="utf-8"), recipe)))
        except (OSError, ValueError) as error:
            tell(Warned(f"{path} is passed over: {error}"))
    return events
