"""All checks in turn, and what one of them has to know of another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cluster.config import Config
from cluster.doctor.finding import Finding, fail, first_line


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
        from cluster.doctor import gpus, hardware, job

        cards, own = gpus.gather(), not self.address
        self.gpus = len(cards)
        wanted = own and self.config is not None and self.config.device == "gpu"
        yield from gpus.judge(cards, wanted)
        if cards:
            yield from gpus.triton()
        have = hardware.gather(len(cards))
        yield from hardware.judge(have, own)
        if own and self.config:
            yield from job.judge_here(self.config, self.classes, have, cards)

    def _run(self) -> Iterator[Finding]:
        from cluster.doctor import run_place

        if self.run is not None:
            yield from run_place.judge_run(self.run, self.config, self.classes)
        if self.config and self.config.store:
            yield run_place.judge_store(self.config.store)

    def _exchange(self) -> Iterator[Finding]:
        from cluster.doctor import network

        yield from network.judge(self.gpus, bool(self.address))

    def _ray(self) -> Iterator[Finding]:
        from cluster.doctor import ray_cluster, ray_nodes

        there = bool(self.address)
        for finding in ray_cluster.judge():
            there = there and not (finding.name == "RAY_ADDRESS" and finding.status == "FAIL")
            yield finding
        if there:
            yield from ray_nodes.judge(self.config, self.data, self.run)


def guarded(name: str, judge: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Pass findings on; a check that breaks is one, too."""
    try:
        yield from judge()
    except Exception as error:
        said = f"the check itself failed: {type(error).__name__}: {first_line(error)}"
        yield fail(name, said, "report this, with the output of --json")
