"""Which checkpoint of a finished or running run to look at."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from cluster.checkpoint.format import Found, first_sound, read_table
from cluster.checkpoint.storage import Places, places_of, step_in
from cluster.run.events import Tell
from pipeline.tools.errors import DataError, DuetError, UsageError


def choose(run: Path, store: str, tell: Tell, step: int | None = None, best: bool = False) -> Found:
    """Find a checkpoint of a run, wherever it has them; it is fetched if need be.

    Args:
        run: folder of the run.
        store: its setting of that name.
        tell: gets a warning for each damaged one that is passed over.
        step: that of this step; None: the newest sound one.
        best: the one with the lowest validation error instead.

    Raises:
        UsageError: there is none, or not such a one.
        DataError: there is, and it is damaged.
        StoreError: the store does not answer.
    """
    return choose_at(places_of(run, store), str(run), tell, step, best)


def choose_at(
    places: Places, run: str, tell: Tell, step: int | None = None, best: bool = False
) -> Found:
    """As `choose`, given where the checkpoints lie, and how messages call that."""
    names = places.sealed()
    if not names:
        raise UsageError(f"{run} has no complete checkpoint yet; train on with cluster.train")
    if best:
        names = _by_error(places, names)
        if not names:
            raise UsageError(f"no checkpoint of {run} has a validation error; leave --best out")
    if step is not None:
        there = ", ".join(str(step_in(name)) for name in names)
        names = [name for name in names if step_in(name) == step]
        if not names:
            raise UsageError(f"{run} has no checkpoint of step {step}; there are {there}")
    found = first_sound(places, names, tell)
    if found is None:
        raise DataError(f"no checkpoint of {run} is sound; restore one, or train anew")
    return found


def _by_error(places: Places, names: Iterable[str]) -> list[str]:
    """Those with a validation error, the lowest first."""
    errors = {}
    for name in names:
        try:
            error = read_table(places, name).get("top1_error")
        except (OSError, ValueError, KeyError, TypeError, DuetError):
            continue  # damaged
        if error is not None:
            errors[name] = error
    return sorted(errors, key=lambda name: (errors[name], -step_in(name)))
