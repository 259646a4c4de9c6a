"""RUN/neighbours/summary.json: the numbers of both commands, for whoever gathers them.

    version, run, step, checkpoint_sha256, data_sha256
    neighbours   of python -m cluster.experiments.neighbors: precision_at_k, auc, mean_ratio, pictures, ...
    codes        of python -m cluster.experiments.neighbors.codes: rows of the table, ...

Either command writes its own part and keeps the other's, if that is of the same features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from cluster.experiments.neighbors.features import About
from pipeline.tools.files import sealed

NAME = "summary.json"
VERSION = 1


def write(
    folder: Path, run: Path, about: About, part: Literal["neighbours", "codes"], facts: Any
) -> dict[str, Any]:
    """Put a part into the summary and return the whole."""
    head = {
        "version": VERSION,
        "run": str(run),
        "step": about.step,
        "checkpoint_sha256": about.checkpoint_sha256,
        "data_sha256": about.data_sha256,
    }
    old = _read(folder / NAME)
    same = all(old.get(key) == head[key] for key in head if key != "run")
    kept = {name: old[name] for name in ("neighbours", "codes") if same and name in old}
    whole = head | kept | {part: facts}
    with sealed(folder / NAME) as file:
        file.write((json.dumps(whole, indent=1) + "\n").encode())
    return whole


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}
