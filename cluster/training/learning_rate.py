"""Learning rates of a run: the rates of each step, and a row of RUN/rates.jsonl for each change.

All changes are in one list: those of the schedule, known beforehand; the divisions of `plateau`;
and those that a user sets in RUN/rates.toml. The rates of a step follow from the changes before it.

RUN/rates.toml, which a training run reads and renames:

    lr = 0.001            # of the weights
    lr_bias = 0.002       # of the biases
    lr.conv1 = 0          # of one layer's weights; lr_bias.conv1 of its biases; 0 freezes
    drop = true           # divide all rates by plateau_factor

A value is absolute and holds until the schedule, or another such file, sets that rate again. A file
read after step S becomes RUN/rates-applied-S.toml: a run that resumes from before S applies it
after S again, so that its rates are the same; delete the file to prevent that.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import os
import re
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Rated, Tell, Warned
from cluster.run.folder import RATES, VALIDATION
from cluster.run.jsonl import cut_rows, read_rows
from model import schedule
from model.schedule import COLOR, DROP, DROP_BIASES, Rates
from pipeline.dataset.segments import (
    Segments,
    as_segments,
    count_epochs,
    find_position,
    find_segment,
)
from pipeline.tools.files import atomic_write, sync_path

SCHEDULE, PLATEAU, BY_HAND = "schedule", "plateau", "by hand"
REASONS = (SCHEDULE, PLATEAU, BY_HAND)
"""Reasons of changes, in the order in which changes after the same step apply."""
ERROR = "top1_error"
"""Field of RUN/validation.jsonl that `plateau` looks at."""
FILE = "rates.toml"
APPLIED = re.compile(r"rates-applied-(\d+)(?:-(\d+))?\.toml")
SETTLED = 0.2
"""Seconds for which RUN/rates.toml must not change before it is read: it may be half written."""


@dataclass(frozen=True)
class RateChange:
    """Rates that are set after a step."""

    after: int
    """Last step before the change."""
    why: str
    """One of `REASONS`."""
    settings: Mapping[str, float]
    """Value by name, as `model.schedule.compute_rates` takes them, and the colour."""

    @property
    def key(self) -> tuple[int, str, tuple[str, ...]]:
        """Identity of a change: equal for a change and the row written for it."""
        return self.after, self.why, tuple(self.settings)


@dataclass(frozen=True, kw_only=True)
class RateSettings:
    """Settings that the learning rates of a run follow from."""

    config: Config
    samples: int | Segments
    """Number of training images, or the segments of the run."""
    total: int
    """Steps of the whole run."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the network's layers."""
        return tuple(layer.name for layer in self.config.design.rows())

    def drop(self) -> dict[str, float]:
        """Return the settings that divide the current rates."""
        biases = {DROP_BIASES: self.config.plateau_factor} if self.config.plateau_biases else {}
        return {DROP: self.config.plateau_factor} | biases

    def compute(self, changes: Iterable[RateChange]) -> Rates:
        """Return the rates after some changes of the first step's rates."""
        factors = schedule.parse_layer_rates(self.config.layer_rates, self.layers)
        settings = [setting for change in changes for setting in change.settings.items()]
        first = self.config.scaled_lr, self.config.scaled_lr * self.config.bias_factor
        if self.config.schedule == "dexp":
            first = self._dexp(1)
        return schedule.compute_rates(*first, settings, factors)

    def compute_factor(self, step: int) -> float:
        """Return the factor on all rates of a step, from 1: that of warm-up and of `poly`."""
        config = self.config
        length = find_position(as_segments(self.samples), config.warmup) / config.batch_size
        factor = schedule.compute_warmup(step, length, config.warmup_lr / config.scaled_lr)
        if config.schedule == "poly":
            factor *= float((1.0 - self.find_progress(step - 1)) ** config.lr_power)
        return factor

    def find_progress(self, step: int) -> float:
        """Return the share of the run that is done after a step.

        Where the length is in epochs, a version that is appended changes nothing before it.
        """
        config, segments = self.config, as_segments(self.samples)
        if config.steps or len(segments) == 1:
            return step / self.total
        position = step * config.batch_size
        if find_segment(segments, max(0, position - 1)) == 0:  # a step to its end is its own
            return min(1.0, step / config.total_steps(segments[:1]))
        return min(1.0, float(count_epochs(segments, position)) / config.epochs)

    def list_scheduled(self) -> list[RateChange]:
        """List the changes known before the run begins: the steps of `dexp`, and by epoch."""
        stretches = self._list_stretches() if self.config.schedule == "dexp" else []
        found: dict[int, dict[str, float]] = {}
        for change in schedule.parse_changes(self.config.changes, self.layers):
            # Exact: every process must find the same step.
            position = find_position(as_segments(self.samples), Fraction(change.epoch))
            step = math.ceil(position / self.config.batch_size)
            rule = "none" if change.name == COLOR else self.config.rate_scaling
            value = schedule.scale_rate(change.value, self.config.batch_size, rule)
            found.setdefault(step, {})[change.name] = value  # later ones win
        return [*stretches, *(RateChange(step, SCHEDULE, one) for step, one in found.items())]

    def _list_stretches(self) -> list[RateChange]:
        # The last step of a stretch has its rate.
        steps = range(self.total + 1)
        borders = {
            bisect.bisect_right(steps, number / stretches, key=self.find_progress) - 1
            for stretches in (self.config.lr_drops, self.config.bias_drops)
            for number in range(1, stretches)
        }
        found = []
        for step in sorted(borders - {0, self.total}):
            pairs = zip(("lr", "lr_bias"), self._dexp(step), self._dexp(step + 1), strict=True)
            if changed := {name: after for name, before, after in pairs if before != after}:
                found.append(RateChange(step, SCHEDULE, changed))
        return found

    def _dexp(self, step: int) -> tuple[float, float]:
        config = self.config
        return schedule.dexp(
            self.find_progress(step), config.scaled_lr, config.bias_factor, config.lr_drop,
            config.lr_drops, config.bias_drop, config.bias_drops,
        )  # fmt: skip


class RateControl:
    """The learning rates of a run, the same to the last bit in all of its processes.

    The leader of the job decides and writes; the other processes receive its changes. All of them
    create it and call `review` together. A run that resumes from a checkpoint has at every step the
    rates of an undisturbed run: the rows up to the checkpoint are read back, validation errors are
    read from RUN/validation.jsonl, and files applied by hand after it are applied again.

        rates = RateControl(settings, run, mesh, tell, mark.step)
        for step in range(mark.step + 1, total + 1):
            optimizer.step(rates.at(step))
            if validation or checkpoint due:     # before the checkpoint is saved
                rates.review(step, error or None)
    """

    def __init__(
        self, settings: RateSettings, run: Path, mesh: ProcessMesh, tell: Tell, step: int
    ) -> None:
        """Find the changes of the run, and write those up to `step`.

        Args:
            settings: settings of the rates.
            run: run folder.
            mesh: mesh of this process.
            tell: receives events.
            step: step to resume from; 0 for a new run.
        """
        self._settings, self._run, self._mesh, self._tell = settings, run, mesh, tell
        self._history: list[tuple[int, float]] = []
        self._changes: list[RateChange] = []
        self._rates: dict[int, Rates] = {}
        if mesh.is_leader:
            self._begin(step)
        self._changes = mesh.broadcast(self._changes)
        self._written = sum(change.after <= step for change in self._changes)

    def at(self, step: int) -> Rates:
        """Return the rates of a step, from 1; a pure function of the known changes."""
        count = bisect.bisect_left(self._changes, step, key=lambda change: change.after)
        if count not in self._rates:
            self._rates[count] = self._settings.compute(self._changes[:count])
        factor = self._settings.compute_factor(step)
        return self._rates[count] if factor == 1.0 else self._rates[count].scale(factor)

    def review(self, step: int, validation_error: float | None = None) -> None:
        """Decide after a step whether the rates change; all processes call it, once for a step.

        Call it after a validation and before a checkpoint: its decision is then on disk before
        there is a checkpoint to resume from.

        Args:
            step: the step just made.
            validation_error: if a validation followed the step, its top-1 error, 0 to 1.
        """
        found = []
        if self._mesh.is_leader:
            if validation_error is not None:
                self._history.append((step, validation_error))
                found += self._find_drop(step)
            if change := take_rates_file(self._run, step, self._settings, self._tell):
                found.append(change)
        self._add(self._mesh.broadcast(found))
        self.note(step)

    def note(self, step: int) -> None:
        """Write and announce the changes after steps up to `step`; only the leader does anything.

        `review` calls it. Called between reviews, it announces a step of the schedule in time.
        """
        while self._written < len(self._changes) and self._changes[self._written].after <= step:
            if self._mesh.is_leader:
                _append_row(self._run / RATES, self._format_row(self._written))
                self._announce(self._written)
            self._written += 1

    def _add(self, changes: Iterable[RateChange]) -> None:
        self._changes = sorted(
            [*self._changes, *changes], key=lambda change: (change.after, REASONS.index(change.why))
        )
        self._rates.clear()

    def _find_drop(self, step: int) -> list[RateChange]:
        """Return the division that `plateau` makes after the validation of this step, if any.

        One that is known already is not made again: an end of a step may be repeated.
        """
        config = self._settings.config
        past = [change for change in self._changes if change.after <= step]
        made = [change.after for change in past if change.why == PLATEAU]
        if config.schedule != "plateau" or len(made) >= config.plateau_drops or step in made:
            return []
        drops = schedule.find_plateau_drops(
            self._history, config.patience, config.plateau_drops, config.plateau_threshold,
            [change.after for change in past if change.why == BY_HAND],
        )  # fmt: skip
        return [RateChange(step, PLATEAU, self._settings.drop())] if step in drops else []

    def _begin(self, step: int) -> None:
        """Find all changes known when resuming from `step`, and cut RUN/rates.jsonl there."""
        self._history = read_errors(self._run / VALIDATION, step)
        cut_rows(self._run / RATES, step, lambda text: self._tell(Warned(text)))
        rows = read_changes(self._run / RATES, step)
        by_hand = read_applied(self._run, self._settings, self._tell)
        # A row proves that its change has happened. But a crash may have come between the two.
        self._add([*rows, *find_missing(self._settings.list_scheduled() + by_hand, rows)])
        self._add(self._find_drop(step))
        if change := take_rates_file(self._run, step, self._settings, self._tell):
            self._add([change])
        past = [change for change in self._changes if change.after <= step]
        if past or (self._run / RATES).exists():
            with atomic_write(self._run / RATES) as file:
                file.write(b"".join(self._format_row(index) for index in range(len(past))))
        for index, change in enumerate(past):
            if find_missing([change], rows):
                self._announce(index)
        for after in sorted({change.after for change in by_hand if change.after > step}):
            text = (
                f"rates that were set by hand after step {after} will be set there again; to "
                f"prevent it, delete {self._run}/rates-applied-{after}.toml and restart"
            )
            self._tell(Warned(text))

    def _compute_sides(self, index: int) -> tuple[Rates, Rates]:
        """Return the rates before and after a change."""
        changes, compute = self._changes, self._settings.compute
        return compute(changes[:index]), compute(changes[: index + 1])

    def _format_row(self, index: int) -> bytes:
        """Return the row of RUN/rates.jsonl for a change; `step` is the last one before it."""
        change, (before, after) = self._changes[index], self._compute_sides(index)
        position = change.after * self._settings.config.batch_size
        row = {
            "position": position,
            "epoch": round(float(count_epochs(as_segments(self._settings.samples), position)), 4),
            "step": change.after,
            "why": change.why,
            "what": describe_change(change, before, after),
            "set": dict(change.settings),
            "lr": after.weights,
            "lr_bias": after.biases,
            "layers": {layer: list(pair) for layer, pair in after.layers.items()},
        }
        return (json.dumps(row) + "\n").encode()

    def _announce(self, index: int) -> None:
        change = self._changes[index]
        text = f"{describe_change(change, *self._compute_sides(index))} ({change.why})"
        self._tell(Rated(change.after, text))


def _append_row(path: Path, row: bytes) -> None:
    """Add a row to a file, which is created whole or not at all; the row is on disk then."""
    with path.open("ab") if path.exists() else atomic_write(path) as file:
        file.write(row)
        file.flush()
        os.fsync(file.fileno())


def describe_change(change: RateChange, before: Rates, after: Rates) -> str:
    """Describe a change for people: `lr 0.01 -> 0.001, lr_bias 0.02 -> 0.002`."""
    old, new = name_rates(before), name_rates(after)
    parts = []
    for name, value in new.items():
        kind, _, layer = name.partition(".")
        was = old.get(name, old[kind])  # a layer without a rate of its own had the common one
        if was != value and not (layer and (was, value) == (old[kind], new[kind])):
            parts.append(f"{name} {was:.4g} -> {value:.4g}")
    if COLOR in change.settings:
        parts.append(f"colour -> {change.settings[COLOR]:.4g}")
    return ", ".join(parts) or "no rate changes"


def name_rates(rates: Rates) -> dict[str, float]:
    """Return rates by the names that set them: lr, lr_bias, lr.conv1, ..."""
    found = {"lr": rates.weights, "lr_bias": rates.biases}
    for layer, (weights, biases) in rates.layers.items():
        found |= {f"lr.{layer}": weights, f"lr_bias.{layer}": biases}
    return found


def read_changes(path: Path, step: int) -> list[RateChange]:
    """Read the changes of RUN/rates.jsonl up to `step`; none if there is no such file."""
    found = []
    for row in read_rows(path):
        try:
            settings = {str(name): float(value) for name, value in row["set"].items()}
            change = RateChange(int(row["step"]), str(row["why"]), settings)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if change.why in REASONS and change.after <= step:
            found.append(change)
    return found


def read_errors(path: Path, step: int) -> list[tuple[int, float]]:
    """Read (step, top-1 error) from RUN/validation.jsonl, up to `step`."""
    found = []
    for row in read_rows(path):
        with suppress(ValueError, KeyError, TypeError):
            found.append((int(row["step"]), float(row[ERROR])))
    return [pair for pair in found if pair[0] <= step]


def find_missing(changes: Iterable[RateChange], rows: Iterable[RateChange]) -> list[RateChange]:
    """Return the changes that have no row, each row standing for one change."""
    left = [row.key for row in rows]
    found = []
    for change in changes:
        if change.key in left:
            left.remove(change.key)
        else:
            found.append(change)
    return found


def take_rates_file(run: Path, step: int, settings: RateSettings, tell: Tell) -> RateChange | None:
    """Read RUN/rates.toml, if it exists, and rename it; never raises.

    An invalid file becomes rates-bad-STEP.toml, with a warning.
    """
    path = run / FILE
    try:
        if not path.exists():
            return None
        raw = path.read_bytes()
        time.sleep(SETTLED)
        if not raw.strip() or path.read_bytes() != raw:
            return None  # still being written: the next review reads it
        try:
            rates = parse_rates(raw, settings)
        except ValueError as error:
            aside = _rename(path, f"rates-bad-{step}")
            tell(Warned(f"{path} is ignored: {error} (it is now {aside.name})"))
            return None
        _rename(path, f"rates-applied-{step}")
    except OSError as error:
        tell(Warned(f"{path} cannot be used ({error.strerror}); the rates stay as they are"))
        return None
    return RateChange(step, BY_HAND, rates)


def read_applied(run: Path, settings: RateSettings, tell: Tell) -> list[RateChange]:
    """Read the files that were applied before, in order; warns of one that cannot be read."""
    found = [
        (int(match[1]), int(match[2] or 1), path)
        for path in run.glob("rates-applied-*.toml")
        if (match := APPLIED.fullmatch(path.name))
    ]
    changes = []
    for step, _, path in sorted(found):
        try:
            changes.append(RateChange(step, BY_HAND, parse_rates(path.read_bytes(), settings)))
        except (OSError, ValueError) as error:
            tell(Warned(f"{path} is ignored: {error}"))
    return changes


def parse_rates(raw: bytes, settings: RateSettings) -> dict[str, float]:
    """Parse the text of a rates file.

    Raises:
        ValueError: one line that says what is wrong and what would do.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not text; write lines such as lr = 0.001") from error
    # In TOML nothing can be a value and a table: `lr.conv1` must be a name of its own.
    quoted = re.sub(r"(?m)^(\s*)((?:lr|lr_bias)\.\w+)(\s*=)", r'\1"\2"\3', text)
    try:
        table = tomllib.loads(quoted)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not TOML ({error}); write lines such as lr = 0.001") from error
    known = [*schedule.list_rate_names(settings.layers), DROP]
    rates: dict[str, float] = {}
    for name, value in _flatten(table).items():
        if name not in known:
            raise ValueError(f"no rate is called {name!r}; {schedule.suggest_name(name, known)}")
        rates |= _parse_rate(name, value, settings)
    if not rates:
        raise ValueError("it sets nothing; write lines such as lr = 0.001")
    return rates


def _flatten(table: dict[str, Any]) -> dict[str, Any]:
    """Return a table by dotted names, also for entries of nested tables (`[lr]`, `conv1 = 0`)."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found


def _parse_rate(name: str, value: object, settings: RateSettings) -> dict[str, float]:
    if name == DROP:
        if not isinstance(value, bool):
            raise ValueError(f"drop is {value!r}; it takes true")
        return settings.drop() if value else {}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value <= sys.float_info.max:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}; it takes a number from 0 up")
    return {name: float(value)}  # type: ignore[arg-type]


def _rename(path: Path, name: str) -> Path:
    """Rename a file to NAME.toml, or to NAME-2.toml and so on if that is taken."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    files = (path.with_name(f"{one}.toml") for one in names)
    aside = next(file for file in files if not file.exists())
    path.rename(aside)
    sync_path(path.parent)
    return aside
