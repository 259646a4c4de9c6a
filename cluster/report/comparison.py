"""Several runs side by side: results, settings that differ, curves on common axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from cluster.report.curves import draw_comparison
from cluster.report.records import Records, read_records
from cluster.report.settings import list_differences
from cluster.report.tables import list_results, write_progress
from pipeline.tools import charts
from pipeline.tools.errors import UsageError
from pipeline.tools.text import human_bytes, human_duration, percent

MOST_RUNS = 2 * len(charts.SERIES)
"""Number of runs whose lines can be told apart: each color, solid and dashed."""
FACTS = ("dtype", "cpu", "gpus", "workers", "torch", "dali")
"""Fields of machine.json that are compared beside the settings."""


@dataclass(frozen=True)
class ComparedRun:
    """A run as a row of the results, with the letter and color that stand for it."""

    letter: str
    color: str
    """CSS color of its lines."""
    is_dashed: bool
    name: str
    path: str
    records: Records
    cells: tuple[str, ...]
    """Texts of `COLUMNS`."""


COLUMNS = (
    "top-1 error, %", "top-5 error, %", "measured on", "step", "epochs", "img/s", "waiting, %",
    "time", "memory",
)  # fmt: skip
RANKED = (0, 1)
"""Places in `COLUMNS` whose lowest number is marked."""


def read_runs(runs: Sequence[Path]) -> list[Records]:
    """Read the runs of a comparison.

    Raises:
        UsageError: a run is named twice, there are too many, or a folder holds no run.
    """
    if len(runs) > MOST_RUNS:
        raise UsageError(f"{len(runs)} runs were named; a page compares {MOST_RUNS} at most")
    seen: dict[Path, Path] = {}
    for run in runs:
        if (first := seen.setdefault(run.resolve(), run)) is not run:
            raise UsageError(f"{run} is named twice{'' if first == run else f', as {first} too'}")
    return [read_records(run) for run in runs]


def describe_comparison(found: Sequence[Records]) -> dict[str, Any]:
    """Return the variables of comparison.html.j2."""
    runs = [describe_run(records, number) for number, records in enumerate(found)]
    tables = [
        {**records.config, **{name: records.machine.get(name, "not recorded") for name in FACTS}}
        for records in found
    ]
    return {
        "runs": runs,
        "columns": COLUMNS,
        "best": {place: find_best([run.cells[place] for run in runs]) for place in RANKED},
        "same_data": len({records.config.get("data_sha256") for records in found}) == 1,
        "same_source": len({run.cells[2] for run in runs}) == 1,
        "settings": list_differences(tables),
        "charts": draw_comparison(found, ascii_uppercase),
        "notes": [f"{run.letter}: {note}" for run in runs for note in run.records.notes],
    }


def describe_run(records: Records, number: int) -> ComparedRun:
    """Return a run as row `number`, from 0, of the results."""
    color, dashes = charts.pick_series(number)
    return ComparedRun(
        letter=ascii_uppercase[number],
        color=charts.css_color(color),
        is_dashed=dashes != "-",
        name=records.run.resolve().name,
        path=str(records.run),
        records=records,
        cells=_format_cells(records),
    )


def _format_cells(records: Records) -> tuple[str, ...]:
    metrics, results = records.metrics, list_results(records)
    errors = [percent(results[0].top1), percent(results[0].top5)] if results else ["–", "–"]
    nothing = "not validated yet" if len(metrics) else write_progress(records)
    source = results[0].source if results else nothing
    if not len(metrics):
        return (*errors, source, *["–"] * 6)
    seconds, waited = metrics["seconds"], metrics["data_wait"]
    total = float(np.nansum(seconds))
    memory = metrics["memory"][np.isfinite(metrics["memory"])]
    speeds = metrics["img_s"][np.isfinite(metrics["img_s"])]
    return (
        *errors,
        source,
        f"{metrics.last('step'):,.0f}",
        f"{metrics.last('epoch'):.3g}" if math.isfinite(metrics.last("epoch")) else "–",
        f"{np.median(speeds):,.0f}" if len(speeds) else "–",
        percent(float(np.nansum(seconds * waited)) / total if total else None),
        " ".join(human_duration(total)) if total else "–",
        human_bytes(float(memory.max())) if len(memory) else "–",
    )


def find_best(texts: Sequence[str]) -> str:
    """Return the text of the lowest number; "" if there are fewer than two numbers."""
    numbers = {text: float(text) for text in texts if text != "–"}
    return min(numbers, key=lambda text: numbers[text]) if len(numbers) > 1 else ""
