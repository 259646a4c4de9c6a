"""Results of `stream.py` as Markdown."""

from __future__ import annotations

from typing import Any

from parts.clock import median, ratio
from parts.record import Found, format_page, format_table

SETTING = ("threads", "load", "prefetch", "batch")


def markdown(found: Found) -> str:
    """Return all that was found; what was not measured is left out."""
    return format_page(
        found,
        "",
        ((title, SECTIONS[step](found[step])) for step, title in STEPS.items() if step in found),
    )


def _goals(rows: list[dict[str, Any]]) -> list[str]:
    return format_table(
        ("goal", "found", "met"),
        ((row["goal"], row["found"], "yes" if row["met"] else "**no**") for row in rows),
    )


def _pixels(rows: list[dict[str, Any]]) -> list[str]:
    head = ("set", "load", "against", "samples", "differ", "mean", "bias", "99 %", "99.9 %", "max")
    return format_table(
        head,
        (
            (
                row["set"],
                row["load"],
                row["against"],
                row["samples"],
                row["differing"],
                row["mean"],
                row["bias"],
                row["quantiles"]["0.99"],
                row["quantiles"]["0.999"],
                row["max"],
            )
            for row in rows
        ),
    )


def _damage(rows: list[dict[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        rest = {k: v for k, v in row.items() if k not in ("load", "case", "way")}
        said = ", ".join(f"{name} {value}" for name, value in rest.items())
        cells.append((row["load"], row["case"], row.get("way", ""), said.replace("|", "/")))
    return format_table(("load", "case", "way", "what happened"), cells)


def _points(rows: list[dict[str, Any]]) -> list[str]:
    best = max((row.get("img_s", 0) for row in rows), default=0)
    cells = []
    for row in rows:
        rate = f"{row['img_s']:,.0f}" if "img_s" in row else row["error"].splitlines()[0]
        cells.append(
            [
                row.get("lane", ""),
                *(row[name] for name in SETTING),
                f"**{rate}**" if row.get("img_s") == best else rate,
                row.get("cores", ""),
                row.get("gpu_percent", ""),
                row.get("jpeg_percent", ""),
            ]
        )
    return format_table(("lane", *SETTING, "img/s", "cores busy", "GPU %", "JPEG engines %"), cells)


def _turns(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    first = next(iter(found.values()))
    cells = []
    for name, rows in found.items():
        rates = [row["img_s"] for row in rows]
        cells.append(
            [
                name,
                *(rows[0][setting] for setting in SETTING),
                f"{median(rows):,.0f}",
                f"{min(rates):,.0f} to {max(rates):,.0f}",
                len(rows),
                f"{median(rows, 'cores'):.1f}",
                f"{ratio(first, rows):.3f}",
            ]
        )
    head = ("lane", *SETTING, "img/s", "from", "rounds", "cores busy", "first over this")
    return format_table(head, cells)


STEPS = {
    "goals": "Goals",
    "pixels": "Pixels, in grey levels",
    "damage": "Images that cannot be decoded",
    "turns": "In turn, with the best setting",
    "exact": "What it costs that pixels do not depend on the batch",
    "bare": "Parts alone",
    "sweep": "Sweep",
    "raw sweep": "Sweep, raw images",
    "raw turns": "Raw images, in turn",
    "raw parts": "Raw images, parts alone",
}
"""Sections in the order of the page."""

SECTIONS: dict[str, Any] = dict.fromkeys(STEPS, _points) | {
    "goals": _goals,
    "pixels": _pixels,
    "damage": _damage,
    "turns": _turns,
    "exact": _turns,
    "raw turns": _turns,
}
