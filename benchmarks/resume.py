"""The resume torture table: loaders are cut, killed and resumed, and one judge counts what broke.

    python benchmarks/resume.py [--only duet,grain] [--cases middle,twice] [--json]

Every loader reads the same 203 small images in its own format, shuffled, with a random crop and
flip as its users write it, and saves its state as its own page says (`benchmarks/torture/`). A
trainer, a process for each rank, notes identity and pixels of all that it is handed; the judge
compares what it saw over all restarts with a run that was never cut (`torture/judge.py` defines
both). A loader that is not installed, or breaks, is a row with its reason. All of it takes some
ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.report import Options, Report, Table, start
from torture import PEERS
from torture.cases import CASES

from pipeline.tools.errors import UsageError
from pipeline.tools.progress import Progress


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(Options):
    """Cut, kill and resume data loaders."""

    only: str = ""
    """Names of loaders with commas between; the default is all."""
    cases: str = ""
    """Names of cases with commas between; the default is all."""
    folder: Path | None = None
    """Folder for the temporary one with images and notes."""
    keep: bool = False
    """Keep that folder: notes of every consumer, and what it printed."""


def choose(names: str, known: dict[str, Any], flag: str) -> list[str]:
    """Return the names that a flag lists, all if none.

    Raises:
        UsageError: an unknown name.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in chosen if name not in known]:
        raise UsageError(f"{flag} {unknown[0]}: no such name; there are {', '.join(known)}")
    return [name for name in known if name in chosen] or list(known)


def run_peer(name: str, folder: Path, cases: list[str], progress: Progress) -> dict[str, Any]:
    """Send one loader through the cases, in a process of its own; return its row."""
    peer = PEERS[name]
    row: dict[str, Any] = {
        "title": peer.title,
        "versions": peer.versions(),
        "page": peer.page,
        "note": peer.note,
        "cases": {},
    }
    if peer.missing:
        return row | {"missing": peer.missing}
    here, root = Path(__file__).parent, Path(__file__).parents[1]
    path = os.pathsep.join([str(here), str(root), os.environ.get("PYTHONPATH", "")])
    folder.mkdir()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "torture", name, folder, ",".join(cases)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            found = json.loads(line)
            if case := found.pop("case", None):
                row["cases"][case] = found
                progress.advance(1)
            else:
                row |= found
        process.wait()
    if process.returncode and "missing" not in row:
        lines = (folder / "log").read_text(errors="replace").strip().splitlines()
        row["missing"] = f"its process ended: {lines[-1] if lines else process.returncode}"
    return row


def collect(options: ResumeOptions, folder: Path) -> dict[str, Any]:
    """Run all, and return the results, ready for JSON."""
    names = choose(options.only, PEERS, "--only")
    cases = choose(options.cases, CASES, "--cases")
    rows = {}
    with Progress("resuming", total=len(names) * len(cases), unit="cases") as progress:
        for name in names:
            progress.note(PEERS[name].title)
            rows[name] = run_peer(name, folder / name, cases, progress)
    return {"cases": {case: CASES[case].title for case in cases}, "loaders": rows}


def word(case: str, found: dict[str, Any], steady: bool) -> str:
    """Return the outcome of a case as the table says it.

    Args:
        case: name of the case.
        found: what was found.
        steady: two uncut runs of this loader had the same pixels.
    """
    outcome = found["outcome"]
    if outcome == "none":
        return "no workers" if found.get("message") else "–"
    if outcome in ("refused", "stops", "hangs", "failed"):
        return f"{outcome}, says so" if case == "damage" and found.get("said") else outcome
    lost, twice = found["missing"], found["repeated"]
    if case == "damage":
        return _word_damage(found, steady)
    if case == "seed" and not (lost or twice or found["reordered"]):
        return "old order kept"
    if outcome == "wrong":
        counts = ((lost, "lost"), (twice, "twice"))
        return ", ".join(f"**{count} {what}**" for count, what in counts if count)
    words = {"exact": "exact", "order": "order", "samples": "each once"}[outcome]
    return words + (" ¹" if found.get("resumes_in") == "rest of the epoch" else "")


def _word_damage(found: dict[str, Any], steady: bool) -> str:
    if found.get("reported"):
        return "replaced, listed"
    if not steady or not found["pixels"]:
        return "goes on"
    return f"{found['pixels']} other" + (", warns" if found["said"] else ", silent")


def make_rows(found: dict[str, Any]) -> list[list[str]]:
    """Return the table: a head, and a row for each case with a column for each loader."""
    shown = {name: row for name, row in found["loaders"].items() if row.get("cases")}
    rows = [["", *(row["title"] for row in shown.values())]]
    rows.append(["version", *(", ".join(row["versions"].values()) for row in shown.values())])
    for case, title in found["cases"].items():
        cells = []
        for row in shown.values():
            steady = row["cases"].get("again", {}).get("pixels", 0) == 0
            cells.append(
                word(case, row["cases"][case], steady) if case in row["cases"] else "stopped"
            )
        rows.append([title, *cells])
    return rows


NOTE = "¹ An epoch without batches comes first: a trainer that counts its loops must expect it."


def make_tables(found: dict[str, Any]) -> dict[str, Table]:
    """Return the table of the cases, and that of the ways of saving state."""
    head, *rows = make_rows(found)
    ways = []
    for row in found["loaders"].values():
        covers = row.get("covers")
        counts = "" if covers is None else f"{covers['missing']}, {covers['repeated']}"
        ways.append([row["title"], row["page"], counts, row.get("missing") or row["note"]])
    title = ["loader", "state by", "uncut: missing, repeated", "remark"]
    return {"resume": Table(head, rows, notes=[NOTE]), "resume-states": Table(title, ways)}


def report(options: ResumeOptions) -> Report:
    """Run the cases."""
    folder = Path(tempfile.mkdtemp(prefix="resume-", dir=options.folder))
    try:
        found = collect(options, folder)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    missing = {name: row["missing"] for name, row in found["loaders"].items() if row.get("missing")}
    return Report(tables=make_tables(found), missing=missing, facts=found)


if __name__ == "__main__":
    start(ResumeOptions, report, __doc__)
