"""The learning rates of a run: what they are at each step, and a row for each change.

All changes are events in one list (`rate_events`): those of the schedule, known beforehand; the
divisions of `plateau`; and what was set by hand (`hand_rates`). The rates of a step follow from the
events before it. RUN/rates.jsonl has a row for each event that has come.

What changes the learning rates of a run, and when: one list, whatever the reason.

Learning rates set by hand: the file RUN/rates.toml, which a training run takes and puts aside.

    lr = 0.001            # of the weights
    lr_bias = 0.002       # of the biases
    lr.conv1 = 0          # of one layer's weights; lr_bias.conv1 of its biases; 0 freezes
    drop = true           # divide all rates by plateau_factor

A value is absolute and holds until the schedule, or another such file, sets that rate again. What
was taken after step S becomes RUN/rates-applied-S.toml: a run that goes on from before S takes it
again after S, so that it comes out the same; delete it to prevent that.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import re
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Rated, Tell, Warned
from cluster.run.folder import RATES, VALIDATION
from model.schedule import (
    COLOR,
    DROP,
    DROP_BIASES,
    Rates,
    compute_rates,
    dexp,
    find_plateau_drops,
    list_rate_names,
    parse_changes,
    parse_layer_rates,
    scale_rate,
    suggest_name,
)
from pipeline.tools.files import atomic_write, sync_folder

SCHEDULE, PLATEAU, BY_HAND = "schedule", "plateau", "by hand"
REASONS = (SCHEDULE, PLATEAU, BY_HAND)
"""In the order in which they come after one and the same step."""


@dataclass(frozen=True, kw_only=True)
class RateSettings:
    """What the learning rates of a run follow from."""

    config: Config
    samples: int
    """Training images."""
    total: int
    """Steps of the whole run."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the network's layers."""
        return tuple(layer.name for layer in self.config.design.layers())

    def drop(self) -> dict[str, float]:
        """Settings that divide the rates in force."""
        biases = {DROP_BIASES: self.config.plateau_factor} if self.config.plateau_biases else {}
        return {DROP: self.config.plateau_factor} | biases

    def rates(self, events: Iterable[RateChange]) -> Rates:
        """Rates after some events, on top of those of the first step."""
        factors = parse_layer_rates(self.config.layer_rates, self.layers)
        settings = [setting for event in events for setting in event.settings.items()]
        return compute_rates(*self._begin(), settings, factors)

    def _begin(self) -> tuple[float, float]:
        if self.config.schedule == "dexp":
            return self._dexp(1)
        return self._lr, self._lr * self.config.bias_factor

    @property
    def _lr(self) -> float:
        return scale_rate(self.config.lr, self.config.batch_size, self.config.rate_scaling)

    def _dexp(self, step: int) -> tuple[float, float]:
        return dexp(
            step / self.total,
            self._lr,
            self.config.bias_factor,
            self.config.lr_drop,
            self.config.lr_drops,
            self.config.bias_drop,
            self.config.bias_drops,
        )

    def scheduled(self) -> list[RateChange]:
        """What is known before the run begins: the steps of `dexp`, and the changes by epoch."""
        stretches = self._stretches() if self.config.schedule == "dexp" else []
        return [*stretches, *self._changes()]

    def _stretches(self) -> list[RateChange]:
        # The end of a stretch still belongs to it.
        borders = {
            self.total * place // stretches
            for stretches in (self.config.lr_drops, self.config.bias_drops)
            for place in range(1, stretches)
        }
        events = []
        for step in sorted(borders - {0, self.total}):
            pairs = zip(("lr", "lr_bias"), self._dexp(step), self._dexp(step + 1), strict=True)
            if changed := {name: after for name, before, after in pairs if before != after}:
                events.append(RateChange(step, SCHEDULE, changed))
        return events

    def _changes(self) -> list[RateChange]:
        found: dict[int, dict[str, float]] = {}
        for change in parse_changes(self.config.changes, self.layers):
            # Exact: every process must find the same step.
            step = math.ceil(Fraction(change.epoch) * self.samples / self.config.batch_size)
            rule = "none" if change.name == COLOR else self.config.rate_scaling
            value = scale_rate(change.value, self.config.batch_size, rule)
            found.setdefault(step, {})[change.name] = value  # later ones win
        return [RateChange(step, SCHEDULE, settings) for step, settings in found.items()]


@dataclass(frozen=True)
class RateChange:
    """A change of the rates."""

    after: int
    """The last step before it."""
    why: str
    """One of REASONS."""
    settings: Mapping[str, float]
    """As `model.schedule.compute_rates` takes them."""

    @property
    def sort_key(self) -> tuple[int, int]:
        """Sorts events."""
        return self.after, REASONS.index(self.why)

    @property
    def key(self) -> tuple[int, str, tuple[str, ...]]:
        """The same for two that are one and the same change."""
        return self.after, self.why, tuple(self.settings)


def describe_change(event: RateChange, before: Rates, after: Rates) -> str:
    """An event for people: `lr 0.01 -> 0.001, lr_bias 0.02 -> 0.002`."""
    old, new = name_rates(before), name_rates(after)
    told = []
    for name, value in new.items():
        kind, _, layer = name.partition(".")
        was = old.get(name, old[kind])  # a layer without a rate of its own had the common one
        if was != value and not (layer and (was, value) == (old[kind], new[kind])):
            told.append(f"{name} {was:.4g} -> {value:.4g}")
    if COLOR in event.settings:
        told.append(f"colour -> {event.settings[COLOR]:.4g}")
    return ", ".join(told) or "no rate changes"


def name_rates(rates: Rates) -> dict[str, float]:
    """Rates by the names under which they are set: lr, lr_bias, lr.conv1, ..."""
    found = {"lr": rates.weights, "lr_bias": rates.biases}
    for layer, (weights, biases) in rates.layers.items():
        found |= {f"lr.{layer}": weights, f"lr_bias.{layer}": biases}
    return found


def format_row(
    event: RateChange, before: Rates, after: Rates, recipe: RateSettings
) -> dict[str, Any]:
    """An event as a row of RUN/rates.jsonl: `step` is the last one before it."""
    position = event.after * recipe.config.batch_size
    return {
        "position": position,
        "epoch": round(position / recipe.samples, 4),
        "step": event.after,
        "why": event.why,
        "what": describe_change(event, before, after),
        "set": dict(event.settings),
        "lr": after.weights,
        "lr_bias": after.biases,
        "layers": {layer: list(pair) for layer, pair in after.layers.items()},
    }


def parse_row(line: bytes) -> RateChange | None:
    """Read a row back; None if it is none."""
    try:
        row = json.loads(line)
        settings = {str(name): float(value) for name, value in row["set"].items()}
        event = RateChange(int(row["step"]), str(row["why"]), settings)
        return event if line.endswith(b"\n") and event.why in REASONS else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


FILE = "rates.toml"
APPLIED = re.compile(r"rates-applied-(\d+)(?:-(\d+))?\.toml")
SETTLED = 0.2
"""Seconds for which a file must not change before it is read: it may be half written."""


def parse_rates(text: str, recipe: RateSettings) -> dict[str, float]:
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
    known = [*list_rate_names(recipe.layers), DROP]
    settings: dict[str, float] = {}
    for name, value in _flat(table).items():
        if name not in known:
            raise ValueError(f"no rate is called {name!r}; {suggest_name(name, known)}")
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


def _setting(name: str, value: object, recipe: RateSettings) -> dict[str, float]:
    if name == DROP:
        if not isinstance(value, bool):
            raise ValueError(f"drop is {value!r}; it takes true")
        return recipe.drop() if value else {}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= sys.float_info.max:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it takes a number from 0 up")
    return {name: float(value)}  # type: ignore[arg-type]


def take_rates_file(run: Path, step: int, recipe: RateSettings, tell: Tell) -> RateChange | None:
    """Take RUN/rates.toml, if there is one, and put it aside; never raises.

    A file that cannot be used is put aside as rates-bad-STEP.toml, with a warning.
    """
    path = run / FILE
    try:
        raw = _settled(path)
        if raw is None:
            return None
        try:
            settings = parse_rates(_text(raw), recipe)
        except ValueError as error:
            aside = _move(path, f"rates-bad-{step}")
            tell(Warned(f"{path} is passed over: {error} (it is now {aside.name})"))
            return None
        _move(path, f"rates-applied-{step}")
    except OSError as error:
        tell(Warned(f"{path} cannot be used ({error.strerror}); the rates stay as they are"))
        return None
    return RateChange(step, BY_HAND, settings)


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


def read_applied(run: Path, recipe: RateSettings, tell: Tell) -> list[RateChange]:
    """What was taken before, in order; a file that cannot be read any more is named and left."""
    found = []
    for path in run.glob("rates-applied-*.toml"):
        if match := APPLIED.fullmatch(path.name):
            found.append((int(match[1]), int(match[2] or 1), path))
    events = []
    for step, _, path in sorted(found):
        try:
            events.append(
                RateChange(step, BY_HAND, parse_rates(path.read_text(encoding="utf-8"), recipe))
            )
        except (OSError, ValueError) as error:
            tell(Warned(f"{path} is passed over: {error}"))
    return events


ERROR = "top1_error"
"""The validation error that `plateau` looks at."""


class RateControl:
    """The learning rates of a run, the same to the last bit in all of its processes.

    The leader of the job decides, writes and tells; the others get its events. All processes build
    it and call `review` at the same time. A run that goes on from a checkpoint has at every step
    the rates it would have had undisturbed: the rows up to the checkpoint are read back, validation
    errors are read from RUN/validation.jsonl, and what was set by hand after it is set again.

        rates = RateControl(recipe, run, mesh, tell, mark.step)
        for step in range(mark.step + 1, total + 1):
            optimiser.step(rates.at(step))
            if validation or checkpoint due:     # before the checkpoint is saved
                rates.review(step, error or None)
    """

    def __init__(
        self, recipe: RateSettings, run: Path, mesh: ProcessMesh, tell: Tell, step: int
    ) -> None:
        """Find the events of the run, and write those that have come by now.

        Args:
            recipe: the settings.
            run: folder of the run.
            mesh: the process mesh.
            tell: the watcher.
            step: step the run goes on from; 0 for a new one.
        """
        self._recipe, self._run, self._mesh, self._tell = recipe, run, mesh, tell
        self._history: list[tuple[int, float]] = []
        self._events: list[RateChange] = []
        self._in_force: dict[int, Rates] = {}
        if mesh.is_leader:
            self._begin(step)
        self._events = mesh.broadcast(self._events)
        self._written = sum(event.after <= step for event in self._events)

    def at(self, step: int) -> Rates:
        """Rates of a step, from 1; a pure function of the events known."""
        count = bisect.bisect_left(self._events, step, key=lambda event: event.after)
        if count not in self._in_force:
            self._in_force[count] = self._recipe.rates(self._events[:count])
        return self._in_force[count]

    def review(self, step: int, validation_error: float | None = None) -> None:
        """Look after a step whether the rates change; all processes call it, once for a step.

        Call it after a validation and before a checkpoint: what it decides is then on the disk
        before there is a checkpoint to go on from.

        Args:
            step: the step just made.
            validation_error: if it was followed by a validation, its top-1 error, 0 to 1.
        """
        found = self._look(step, validation_error) if self._mesh.is_leader else []
        self._add(self._mesh.broadcast(found))
        self.note(step)

    def note(self, step: int) -> None:
        """Write and tell what changes after steps up to `step`; the leader alone does anything.

        `review` does it, too. Between reviews it makes the news of a schedule's step timely.
        """
        while self._written < len(self._events) and self._events[self._written].after <= step:
            if self._mesh.is_leader:
                self._write(self._run / RATES, [self._row(self._written)])
                self._say(self._written)
            self._written += 1

    def _add(self, events: Iterable[RateChange]) -> None:
        self._events = sorted([*self._events, *events], key=lambda event: event.sort_key)
        self._in_force.clear()

    def _look(self, step: int, error: float | None) -> list[RateChange]:
        found = []
        if error is not None:
            self._history.append((step, error))
            found += self._stalled(step)
        if event := take_rates_file(self._run, step, self._recipe, self._tell):
            found.append(event)
        return found

    def _stalled(self, step: int) -> list[RateChange]:
        """The division that `plateau` makes after the validation of this step, if it does."""
        recipe = self._recipe.config
        past = [event for event in self._events if event.after <= step]
        made = sum(event.why == PLATEAU for event in past)
        if recipe.schedule != "plateau" or made >= recipe.plateau_drops:
            return []
        drops = find_plateau_drops(
            self._history,
            recipe.patience,
            recipe.plateau_drops,
            recipe.plateau_threshold,
            [event.after for event in past if event.why == BY_HAND],
        )
        return [RateChange(step, PLATEAU, self._recipe.drop())] if step in drops else []

    def _begin(self, step: int) -> None:
        """Find all events known when the run goes on from `step`, and cut RUN/rates.jsonl there."""
        self._history = read_errors(self._run / VALIDATION, step)
        rows = read_changes(self._run / RATES, step)
        by_hand = read_applied(self._run, self._recipe, self._tell)
        # What rows say has happened. But a crash may have come between an event and its row.
        self._add([*rows, *find_missing(self._recipe.scheduled() + by_hand, rows)])
        if not any(event.after == step and event.why == PLATEAU for event in rows):
            self._add(self._stalled(step))
        if event := take_rates_file(self._run, step, self._recipe, self._tell):
            self._add([event])
        past = [event for event in self._events if event.after <= step]
        if past or (self._run / RATES).exists():
            self._write(self._run / RATES, [self._row(index) for index in range(len(past))], True)
        for index in range(len(past)):
            if find_missing([past[index]], rows):
                self._say(index)
        for after in sorted({event.after for event in by_hand if event.after > step}):
            self._tell(
                Warned(
                    f"what was set by hand after step {after} will be set there again; if it "
                    f"should not, delete {self._run}/rates-applied-{after}.toml and restart"
                )
            )

    def _sides(self, index: int) -> tuple[Rates, Rates]:
        """Rates before and after an event."""
        return self._recipe.rates(self._events[:index]), self._recipe.rates(
            self._events[: index + 1]
        )

    def _row(self, index: int) -> dict[str, Any]:
        return format_row(self._events[index], *self._sides(index), self._recipe)

    def _say(self, index: int) -> None:
        event = self._events[index]
        text = f"{describe_change(event, *self._sides(index))} ({event.why})"
        self._tell(Rated(event.after, text))

    @staticmethod
    def _write(path: Path, rows: list[dict[str, Any]], anew: bool = False) -> None:
        """Add rows to a file, or put them in its place; they are on the disk then."""
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if anew or not path.exists():
            with atomic_write(path) as file:
                file.write(text)
            return
        with path.open("ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def find_missing(events: Iterable[RateChange], rows: Iterable[RateChange]) -> list[RateChange]:
    """Return the events that have no row, each row standing for one event."""
    left = [row.key for row in rows]
    found = []
    for event in events:
        if event.key in left:
            left.remove(event.key)
        else:
            found.append(event)
    return found


def read_changes(path: Path, step: int) -> list[RateChange]:
    """Read RUN/rates.jsonl up to `step`; none if there is no such file."""
    events = [parse_row(line) for line in _lines(path)]
    return [event for event in events if event is not None and event.after <= step]


def read_errors(path: Path, step: int) -> list[tuple[int, float]]:
    """Read (step, top-1 error) from RUN/validation.jsonl, up to `step`."""
    found = []
    for line in _lines(path):
        try:
            row = json.loads(line)
            found.append((int(row["step"]), float(row[ERROR])))
        except (ValueError, KeyError, TypeError):
            continue  # half written
    return [pair for pair in found if pair[0] <= step]


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []
