"""The command line of a benchmark, and what it reports: tables, figures with rounds, JSON.

A benchmark is a dataclass of options, a child of `Options`, and a function from it to a `Report`;
`start` is its main function. The JSON that it prints with `--json` is a file of results.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import rich.box
import rich.console
import rich.table
import tyro

from pipeline.dataset.manifest import NAME as MANIFEST
from pipeline.throughput.clock import CpuLoad, Rate
from pipeline.throughput.hardware import describe_machine
from pipeline.tools.errors import UsageError, run
from pipeline.tools.files import read_text, sha256

BUSY = 0.25
"""Cores that others keep busy on average, from which on a machine counts as busy."""
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
"""Extensions of x86 and Arm processors that kernels here are chosen by."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every benchmark."""

    json: bool = False
    """Print one JSON object on stdout, the tables on stderr."""


Given = TypeVar("Given", bound=Options)


@dataclass(frozen=True)
class Figure:
    """A measured quantity."""

    rounds: list[float]
    """Value of each round."""
    unit: str = "img/s"
    """Unit; `x` is a ratio within a round."""
    better: Literal["higher", "lower"] = "higher"

    @property
    def rate(self) -> Rate:
        """The rounds as windows of a rate, with median, spread and error."""
        return Rate(tuple(self.rounds), 0.0, 0.0)


@dataclass(frozen=True)
class Table:
    """A table as people read it: cells in Markdown."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    notes: Sequence[str] = ()
    """Lines below it."""


@dataclass(kw_only=True)
class Report:
    """Results of a benchmark."""

    tables: dict[str, Table]
    """Tables by the name of their place on a page."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """Quantities that a later run is compared with."""
    missing: dict[str, str] = field(default_factory=dict)
    """Reason for each way that was not measured."""
    facts: dict[str, Any] = field(default_factory=dict)
    """All else, ready for JSON."""
    exit_code: int = 0


def start(
    options: type[Given], measure: Callable[[Given], Report], description: str | None
) -> None:
    """Run a benchmark: read its command line, measure, print; end the process."""
    program = f"python benchmarks/{Path(sys.argv[0]).name}"
    run(lambda: _run(options, measure, program, description))


def _run(
    options: type[Given], measure: Callable[[Given], Report], program: str, description: str | None
) -> int:
    given = tyro.cli(options, prog=program, description=description)
    for flag in ("rounds", "batch_size", "seconds", "workers"):
        if getattr(given, flag, 1) <= 0:
            raise UsageError(f"--{flag.replace('_', '-')} must be above 0")
    folder = getattr(given, "folder", None)
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--folder {folder} is not a folder; make it or name another")
    load, begun = CpuLoad(), os.getloadavg()[0]
    report = measure(given)
    found = {
        "benchmark": Path(sys.argv[0]).stem,
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join([*program.split(), *(x for x in sys.argv[1:] if x != "--json")]),
        "settings": describe_settings(given),
        "machine": describe_this_machine()
        | {"load_at_start": round(begun, 2), "other_cores": count_others(load)},
        **report.facts,
        "figures": {name: asdict(one) for name, one in report.figures.items()},
        "missing": report.missing,
        "tables": {name: asdict(one) for name, one in report.tables.items()},
    }
    print_report(found, to_stderr=given.json)
    if given.json:
        sys.stdout.write(json.dumps(found, ensure_ascii=False) + "\n")
    return report.exit_code


def describe_settings(given: Any) -> dict[str, Any]:
    """Return all that a later run must have in common: options, and data by their content.

    A dataset is its manifest's SHA-256. Of another path the name is left; `json` and `folder` say
    only where something goes.
    """
    settings = {}
    for one in dataclasses.fields(given):
        value = getattr(given, one.name)
        if one.name in ("json", "folder"):
            continue
        if isinstance(value, Path):
            manifest = value / MANIFEST
            value = f"dataset {sha256(manifest)[:12]}" if manifest.is_file() else value.name
        settings[one.name] = list(value) if isinstance(value, tuple) else value
    return settings


def describe_this_machine() -> dict[str, Any]:
    """Return what a figure depends on: processor, cores, features, memory, versions."""
    machine = describe_machine(gpu=False)
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", read_text(Path("/proc/cpuinfo")), re.M)
    known = set(flags[1].split()) if flags else set()
    return {
        "cpu": machine.processor,
        "cores": machine.cores,
        "features": [name for name in FEATURES if name in known],
        "memory_gib": round(machine.memory / 2**30, 1),
        "python": platform.python_version(),
        "torch": machine.torch,
        "dali": machine.dali,
    }


def count_others(load: CpuLoad) -> float:
    """Return the cores that other processes kept busy on average since `load` was made."""
    return round(load.others() * (os.cpu_count() or 1), 2)


def describe_load(machine: dict[str, Any]) -> str:
    """Return a line for a machine that was busy with other work, else nothing."""
    others = machine.get("other_cores", 0.0)
    if others < BUSY:
        return ""
    return f"the machine is busy: {others:.1f} other cores on average of {machine['cores']}"


def describe_facts(found: dict[str, Any]) -> str:
    """Return date, machine and versions of a file of results in one line."""
    machine = found["machine"]
    if isinstance(machine, str):  # carried over from a page
        return ", ".join(filter(None, (found["date"], machine)))
    features = f" ({', '.join(machine['features'])})" if machine["features"] else ""
    versions = [f"{name} {machine[name]}" for name in ("torch", "dali") if machine.get(name)]
    memory = f"{machine['memory_gib']:.0f} GiB, " if machine["memory_gib"] else ""
    return (
        f"{found['date']}, {machine['cpu']}, {machine['cores']} cores{features}, {memory}"
        f"Python {machine['python']}, {', '.join(versions)}"
    ).replace("dali", "DALI")


def print_report(found: dict[str, Any], *, to_stderr: bool) -> None:
    """Print tables, reasons of missing rows, and the machine."""
    console = rich.console.Console(stderr=to_stderr, highlight=False, markup=False)
    console.width = max(console.width, 160)  # no column is cut where nobody looks
    for table in found["tables"].values():
        out = rich.table.Table(box=rich.box.SIMPLE, pad_edge=False, title_justify="left")
        out.title = table["title"] or None
        for number, title in enumerate(table["head"]):
            out.add_column(title, justify="right" if number else "left", no_wrap=not number)
        for row in table["rows"]:
            out.add_row(*(cell.replace("**", "").replace("`", "") for cell in row))
        console.print(out)
        console.print("\n".join(table["notes"])) if table["notes"] else None
    for name, reason in found["missing"].items():
        console.print(f"{name}: {reason}")
    console.print(describe_facts(found))
    if line := describe_load(found["machine"]):
        console.print(line)


def format_range(values: Sequence[float], form: str = ",.0f") -> str:
    """Return the least and the greatest value as `1 to 2`."""
    return f"{min(values):{form}} to {max(values):{form}}"


def format_figure(value: float | None, form: str, missing: str = "–") -> str:
    """Return a number in a format, or what stands for one that is not known."""
    return missing if value is None or math.isnan(value) else format(value, form)
