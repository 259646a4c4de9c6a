"""What a study has found, as study.json and as a Markdown table with mean and spread over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.experiments.study.config import Study, Variant
from cluster.experiments.study.results import Result
from cluster.experiments.study.runner import Run
from pipeline.dataset.manifest import Manifest
from pipeline.remote.dataset import metadata
from pipeline.tools.files import sealed

RESULT, TABLE, PLOT = "study.json", "study.md", "study.png"


def summary(
    study: Study, results: Sequence[Result], others: Sequence[Result], runs: Sequence[Run]
) -> dict[str, Any]:
    """Return what study.json holds but for ensembles; errors are fractions.

    Args:
        study: the study.
        results: of the runs that count.
        others: of those of the grid that were not best.
        runs: that count; they say at which scale.
    """
    return {
        "study": study.name,
        "title": study.title,
        "claim": study.claim,
        "paper": study.paper,
        "source": study.source,
        "measure": study.measure,
        "goal": study.goal if study.measure == "pictures" else None,
        "scale": scale(runs),
        "rows": [one.row(study.measure) for one in results],
        "grid": [one.row(study.measure) for one in others],
        "variants": variants(study, results, others),
        "spread": pooled([_values(results, one.name) for one in study.shown]),
        "plot": PLOT,
    }


def scale(runs: Sequence[Run]) -> str:
    """At which scale this was run, in words: what the paper had otherwise."""
    found = []
    for run in runs:
        manifest = Manifest.load(metadata(run.data))
        config = run.config
        text = (
            f"{run.pictures:,} training pictures of {len(manifest.classes)} classes, width "
            f"{config.width:g}, at most {run.total // config.batch_size:,} steps of "
            f"{config.batch_size}"
        )
        if text not in found:
            found.append(text)
    return "; ".join(found)


def variants(
    study: Study, results: Sequence[Result], others: Sequence[Result]
) -> list[dict[str, Any]]:
    """Return mean, spread over seeds, and the comparison with the first variant, of each."""
    found: list[dict[str, Any]] = []
    for variant in study.shown:
        mine = [one for one in results if one.variant == variant.name]
        values = _values(results, variant.name)
        whole = len(values) == len(mine) and bool(values)
        mean = statistics.fmean(values) if whole else None
        found.append(
            {
                "variant": variant.name,
                "lr": mine[0].lr,
                "at": mine[0].at,
                "n": len(mine),
                "came_to_it": len(values),
                "mean": mean,
                "sd": statistics.stdev(values) if whole and len(values) > 1 else None,
                "against_first": _against(study, mean, found),
                "img_s": statistics.fmean(one.img_s for one in mine),
                "val_error": _mean([one.val_error for one in mine]),
                "train_error": _mean([one.train_error for one in mine]),
                "edge": _at_edge(variant, mine[0], others),
            }
        )
    return found


def pooled(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation over seeds, pooled over variants; None if there is none."""
    spreads = [statistics.variance(one) for one in groups if len(one) > 1]
    return statistics.fmean(spreads) ** 0.5 if spreads else None


def _against(study: Study, mean: float | None, before: Sequence[dict[str, Any]]) -> float | None:
    """A factor for pictures, a difference for errors; None for the first and what has no mean."""
    if mean is None or not before or before[0]["mean"] is None:
        return None
    first = float(before[0]["mean"])
    return mean / first if study.measure == "pictures" else mean - first


def _at_edge(variant: Variant, chosen: Result, others: Sequence[Result]) -> bool:
    """Whether the best value was the first or last tried: a better one may lie beyond it."""
    values = variant.values
    tried = any(one.variant == chosen.variant for one in others)
    return tried and chosen.at in (values[0], values[-1])


def _values(results: Sequence[Result], variant: str) -> list[float]:
    return [one.value for one in results if one.variant == variant and math.isfinite(one.value)]


def _mean(values: Sequence[float]) -> float | None:
    known = [one for one in values if math.isfinite(one)]
    return statistics.fmean(known) if known else None


def as_text(study: Study, found: dict[str, Any]) -> str:
    """Return the findings as Markdown."""
    head = [f"### {study.title}", "", f"{study.claim} ({study.source}). Paper: {study.paper}.", ""]
    body = _of_nets(found) if study.measure == "nets" else _of_variants(study, found)
    return "\n".join([*head, *body, "", f"Here: {found['scale']}. {_noise(study, found)}"]) + "\n"


def _of_variants(study: Study, found: dict[str, Any]) -> list[str]:
    first = found["variants"][0]["variant"]
    what, rate = {
        "pictures": (f"pictures to {study.goal:.0%} training error", f"over {first}"),
        "error": ("top-1 error, validation", f"against {first}"),
        "gap": ("validation less training error, points", f"against {first}"),
    }[study.measure]
    extra = " top-1 error, validation / training |" if study.measure == "gap" else ""
    grid = f" best {study.grid[0]} |" if study.grid[1] else ""
    lines = [
        f"| variant |{grid} {what} (each seed) | {rate} |{extra} img/s a run |",
        "|---" * (4 + bool(grid) + bool(extra)) + "|",
    ]
    for one in found["variants"]:
        rows = [row for row in found["rows"] if row["variant"] == one["variant"]]
        each = ", ".join(_cell(study, row["value"], row) for row in rows)
        mean = _cell(study, one["mean"]) if one["mean"] is not None else "not by all"
        middle = f" {one['at']}{' (edge of the grid)' if one['edge'] else ''} |" if grid else ""
        errors = (
            f" {_percent(one['val_error'])} / {_percent(one['train_error'])} |" if extra else ""
        )
        lines.append(
            f"| `{one['variant']}` |{middle} {mean} ({each}) | {_rate(study, one)} |{errors} "
            f"{one['img_s']:,.0f} |"
        )
    return lines


def _of_nets(found: dict[str, Any]) -> list[str]:
    lines = [
        "| networks | top-1, equal weights | top-5 | searched on these pictures | top-5 "
        "| searched on the other half | top-5 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found["nets"]:
        cells = []
        for kind in ("equal", "searched", "held_out"):
            errors = one[kind]
            for name in ("top1_error", "top5_error"):
                sd = f" ± {100 * errors[f'{name}_sd']:.1f}" if errors[f"{name}_sd"] else ""
                cells.append(f"{100 * errors[name]:.1f}{sd} %")
        ways = f" ({one['combinations']} combinations)" if one["combinations"] > 1 else ""
        lines.append(f"| {one['nets']}{ways} | {' | '.join(cells)} |")
    return lines


def _noise(study: Study, found: dict[str, Any]) -> str:
    if study.measure == "nets":
        return "± is the standard deviation over the combinations."
    if found["spread"] is None:
        return "One seed each: nothing is known of the noise."
    one = found["spread"]
    gap = one * (2 / len(study.seeds)) ** 0.5
    if study.measure == "pictures":
        return f"Standard deviation over seeds {one:,.0f} pictures (pooled)."
    return (
        f"Standard deviation over seeds {100 * one:.1f} points (pooled), of a difference "
        f"{100 * gap:.1f}: below {200 * gap:.1f} it may be chance."
    )


def _cell(study: Study, value: float | None, row: dict[str, Any] | None = None) -> str:
    if value is None:
        note = row["note"] if row else "not reached"
        error = row["train_error"] if row else None
        return f"{note}{f' ({error:.0%} at the end)' if error is not None else ''}"
    return f"{value:,.0f}" if study.measure == "pictures" else f"{100 * value:.1f}"


def _rate(study: Study, one: dict[str, Any]) -> str:
    if one["against_first"] is None:
        return ""
    if study.measure == "pictures":
        return f"{one['against_first']:.2f}×"
    return f"{100 * one['against_first']:+.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def as_json(found: dict[str, Any]) -> str:
    """Return it as one line of JSON."""
    return json.dumps(found) + "\n"


def write(study: Study, found: dict[str, Any], out: Path) -> str:
    """Write study.json and study.md, and return the text of the latter."""
    text = as_text(study, found)
    for name, content in ((TABLE, text), (RESULT, as_json(found))):
        with sealed(out / name) as file:
            file.write(content.encode())
    return text
