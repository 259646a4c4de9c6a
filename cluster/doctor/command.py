"""Command: all checks in turn.

    python -m cluster.doctor [CONFIG] [--data DATA] [--run RUN] [--json]

Exit code 3 if a check fails, 0 if there are warnings only.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

from rich.text import Text

from cluster.cli.options import DoctorOptions
from cluster.config import Config, load_settings
from cluster.doctor.finding import Finding, fail
from pipeline.dataset.record import read_address
from pipeline.tools.arguments import parse_options
from pipeline.tools.errors import SetupError, UsageError, summarize_error
from pipeline.tools.terminal import Terminal

COLORS = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


class Examination:
    """All checks of this machine and its cluster, for a training as far as one is given.

    Each check imports what it needs itself: if that is broken, the other checks still run.

    Args:
        data: folder or address of a data set; empty: none.
        run: folder of a run; None: none.
        config: of a training; None: none.
    """

    def __init__(self, data: str, run: Path | None, config: Config | None) -> None:
        self.data, self.run, self.config = data, run, config
        self.address = os.environ.get("RAY_ADDRESS", "")
        self.classes: int | None = None
        """Number of classes of the data set; None: not known."""
        self.gpus = 0
        """Number of GPUs that torch sees."""

    def findings(self, report: Callable[[str], None] = lambda subject: None) -> Iterator[Finding]:
        """Yield all findings as they come; `report` is called with what is checked next."""
        for subject, check in (
            ("packages", self._check_packages),
            ("the data set", self._check_data),
            ("this machine", self._check_machine),
            ("the run", self._check_run),
            ("the exchange", self._check_network),
            ("Ray", self._check_ray),
        ):
            report(subject)
            try:
                yield from check()
            except Exception as error:
                text = f"the check itself failed: {type(error).__name__}: {summarize_error(error)}"
                yield fail(subject, text, "report this, with the output of --json")

    def _check_packages(self) -> Iterator[Finding]:
        from cluster.doctor import software

        yield from software.judge(software.gather())

    def _check_data(self) -> Iterator[Finding]:
        from cluster.doctor.data import DatasetCheck
        from cluster.doctor.job import judge_network

        if self.data:
            check = DatasetCheck(self.data, self.config)
            yield from check.judge()
            self.classes = check.classes
            self.config = self.config and check.config
        if self.config:
            yield judge_network(self.config, self.classes)

    def _check_machine(self) -> Iterator[Finding]:
        from cluster.doctor import hardware, job

        gpus, own_ray = hardware.gather_gpus(), not self.address
        self.gpus = len(gpus)
        needs_gpu = own_ray and self.config is not None and self.config.device == "gpu"
        yield from hardware.judge_gpus(gpus, needs_gpu)
        if gpus:
            headers = Path(sysconfig.get_path("include"))
            yield hardware.judge_compiler(hardware.find_compiler(), headers)
            yield hardware.judge_gpu_kernels(*hardware.try_gpu_kernels())
        facts = hardware.gather(len(gpus))
        yield from hardware.judge(facts, own_ray)
        if own_ray and self.config:
            yield from job.judge_local_job(self.config, self.classes, facts, gpus)

    def _check_run(self) -> Iterator[Finding]:
        from cluster.doctor.data import judge_run, judge_store

        if self.run is not None:
            yield from judge_run(self.run, self.config, self.classes)
        if self.config and self.config.store:
            yield judge_store(self.config.store)

    def _check_network(self) -> Iterator[Finding]:
        from cluster.doctor import network

        yield from network.judge(self.gpus, self.address)

    def _check_ray(self) -> Iterator[Finding]:
        from cluster.doctor import ray_cluster

        has_failed = False
        for finding in ray_cluster.judge():
            has_failed |= finding.name == "RAY_ADDRESS" and finding.status == "FAIL"
            yield finding
        if self.address and not has_failed:
            yield from ray_cluster.judge_nodes(self.config, self.data, self.run)


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        UsageError: CONFIG is missing or wrong.
    """
    options = parse_options(DoctorOptions, argv, "python -m cluster.doctor")
    try:
        config = Config.from_settings(load_settings(options.config)) if options.config else None
    except ValueError as error:
        raise UsageError(f"{error} ({options.config})") from error
    data = options.data or (read_address(options.run) if options.run else "")
    console = Terminal(sys.stderr if options.json else sys.stdout)
    found = []
    examination = Examination(data, options.run, config)
    with redirect_stdout(sys.stderr), console.status("") as status:  # shows on a terminal only
        for finding in examination.findings(lambda what: status.update(f"looking at {what}")):
            found.append(finding)
            console.print(format_finding(finding), soft_wrap=True)
    failed = sum(finding.status == "FAIL" for finding in found)
    warned = sum(finding.status == "warn" for finding in found)
    console.print(format_verdict(failed, warned), soft_wrap=True)
    if options.json:
        result = {"ok": not failed, "checks": [asdict(finding) for finding in found]}
        sys.stdout.write(json.dumps(result) + "\n")
    return SetupError.exit_code if failed else 0


def format_finding(finding: Finding) -> Text:
    """Format a finding as colored text, with the way to mend it on a line of its own."""
    text = Text.assemble(
        (f"{finding.status:<5}", COLORS[finding.status]), f"{finding.name:<14} {finding.value}"
    )
    if finding.mend:
        text.append(f"\n      -> {finding.mend}")
    return text


def format_verdict(failed: int, warned: int) -> str:
    """Format the last line of the output."""
    if not failed:
        return "all well" if not warned else f"all well, {warned} to look at"
    return f"{failed} problem{'s' if failed > 1 else ''}, each with what mends it"
