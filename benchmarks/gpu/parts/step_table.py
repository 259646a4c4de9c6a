"""Results of `step.py` as Markdown, and as figures for the goals."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

FLOP = 3 * 2 * 724_406_816
"""Operations of a training step with one image: forward, and both gradients at the same price.
(conv1's input needs no gradient: 5 % less is really computed.)"""
FASTER, OF_LIMIT = 3.0, 0.30
"""Goals on one H100: over the plain version in its best type, and of the bf16 matrix limit."""


def best(rows: dict[str, dict[str, Any]], net: str) -> dict[str, Any] | None:
    """Return the row of a network's fastest lane, of the plain network only the eager ones."""
    there = [
        row
        for row in rows.values()
        if row["net"] == net and row.get("img_s") and (net == "duet" or row["form"] == "eager")
    ]
    return max(there, key=lambda row: statistics.median(row["img_s"]), default=None)


def goals(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare what was found with the goals; nothing of narrow networks or of a CPU."""
    ours, plain = (best(found.get("steps", {}), net) for net in ("duet", "plain"))
    if not ours or not plain or found["setup"]["width"] != 1 or "gpu" not in found["machine"]:
        return []
    times = statistics.median(a / b for a, b in zip(ours["img_s"], plain["img_s"], strict=False))
    rows = [{"goal": f"{FASTER} times plain eager PyTorch", "found": times, "met": times >= FASTER}]
    if limit := found.get("limits", {}).get("bf16_tflops"):
        share = statistics.median(ours["img_s"]) * FLOP / (limit * 1e12)
        rows.append(
            {"goal": f"{OF_LIMIT} of bf16 matrices", "found": share, "met": share >= OF_LIMIT}
        )
    return rows


def markdown(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    machine = found["machine"]
    lines = [f"# A training step on {machine.get('gpu', machine['cpu'])}, {machine['date']}", ""]
    lines += [f"`{found['command']}`", "", *(f"- {k}: {v}" for k, v in machine.items())]
    if not found["finished"]:
        lines += ["", "**Cut off: what is missing below was not measured.**"]
    for key, title in TITLES.items():
        if found.get(key):
            lines += ["", f"## {title}", "", *TABLES[key](found)]
    return "\n".join(lines) + "\n"


def _limits(found: dict[str, Any]) -> list[str]:
    return _table(("limit", ""), ((key, f"{value:.1f}") for key, value in found["limits"].items()))


def _norm(found: dict[str, Any]) -> list[str]:
    head = ("form", "shape", "forward ms", "backward ms", "largest error")
    keys = ("forward_ms", "backward_ms", "error")
    return _table(
        head,
        (
            (r["form"], "x".join(map(str, r["shape"])), *(
                (r["failed"],) if "failed" in r else (f"{r[key]:.4g}" for key in keys)
            ))
            for r in found["norm"]
        ),
    )  # fmt: skip


def _steps(found: dict[str, Any]) -> list[str]:
    plain = best(found["steps"], "plain")
    rows = []
    for name, row in found["steps"].items():
        if not row.get("img_s"):
            rows.append((name, row.get("failed", "no time left")))
            continue
        rate = statistics.median(row["img_s"])
        over = f"{rate / statistics.median(plain['img_s']):.2f}" if plain else ""
        limit = found.get("limits", {}).get("bf16_tflops")
        whole = found["setup"]["width"] == 1 and limit
        share = f"{rate * FLOP / limit / 1e12:.1%}" if whole else ""
        spread = f"{min(row['img_s']):,.0f} {max(row['img_s']):,.0f}"
        rows.append((name, f"{rate:,.0f}", spread, over, share, f"{row['warm_up_s']:.1f}"))
    head = ("network, type, form", "img/s", "from to", "over plain's best eager",
            "of the bf16 limit", "first steps s")  # fmt: skip
    return _table(head, rows)


def _goals(found: dict[str, Any]) -> list[str]:
    rows = (
        (r["goal"], f"{r['found']:.3f}", "yes" if r["met"] else "**no**") for r in found["goals"]
    )
    return _table(("goal", "found", "met"), rows)


def _profile(found: dict[str, Any]) -> list[str]:
    rows = ((f"{row['share']:.1%}", f"`{row['operation']}`") for row in found["profile"])
    return _table(("share", "operation"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    filled = ([*row, *[""] * (len(head) - len(row))] for row in rows)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *filled)]


TITLES = {
    "goals": "Goals",
    "limits": "Limits of the device",
    "steps": "Training steps, in turn",
    "norm": "Local response normalisation with its ReLU, bf16",
    "profile": "Where our fastest lane spends its time",
}
TABLES = {
    "goals": _goals, "limits": _limits, "steps": _steps, "norm": _norm, "profile": _profile,
}  # fmt: skip
