"""Averages of the networks of a study: every run's probabilities, then the table of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from cluster.ensemble_table import KINDS, table_of
from cluster.evaluate import Evaluate, evaluate
from cluster.experiments.study.config import Study
from cluster.experiments.study.runner import Run
from cluster.run.probabilities import Saved, file_of

VIEWS: Literal[10] = 10
"""As the paper's table counts."""


def measured(study: Study, runs: Sequence[Run]) -> dict[str, Any]:
    """Count averages of the runs of a study's variant, in ten views.

    Returns:
        for study.json: "nets", the lines of `ensemble_table.table_of`, "samples", the pictures they
        were counted on, and "rows" for the averages.

    Raises:
        DuetError: as `cluster.evaluate` raises.
    """
    for run in runs:
        _save(run)
    saved = [Saved(run.folder, VIEWS) for run in runs]
    found = table_of(saved, study.sizes)
    rows = [
        {
            "variant": f"{line['nets']} networks, {kind.replace('_', ' ')} weights", "seed": None,
            "lr": runs[0].config.lr, "measure": study.measure, "value": line[kind]["top1_error"],
            "top5_error": line[kind]["top5_error"], "pictures": line["nets"] * runs[0].position,
            "img_s": None, "sd": line[kind]["top1_error_sd"],
        }
        for line in found["sizes"]
        for kind in KINDS
    ]  # fmt: skip
    samples = saved[0].about.samples
    return {"nets": found["sizes"], "views": VIEWS, "samples": samples, "rows": rows}


def _save(run: Run) -> None:
    """Have the probabilities of a run, of its last step."""
    if file_of(run.folder, VIEWS).is_file():
        saved = Saved(run.folder, VIEWS)
        if saved.about.step == run.config.total_steps(run.pictures):
            return
    evaluate(
        Evaluate(
            run=run.folder,
            data=run.data,
            views=VIEWS,
            device=run.config.device,
            save_probabilities=True,
        )
    )
