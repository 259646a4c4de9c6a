"""Look for what would keep a training from running, and say what mends it.

    python -m cluster.doctor [CONFIG] [--data DATA] [--run RUN] [--json]

Exit code 3 if something fails, 0 if there are warnings only.

All checks in turn, and what one of them has to know of another.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from cluster.config import Config, load_settings
from cluster.doctor.finding import Finding, fail, first_line
from pipeline.tools.errors import SetupError, UsageError


class Examination:
    """Of this machine and its cluster, with a training in mind as far as one is given.

    Each check loads what it needs itself: where that is broken, the others go on.

    Args:
        data: folder or address of a data set; empty: none.
        run: folder of a run; None: none.
        config: of a training; None: none.
    """

    def __init__(self, data: str, run: Path | None, config: Config | None) -> None:
        self.data, self.run, self.config = data, run, config
        self.address = os.environ.get("RAY_ADDRESS", "")
        self.classes: int | None = None
        """Of the data set; None: not known."""
        self.gpus = 0

    def findings(self, tell: Callable[[str], None] = lambda what: None) -> Iterator[Finding]:
        """Yield all findings as they come; `tell` hears what is being looked at."""
        for what, check in (
            ("packages", self._packages),
            ("the data set", self._data),
            ("this machine", self._machine),
            ("the run", self._run),
            ("the exchange", self._exchange),
            ("Ray", self._ray),
        ):
            tell(what)
            yield from guarded(what, check)

    def _packages(self) -> Iterator[Finding]:
        from cluster.doctor import software

        yield from software.judge(software.gather())

    def _data(self) -> Iterator[Finding]:
        from cluster.doctor.data import Data
        from cluster.doctor.job import judge_network

        if self.data:
            data = Data(self.data, self.config)
            yield from data.judge()
            self.classes = data.classes
        if self.config:
            yield judge_network(self.config, self.classes)

    def _machine(self) -> Iterator[Finding]:
        from cluster.doctor import hardware, job
        from cluster.doctor import hardware as gpus

        cards, own = gpus.gather_gpus(), not self.address
        self.gpus = len(cards)
        wanted = own and self.config is not None and self.config.device == "gpu"
        yield from gpus.judge_gpus(cards, wanted)
        if cards:
            yield from gpus.triton()
        have = hardware.gather(len(cards))
        yield from hardware.judge(have, own)
        if own and self.config:
            yield from job.judge_here(self.config, self.classes, have, cards)

    def _run(self) -> Iterator[Finding]:
        from cluster.doctor import data as run_place

        if self.run is not None:
            yield from run_place.judge_run(self.run, self.config, self.classes)
        if self.config and self.config.store:
            yield run_place.judge_store(self.config.store)

    def _exchange(self) -> Iterator[Finding]:
        from cluster.doctor import network

        yield from network.judge(self.gpus, bool(self.address))

    def _ray(self) -> Iterator[Finding]:
        from cluster.doctor import ray_cluster
        from cluster.doctor import ray_cluster as ray_nodes

        there = bool(self.address)
        for finding in ray_cluster.judge():
            there = there and not (finding.name == "RAY_ADDRESS" and finding.status == "FAIL")
            yield finding
        if there:
            yield from ray_nodes.judge_nodes(self.config, self.data, self.run)


def guarded(name: str, judge: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Pass findings on; a check that breaks is one, too."""
    try:
        yield from judge()
    except Exception as error:
        said = f"the check itself failed: {type(error).__name__}: {first_line(error)}"
        yield fail(name, said, "report this, with the output of --json")


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
        return Config.from_settings(load_settings(path))
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
