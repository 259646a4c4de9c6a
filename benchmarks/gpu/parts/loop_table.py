"""Results of `loop.py` as Markdown, and the goals."""

from __future__ import annotations

from typing import Any

from parts.record import Found, format_goals, format_page, format_table, judge_goals

OF_SLOWER, BUSY = 0.95, 0.95
"""Goals on one H200: of the slower of stream and step, on raw images; time that the GPU is busy."""
KINDS = {"jpeg": "JPEGs", "raw": "Raw images"}
MEANING = {
    "stream": "stream alone, img/s",
    "step": "step alone, img/s",
    "loop": "loop, img/s",
    "torch_memory_gib": "most memory of torch on the GPU, GiB",
    "whole_s": "whole run, seconds",
}


def goals(found: Found) -> list[dict[str, Any]]:
    """Return what became of the goals of the loop; see `judge_goals`."""
    raw = found.get("raw", {})
    slower = min(raw.get("stream") or 0, raw.get("step") or 0)
    share = raw["loop"] / slower if slower and "loop" in raw else None
    rows = [
        (f"loop on raw images: {OF_SLOWER} of the slower of stream and step", OF_SLOWER, share),
        (f"GPU busy {BUSY:.0%} of the loop, raw", BUSY, raw.get("profile", {}).get("gpu_busy")),
    ]
    return judge_goals(found, rows)


def markdown(found: Found) -> str:
    """Return the results as Markdown."""
    sections = []
    if "goals" in found:
        sections.append(("Goals", format_goals(found["goals"])))
    if "bits" in found:
        sections.append(
            ("Losses and bits of a short run, twice", format_table(("", ""), found["bits"].items()))
        )
    for name, title in KINDS.items():
        if name in found:
            sections.append((title, _describe_loop(found[name])))
        if top := found.get(name, {}).get("profile", {}).get("top"):
            rows = [(f"{row['share']:.1%}", f"`{row['operation']}`") for row in top]
            sections.append((f"{title}: operations", format_table(("share", "operation"), rows)))
    return format_page(found, "The training loop on ", sections)


def _describe_loop(row: dict[str, Any]) -> list[str]:
    cells = [(text, row[name]) for name, text in MEANING.items() if name in row]
    cells += [
        (f"{name} of a step, median", value) for name, value in row.get("medians", {}).items()
    ]
    profile = row.get("profile", {})
    cells += [(f"{name}, profiled", value) for name, value in profile.items() if name != "top"]
    cells += [("warning", text) for text in row.get("warnings", ())]
    if "stream_failed" in row:
        cells.append(("stream alone failed", row["stream_failed"]))
    return format_table(("", ""), cells)
