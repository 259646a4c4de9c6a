"""What changes the learning rates of a run, and when: one list, whatever the reason."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from cluster.config import Config
from model.changes import COLOUR, layer_factors, parse_changes
from model.schedule import DROP, DROP_BIASES, Rates, dexp, in_force, scaled

SCHEDULE, PLATEAU, BY_HAND = "schedule", "plateau", "by hand"
REASONS = (SCHEDULE, PLATEAU, BY_HAND)
"""In the order in which they come after one and the same step."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the learning rates of a run follow from."""

    config: Config
    samples: int
    """Training pictures."""
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

    def rates(self, events: Iterable[Event]) -> Rates:
        """Rates after some events, on top of those of the first step."""
        factors = layer_factors(self.config.layer_rates, self.layers)
        settings = [setting for event in events for setting in event.settings.items()]
        return in_force(*self._begin(), settings, factors)

    def _begin(self) -> tuple[float, float]:
        if self.config.schedule == "dexp":
            return self._dexp(1)
        return self._lr, self._lr * self.config.bias_factor

    @property
    def _lr(self) -> float:
        return scaled(self.config.lr, self.config.batch_size, self.config.rate_scaling)

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

    def scheduled(self) -> list[Event]:
        """What is known before the run begins: the steps of `dexp`, and the changes by epoch."""
        stretches = self._stretches() if self.config.schedule == "dexp" else []
        return [*stretches, *self._changes()]

    def _stretches(self) -> list[Event]:
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
                events.append(Event(step, SCHEDULE, changed))
        return events

    def _changes(self) -> list[Event]:
        found: dict[int, dict[str, float]] = {}
        for change in parse_changes(self.config.changes, self.layers):
            # Exact: every process must find the same step.
            step = math.ceil(Fraction(change.epoch) * self.samples / self.config.batch_size)
            rule = "none" if change.name == COLOUR else self.config.rate_scaling
            value = scaled(change.value, self.config.batch_size, rule)
            found.setdefault(step, {})[change.name] = value  # later ones win
        return [Event(step, SCHEDULE, settings) for step, settings in found.items()]


@dataclass(frozen=True)
class Event:
    """A change of the rates."""

    after: int
    """The last step before it."""
    why: str
    """One of REASONS."""
    settings: Mapping[str, float]
    """As `model.schedule.in_force` takes them."""

    @property
    def place(self) -> tuple[int, int]:
        """Sorts events."""
        return self.after, REASONS.index(self.why)

    @property
    def key(self) -> tuple[int, str, tuple[str, ...]]:
        """The same for two that are one and the same change."""
        return self.after, self.why, tuple(self.settings)


def words(event: Event, before: Rates, after: Rates) -> str:
    """An event for people: `lr 0.01 -> 0.001, lr_bias 0.02 -> 0.002`."""
    old, new = named(before), named(after)
    told = []
    for name, value in new.items():
        kind, _, layer = name.partition(".")
        was = old.get(name, old[kind])  # a layer without a rate of its own had the common one
        if was != value and not (layer and (was, value) == (old[kind], new[kind])):
            told.append(f"{name} {was:.4g} -> {value:.4g}")
    if COLOUR in event.settings:
        told.append(f"colour -> {event.settings[COLOUR]:.4g}")
    return ", ".join(told) or "no rate changes"


def named(rates: Rates) -> dict[str, float]:
    """Rates by the names under which they are set: lr, lr_bias, lr.conv1, ..."""
    found = {"lr": rates.weights, "lr_bias": rates.biases}
    for layer, (weights, biases) in rates.layers.items():
        found |= {f"lr.{layer}": weights, f"lr_bias.{layer}": biases}
    return found


def as_row(event: Event, before: Rates, after: Rates, recipe: Recipe) -> dict[str, Any]:
    """An event as a row of RUN/rates.jsonl: `step` is the last one before it."""
    position = event.after * recipe.config.batch_size
    return {
        "position": position,
        "epoch": round(position / recipe.samples, 4),
        "step": event.after,
        "why": event.why,
        "what": words(event, before, after),
        "set": dict(event.settings),
        "lr": after.weights,
        "lr_bias": after.biases,
        "layers": {layer: list(pair) for layer, pair in after.layers.items()},
    }


def from_row(line: bytes) -> Event | None:
    """Read a row back; None if it is none."""
    try:
        row = json.loads(line)
        settings = {str(name): float(value) for name, value in row["set"].items()}
        event = Event(int(row["step"]), str(row["why"]), settings)
        return event if line.endswith(b"\n") and event.why in REASONS else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
