"""Results of `step.py` as Markdown, and as figures for the goals."""

from __future__ import annotations

import statistics
from typing import Any

from parts.record import Found, format_goals, format_page, format_table, judge_goals

FLOP = 3 * 2 * 724_406_816
"""Operations of a training step with one image: forward, and both gradients at the same price.
(conv1's input needs no gradient: 5 % less is really computed.)"""
FASTER = 3.0
"""Goal on one H200: times the rate of the plain network, eager, in its best type."""
OF_LIMIT = {128: 0.30, 1024: 0.45}
"""Goals on one H200: share of the measured bf16 matrix limit, by images in a step."""


def best(rows: dict[str, dict[str, Any]], net: str, form: str = "") -> dict[str, Any] | None:
    """Return the row of a network's fastest lane, in one form or ("") in any."""
    there = [
        row
        for row in rows.values()
        if row["net"] == net and row.get("img_s") and form in ("", row["form"])
    ]
    return max(there, key=lambda row: statistics.median(row["img_s"]), default=None)


def goals(found: Found) -> list[dict[str, Any]]:
    """Return what became of the goals of a step; see `judge_goals`."""
    rows = [(f"{FASTER:g} times plain eager PyTorch", FASTER, measure_ratio(found))]
    if wanted := OF_LIMIT.get(found["setup"]["batch"]):
        rows.append((f"{wanted:.0%} of the bf16 matrix limit", wanted, measure_share(found)))
    return judge_goals(found, rows)


def measure_ratio(found: Found) -> float | None:
    """Return how many times the rate of plain eager PyTorch our fastest lane has."""
    rows = found.get("steps", {})
    ours, plain = best(rows, "duet"), best(rows, "plain", "eager")
    if not ours or not plain:
        return None
    return statistics.median(a / b for a, b in zip(ours["img_s"], plain["img_s"], strict=False))


def measure_share(found: Found) -> float | None:
    """Return the share of the bf16 matrix limit that our fastest lane reaches."""
    ours, limit = best(found.get("steps", {}), "duet"), found.get("limits", {}).get("bf16_tflops")
    if not ours or not limit:
        return None
    return statistics.median(ours["img_s"]) * FLOP / (limit * 1e12)


def figure(found: Found) -> str:
    """Return the results in one line: the fastest lanes of each form, and the two ratios."""
    rows = found.get("steps", {})
    lanes = (("duet", "graph"), ("duet", "fused"), ("duet", "compiled"), ("plain", "eager"))
    fastest = [row for net, form in lanes if (row := best(rows, net, form))]
    parts = [
        f"{row['net']} {row['mode']} {row['form']} {statistics.median(row['img_s']):,.0f} img/s"
        for row in fastest
    ]
    parts += [f"{name}: {row['failed']}" for name, row in rows.items() if "failed" in row]
    if (share := measure_share(found)) and found["setup"]["width"] == 1:
        parts.append(f"{share:.1%} of the bf16 limit")
    if ratio := measure_ratio(found):
        parts.append(f"{ratio:.2f} times plain eager")
    return ", ".join(parts)


def markdown(found: Found) -> str:
    """Return the results as Markdown."""
    sections = ((title, TABLES[key](found)) for key, title in TITLES.items() if found.get(key))
    return format_page(found, "A training step on ", sections)


def _limits(found: Found) -> list[str]:
    return format_table(
        ("limit", ""), ((key, f"{value:.1f}") for key, value in found["limits"].items())
    )


def _norm(found: Found) -> list[str]:
    head = ("form", "shape", "forward ms", "backward ms", "largest error")
    keys = ("forward_ms", "backward_ms", "error")
    return format_table(
        head,
        (
            (r["form"], "x".join(map(str, r["shape"])), *(
                (r["failed"],) if "failed" in r else (f"{r[key]:.4g}" for key in keys)
            ))
            for r in found["norm"]
        ),
    )  # fmt: skip


def _steps(found: Found) -> list[str]:
    plain = best(found["steps"], "plain", "eager")
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
    return format_table(head, rows)


def _goals(found: Found) -> list[str]:
    return format_goals(found["goals"])


def _profile(found: Found) -> list[str]:
    names = ("launches", "kernels", "gpu_ms", "gpu_busy")
    rows = [
        (row["lane"], *(f"{row[name]:.3g}" if name in row else "" for name in names))
        for row in found["profile"]
    ]
    lines = format_table(("lane", "launches", "kernels", "GPU ms", "GPU busy"), rows)
    for row in found["profile"]:
        top = ((f"{one['share']:.1%}", f"`{one['operation']}`") for one in row["top"])
        lines += ["", *format_table((row["lane"], "operation"), top)]
    return lines


TITLES = {
    "goals": "Goals",
    "limits": "Limits of the device",
    "steps": "Training steps, in turn",
    "norm": "Local response normalization with its ReLU, bf16",
    "profile": "Launches of a step, and where its time goes",
}
TABLES = {
    "goals": _goals, "limits": _limits, "steps": _steps, "norm": _norm, "profile": _profile,
}  # fmt: skip
