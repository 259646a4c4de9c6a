"""The rates of `changes` said directly, for the events of a run to be compared with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from model.changes import Change
from model.schedule import Rates, in_force


def manual(
    epoch: float,
    changes: Iterable[Change],
    lr: float,
    lr_bias: float,
    factors: Mapping[str, float] | None = None,
) -> Rates:
    """Rates of a step before which `epoch` passes over the training set were made."""
    past = [(change.name, change.value) for change in changes if change.epoch <= epoch]
    return in_force(lr, lr_bias, past, factors)
