"""Runs without a network, for their learning rates; and the rates of `changes` said directly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster.config import Config
from cluster.mesh import ProcessMesh
from cluster.run.events import Event
from cluster.run.jsonl import cut_rows
from cluster.run.metrics import VALIDATION
from cluster.training.learning_rate import RATES, RateControl, RateSettings
from model.schedule import Rates, ScheduledChange, compute_rates

ERRORS = dict(zip(range(4, 41, 4), (9, 8, 8, 8, 7, 7, 7, 7, 7, 7), strict=True))
"""Step -> validation error."""


def recipe(total: int = 40, **settings: object) -> RateSettings:
    """Return a run of 40 steps of 8 images, 4 epochs of 80."""
    config = Config.from_settings({"batch_size": 8, **settings})
    return RateSettings(config=config, samples=80, total=total)


def rows(run: Path) -> list[dict]:
    path = run / RATES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def texts(heard: Iterable[Event], kind: type) -> list[str]:
    return [event.text for event in heard if isinstance(event, kind)]


@dataclass
class Story:
    """A run as `cluster.training.loop` makes it, without the network; it may be cut off."""

    recipe: RateSettings
    run: Path
    errors: dict[int, float] = field(default_factory=dict)
    """Validation error after each step that has a validation."""
    hand: dict[int, str] = field(default_factory=dict)
    """Text that the user puts into rates.toml just before the review of a step, once."""
    checkpoints: frozenset[int] = frozenset()
    rates: dict[int, Rates] = field(default_factory=dict)
    heard: list[Event] = field(default_factory=list)
    saved: int = 0

    def go_on(self, kill: int | None = None, lost: int | None = None) -> None:
        """Train from the newest checkpoint to the end, or until the review of step `kill`.

        Args:
            kill: step in whose review the run is killed; None: it ends.
            lost: bytes by which that review's last row comes out too short; None: it is whole.
        """
        control = RateControl(self.recipe, self.run, ProcessMesh(), self.heard.append, self.saved)
        cut_rows(self.run / VALIDATION, self.saved, pytest.fail)
        for step in range(self.saved + 1, self.recipe.total + 1):
            self.rates[step] = control.at(step)
            self.review(control, step)
            if step == kill:
                return self.lose(step, lost or 0)
            if step in self.checkpoints:
                self.saved = step
        return None

    def review(self, control: RateControl, step: int) -> None:
        error = self.errors.get(step)
        if error is not None:
            with (self.run / VALIDATION).open("a") as file:
                file.write(json.dumps({"step": step, "top1_error": error}) + "\n")
        if text := self.hand.pop(step, None):
            (self.run / "rates.toml").write_text(text)
        if error is not None or step in self.checkpoints or text:
            control.review(step, error)

    def lose(self, step: int, lost: int) -> None:
        found = rows(self.run)
        if lost and found and found[-1]["step"] == step:
            raw = (self.run / RATES).read_bytes()
            last = len(raw.splitlines(keepends=True)[-1])
            (self.run / RATES).write_bytes(raw[: len(raw) - min(lost, last)])


def manual(
    epoch: float,
    changes: Iterable[ScheduledChange],
    lr: float,
    lr_bias: float,
    factors: Mapping[str, float] | None = None,
) -> Rates:
    """Return the rates of a step before which `epoch` passes over the training set were made."""
    past = [(change.name, change.value) for change in changes if change.epoch <= epoch]
    return compute_rates(lr, lr_bias, past, factors)
