"""The results: a JSON file and a page of tables, whole on the disk after each measurement."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.tools.files import atomic_write, ensure_writable

Found = dict[str, Any]
"""Everything found so far, ready for JSON."""


class Record:
    """Everything found so far. A process that is cut off loses what it was measuring, no more."""

    def __init__(
        self,
        out: Path,
        machine: dict[str, Any],
        command: str,
        page: Callable[[Found], str],
        kind: str = "",
    ) -> None:
        """Name the two files by date, kind and device.

        Args:
            out: folder for the results.
            machine: facts of the machine.
            command: command line of this run.
            page: formats what was found as Markdown.
            kind: what is measured, in a word for the file names.

        Raises:
            UsageError: the folder cannot be written.
        """
        ensure_writable(out, "results folder")
        device = re.sub(r"[^a-z0-9]+", "-", str(machine.get("gpu", "cpu")).lower()).strip("-")
        words = (time.strftime("%Y%m%d-%H%M%S", time.gmtime()), kind, device)
        self.path = out / f"{'-'.join(filter(None, words))}.json"
        self.found: Found = {"command": command, "machine": machine, "finished": False}
        self._page = page

    def put(self, step: str, found: Any) -> None:
        """Set what a step has found so far."""
        self.found[step] = found
        self._save()

    def add(self, step: str, row: dict[str, Any]) -> None:
        """Add a row to what a step has found."""
        self.found.setdefault(step, []).append(row)
        self._save()

    def _save(self) -> None:
        with atomic_write(self.path) as file:
            file.write((json.dumps(self.found, indent=1) + "\n").encode())
        with atomic_write(self.path.with_suffix(".md")) as file:
            file.write(self._page(self.found).encode())


def format_page(found: Found, title: str, sections: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Format results as Markdown: the machine, then each section, a title and its lines."""
    machine = found["machine"]
    lines = [f"# {title}{machine.get('gpu', machine['cpu'])}, {machine['date']}", ""]
    lines += [f"`{found['command']}`", "", *(f"- {name}: {fact}" for name, fact in machine.items())]
    if not found["finished"]:
        lines += ["", "**Cut off: what is missing below was not measured.**"]
    for name, section in sections:
        lines += ["", f"## {name}", "", *section]
    return "\n".join(lines) + "\n"


def format_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Format a table as lines of Markdown; rows may be shorter than the head."""
    filled = ([*row, *[""] * (len(head) - len(row))] for row in rows)
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *filled)]


def judge_goals(
    found: Found, goals: Iterable[tuple[str, float, float | None]]
) -> list[dict[str, Any]]:
    """Return each goal, what was found, and whether it is met.

    Args:
        found: results; nothing of a narrow network or of a CPU counts.
        goals: for each its name, the least value, and the measured one, None if it is missing.

    Returns:
        goal, found and met of each; the latter two are None where it was not measured.
    """
    counts = found["setup"]["width"] == 1 and "gpu" in found["machine"]
    return [
        {"goal": name, "found": value, "met": value >= wanted}
        if value is not None and counts
        else {"goal": name, "found": None, "met": None}
        for name, wanted, value in goals
    ]


def format_goals(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Format what `judge_goals` returns as a table."""
    words = {None: "not measured", True: "yes", False: "**no**"}
    cells = (
        (row["goal"], "" if row["found"] is None else f"{row['found']:.3f}", words[row["met"]])
        for row in rows
    )
    return format_table(("goal", "found", "met"), cells)
