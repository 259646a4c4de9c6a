"""The best setting, one axis after the other: a full grid would take hours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from parts.lanes import Setting

Axes = Mapping[str, Sequence[float]]
"""Field of `Setting` -> the values it may take."""


def climb(
    start: Setting,
    axes: Axes,
    rate: Callable[[Setting], float],
    more: Callable[[], bool],
    passes: int = 2,
) -> Setting:
    """Return the best setting found.

    Every value of an axis is tried with the best of the others, axis by axis, until a pass over
    all of them changes nothing.

    Args:
        start: where to begin.
        axes: in the order in which they are tried.
        rate: measures a setting; 0 if it does not work. Called once for each.
        more: whether there is time for another measurement.
        passes: the most passes over the axes.
    """
    known = {start: rate(start)}
    best = start
    for _ in range(passes):
        before = best
        for name, values in axes.items():
            for value in values:
                setting = replace(best, **{name: value})  # type: ignore[arg-type]
                if setting in known:
                    continue
                if not more():
                    return best
                known[setting] = rate(setting)
                if known[setting] > known[best]:
                    best = setting
        if best == before:
            break
    return best


def list_axes(device: str, cores: int) -> Axes:
    """Return what is tried on a machine with so many cores."""
    threads = sorted({max(1, round(cores * part)) for part in (0.5, 0.75, 1, 1.5, 2)})
    axes: dict[str, Sequence[float]] = {
        "load": (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 1.0),
        "threads": threads,
        "batch": (128, 256, 512, 1024),
        "prefetch": (2, 3, 4),
    }
    if device == "cpu":
        axes |= {"batch": (64, 128, 256)}
        del axes["load"]
    return axes
