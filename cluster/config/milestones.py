"""Published validation results of a preset, which a run is compared with as it passes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

CLASSES = 1000
"""Classes of the data sets that published results are of, ILSVRC-2010 and -2012."""
FIELDS = {"loss": "loss", "top1": "top1_error", "top5": "top5_error"}
"""Name of a result in the setting `milestones` -> field of a row of RUN/validation.jsonl."""
SLACK = {"loss": 0.15, "top1": 3.0, "top5": 3.0}
"""Amounts by which a result may be worse: seeds and other decoders move errors by under a point."""


@dataclass(frozen=True)
class Milestone:
    """An entry of the setting `milestones`."""

    epoch: float
    """Passes over the training images after which the result was measured."""
    name: str
    """One of `FIELDS`."""
    value: float
    """Loss, or error in percent, in the center view."""


def parse_milestones(entries: Sequence[str]) -> tuple[Milestone, ...]:
    """Parse the entries of `milestones`, each "EPOCH NAME VALUE".

    Raises:
        ValueError: one line that names the entry, what is wrong with it, and what would be right.
    """
    found = []
    for entry in entries:
        words = entry.split()
        with suppress(ValueError, IndexError):
            epoch, value = float(words[0]), float(words[2])
            is_range = 0 < epoch < math.inf and 0 <= value < math.inf
            if len(words) == 3 and words[1] in FIELDS and is_range:
                found.append(Milestone(epoch, words[1], value))
                continue
        raise ValueError(
            f"milestones: {entry!r} should be EPOCH NAME VALUE, such as '95 top1 42.34'; NAME is "
            f"{', '.join(FIELDS)}, EPOCH above 0"
        )
    return tuple(sorted(found, key=lambda one: one.epoch))


def find_shortfalls(
    milestones: Iterable[Milestone], before: float, row: Mapping[str, float]
) -> list[str]:
    """Compare a validation with the milestones passed since the one before; a line for each miss.

    A validation comes at a milestone or after it, where results are better: so it must be as good,
    within `SLACK`.

    Args:
        milestones: from `parse_milestones`.
        before: epoch of the validation before this one; 0 for the first.
        row: row of RUN/validation.jsonl.
    """
    found = []
    for one in milestones:
        if not before < one.epoch <= row["epoch"]:
            continue
        share = 1.0 if one.name == "loss" else 100.0
        ours, unit = row[FIELDS[one.name]] * share, "" if one.name == "loss" else " %"
        if not ours <= one.value + SLACK[one.name]:  # a NaN is a miss, too
            found.append(
                f"far off what was published: {one.name} {ours:.4g}{unit} in epoch "
                f"{row['epoch']:g}, and {one.value:g}{unit} in epoch {one.epoch:g} (setting "
                "milestones); compare rates, augmentation and data with the preset's"
            )
    return found
