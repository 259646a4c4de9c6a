"""The learning rates of a run: what they are at each step, and a row for each change.

All changes are events in one list (`rate_events`): those of the schedule, known beforehand; the
divisions of `plateau`; and what was set by hand (`hand_rates`). The rates of a step follow from the
events before it. RUN/rates.jsonl has a row for each event that has come.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.hand_rates import applied, take
from cluster.mesh import Place
from cluster.rate_events import BY_HAND, PLATEAU, Event, Recipe, as_row, from_row, words
from cluster.run.events import Rated, Tell, Warned
from cluster.run.folder import RATES, VALIDATION
from model.schedule import Rates, plateau_drops
from pipeline.tools.files import sealed

ERROR = "top1_error"
"""The validation error that `plateau` looks at."""


class RateControl:
    """The learning rates of a run, the same to the last bit in all of its processes.

    The leader of the job decides, writes and tells; the others get its events. All processes build
    it and call `review` at the same time. A run that goes on from a checkpoint has at every step
    the rates it would have had undisturbed: the rows up to the checkpoint are read back, validation
    errors are read from RUN/validation.jsonl, and what was set by hand after it is set again.

        rates = RateControl(recipe, run, place, tell, mark.step)
        for step in range(mark.step + 1, total + 1):
            optimiser.step(rates.at(step))
            if validation or checkpoint due:     # before the checkpoint is saved
                rates.review(step, error or None)
    """

    def __init__(self, recipe: Recipe, run: Path, place: Place, tell: Tell, step: int) -> None:
        """Find the events of the run, and write those that have come by now.

        Args:
            recipe: the settings.
            run: folder of the run.
            place: of this process.
            tell: the watcher.
            step: step the run goes on from; 0 for a new one.
        """
        self._recipe, self._run, self._place, self._tell = recipe, run, place, tell
        self._history: list[tuple[int, float]] = []
        self._events: list[Event] = []
        self._in_force: dict[int, Rates] = {}
        if place.leads:
            self._begin(step)
        self._events = place.share(self._events)
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
        found = self._look(step, validation_error) if self._place.leads else []
        self._add(self._place.share(found))
        self.note(step)

    def note(self, step: int) -> None:
        """Write and tell what changes after steps up to `step`; the leader alone does anything.

        `review` does it, too. Between reviews it makes the news of a schedule's step timely.
        """
        while self._written < len(self._events) and self._events[self._written].after <= step:
            if self._place.leads:
                self._write(self._run / RATES, [self._row(self._written)])
                self._say(self._written)
            self._written += 1

    def _add(self, events: Iterable[Event]) -> None:
        self._events = sorted([*self._events, *events], key=lambda event: event.place)
        self._in_force.clear()

    def _look(self, step: int, error: float | None) -> list[Event]:
        found = []
        if error is not None:
            self._history.append((step, error))
            found += self._stalled(step)
        if event := take(self._run, step, self._recipe, self._tell):
            found.append(event)
        return found

    def _stalled(self, step: int) -> list[Event]:
        """The division that `plateau` makes after the validation of this step, if it does."""
        recipe = self._recipe.config
        past = [event for event in self._events if event.after <= step]
        made = sum(event.why == PLATEAU for event in past)
        if recipe.schedule != "plateau" or made >= recipe.plateau_drops:
            return []
        drops = plateau_drops(
            self._history,
            recipe.patience,
            recipe.plateau_drops,
            recipe.plateau_threshold,
            [event.after for event in past if event.why == BY_HAND],
        )
        return [Event(step, PLATEAU, self._recipe.drop())] if step in drops else []

    def _begin(self, step: int) -> None:
        """Find all events known when the run goes on from `step`, and cut RUN/rates.jsonl there."""
        self._history = read_errors(self._run / VALIDATION, step)
        rows = read_events(self._run / RATES, step)
        by_hand = applied(self._run, self._recipe, self._tell)
        # What rows say has happened. But a crash may have come between an event and its row.
        self._add([*rows, *missing(self._recipe.scheduled() + by_hand, rows)])
        if not any(event.after == step and event.why == PLATEAU for event in rows):
            self._add(self._stalled(step))
        if event := take(self._run, step, self._recipe, self._tell):
            self._add([event])
        past = [event for event in self._events if event.after <= step]
        if past or (self._run / RATES).exists():
            self._write(self._run / RATES, [self._row(index) for index in range(len(past))], True)
        for index in range(len(past)):
            if missing([past[index]], rows):
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
        return as_row(self._events[index], *self._sides(index), self._recipe)

    def _say(self, index: int) -> None:
        event = self._events[index]
        text = f"{words(event, *self._sides(index))} ({event.why})"
        self._tell(Rated(event.after, text))

    @staticmethod
    def _write(path: Path, rows: list[dict[str, Any]], anew: bool = False) -> None:
        """Add rows to a file, or put them in its place; they are on the disk then."""
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if anew or not path.exists():
            with sealed(path) as file:
                file.write(text)
            return
        with path.open("ab") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def missing(events: Iterable[Event], rows: Iterable[Event]) -> list[Event]:
    """Return the events that have no row, each row standing for one event."""
    left = [row.key for row in rows]
    found = []
    for event in events:
        if event.key in left:
            left.remove(event.key)
        else:
            found.append(event)
    return found


def read_events(path: Path, step: int) -> list[Event]:
    """Read RUN/rates.jsonl up to `step`; none if there is no such file."""
    events = [from_row(line) for line in _lines(path)]
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
