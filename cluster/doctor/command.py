"""Look for what would keep a training from running, and say what mends it.

    python -m cluster.doctor [CONFIG] [--data DATA] [--run RUN] [--json]

Exit code 3 if something fails, 0 if there are warnings only.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from cluster.config import Config
from cluster.config_file import load
from cluster.doctor.examination import Examination
from cluster.doctor.finding import Finding
from pipeline.tools.errors import SetupError, UsageError

COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Look for what would keep a training from running, and say what mends it."""

    config: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")] = None
    """Config of the training."""
    data: str = ""
    """Its data set: a folder or an address."""
    run: Path | None = None
    """Its run folder; made if need be."""
    json: bool = False
    """Print one JSON object to stdout, everything else to stderr."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        UsageError: CONFIG cannot be read.
    """
    options = tyro.cli(Doctor, args=argv, prog="python -m cluster.doctor")
    config = read(options.config) if options.config else None
    console = Console(file=sys.stderr if options.json else sys.stdout, highlight=False)
    found = []
    visit = Examination(options.data, options.run, config)
    with redirect_stdout(sys.stderr), console.status("") as status:  # shows on a terminal only
        for finding in visit.findings(lambda what: status.update(f"looking at {what}")):
            found.append(finding)
            console.print(line(finding), soft_wrap=True)
    failed = sum(finding.status == "FAIL" for finding in found)
    warned = sum(finding.status == "warn" for finding in found)
    console.print(verdict(failed, warned), soft_wrap=True)
    if options.json:
        result = {"ok": not failed, "checks": [asdict(finding) for finding in found]}
        sys.stdout.write(json.dumps(result) + "\n")
    return SetupError.exit_code if failed else 0


def read(path: Path) -> Config:
    """Read a config file.

    Raises:
        UsageError: it is missing or wrong.
    """
    try:
        return Config(**load(path))
    except ValueError as error:
        raise UsageError(f"{error} ({path})") from error


def line(finding: Finding) -> Text:
    """A finding for people; the mending command on a line of its own."""
    text = Text.assemble(
        (f"{finding.status:<5}", COLOURS[finding.status]), f"{finding.name:<14} {finding.value}"
    )
    if finding.mend:
        text.append(f"\n      -> {finding.mend}")
    return text


def verdict(failed: int, warned: int) -> str:
    """The last line."""
    if not failed:
        return "all well" if not warned else f"all well, {warned} to look at"
    return f"{failed} problem{'s' if failed > 1 else ''}, each with what mends it"
