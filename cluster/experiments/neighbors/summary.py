"""RUN/neighbours/summary.json: the results of both commands on the features of one checkpoint.

    version, run, step, checkpoint_sha256, data_sha256
    neighbours   of cluster.experiments.neighbors: k, precision_at_k, precision_by_chance, auc,
                 auc_error, queries, base, ...
    codes        of cluster.experiments.neighbors.codes: k, rows of the table: method, bits, bytes,
                 recall_at_k, precision_at_k, queries_s, ...

A command replaces its own part, and keeps the other's if that is of the same features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cluster.experiments.neighbors.features import FeatureInfo
from pipeline.tools.files import atomic_write
from pipeline.tools.jsonl import parse_json

SUMMARY = "summary.json"
VERSION = 1


def write_summary(
    folder: Path,
    run: Path,
    about: FeatureInfo,
    part: Literal["neighbours", "codes"],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Put the part of a command into summary.json and return its whole content."""
    head = {
        "version": VERSION,
        "run": str(run),
        "step": about.step,
        "checkpoint_sha256": about.checkpoint_sha256,
        "data_sha256": about.data_sha256,
    }
    try:
        old = parse_json((folder / SUMMARY).read_bytes())
    except (OSError, ValueError):
        old = {}
    is_same = isinstance(old, dict) and all(
        old.get(key) == head[key] for key in head if key != "run"
    )
    kept = {name: old[name] for name in ("neighbours", "codes") if is_same and name in old}
    whole = head | kept | {part: facts}
    with atomic_write(folder / SUMMARY) as file:
        file.write((json.dumps(whole, indent=1) + "\n").encode())
    return whole


def describe_search(facts: Mapping[str, Any]) -> str:
    """Describe the images that a part is about: the queries, and those that were searched."""
    queries, base = facts["queries"], facts["base"]
    return (
        f"{queries['pictures']:,} images of {queries['split']} among {base['pictures']:,} of "
        f"{base['split']}"
    )
