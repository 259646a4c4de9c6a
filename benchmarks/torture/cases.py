"""The cases of the torture table, and the way of one loader through them.

Each case compares a run that is cut and resumed with one that is not, of the same settings, by
`judge.compare`. Attempts are groups of forked processes: the process that calls `Trial.run` has
imported the loader's library and started no thread.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torture import ResumePeer
from torture.consumer import Cut, Job, Setup, consume, read_notes
from torture.images import DAMAGED, SAMPLES, damage, stored
from torture.judge import Attempt, Delivery, Place, Verdict, compare, coverage, trainer_view

SECONDS = 90.0
"""Seconds after which an attempt is ended and said to hang."""
FORK = multiprocessing.get_context("fork")
TELLS = re.compile(r"corrupt|checksum|crc|damage", re.IGNORECASE)
"""Words with which a loader would say in its output that data are damaged."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One line of the table."""

    title: str
    """Event, in words."""
    needs: str = "middle"
    """Way of resuming that it asks of a loader."""
    setup: dict[str, Any] = field(default_factory=dict)
    """Settings, of the uncut run too."""
    cuts: Callable[[int], list[Cut]] = lambda steps: [Cut(epoch=0, step=5)]
    """Makes the cuts, from the number of batches that the least rank has in an epoch."""
    then: dict[str, Any] = field(default_factory=dict)
    """Settings that are others after the cut."""


CASES = {
    "again": Case(title="not cut, run twice", needs="", cuts=lambda steps: []),
    "middle": Case(title="cut in mid-epoch"),
    "last": Case(
        title="saved after the last batch of an epoch, inside the loop",
        cuts=lambda steps: [Cut(epoch=0, step=steps - 1)],
    ),
    "border": Case(
        title="saved between two epochs",
        needs="border",
        cuts=lambda steps: [Cut(epoch=0, how="loop")],
    ),
    "twice": Case(
        title="cut twice in one epoch",
        cuts=lambda steps: [Cut(epoch=0, step=3), Cut(epoch=0, step=7)],
    ),
    "third": Case(title="cut in epoch 3", cuts=lambda steps: [Cut(epoch=2, step=5)]),
    "prefetch": Case(
        title="cut with six batches prefetched",
        setup={"prefetch": 6},
        cuts=lambda steps: [Cut(epoch=0, step=5, wait=0.7)],
    ),
    "worker": Case(
        title="SIGKILL of a loader worker; saved every 3 batches",
        cuts=lambda steps: [Cut(epoch=0, step=7, how="worker", every=3)],
    ),
    "process": Case(
        title="SIGKILL of the process; saved every 3 batches",
        cuts=lambda steps: [Cut(epoch=0, step=7, how="kill", every=3)],
    ),
    "shrink": Case(
        title="from 2 ranks to 1",
        needs="world",
        setup={"world": 2, "elastic": True},
        then={"world": 1},
    ),
    "grow": Case(
        title="from 1 rank to 2", needs="world", setup={"elastic": True}, then={"world": 2}
    ),
    "workers": Case(
        title="from 2 loader workers to 3",
        needs="workers",
        setup={"elastic": True},
        then={"workers": 3},
    ),
    "tail": Case(
        title="2 ranks, cut before the uneven end of the epoch",
        setup={"world": 2},
        cuts=lambda steps: [Cut(epoch=0, step=steps - 2)],
    ),
    "damage": Case(
        title="64 bytes of an image in a shard damaged at the cut",
        needs="border",
        cuts=lambda steps: [Cut(epoch=0, how="loop")],
    ),
    "seed": Case(title="another seed after the cut", needs="seed", then={"seed": 8}),
}


@dataclass(frozen=True, kw_only=True)
class AttemptResult:
    """Outcome of an attempt, of all ranks."""

    attempt: Attempt
    facts: list[dict[str, Any]]
    """Notes of each rank besides batches."""
    hung: bool
    log: str
    """Output of all ranks."""

    @property
    def done(self) -> bool:
        """True if every rank went through all epochs."""
        return all("done" in facts for facts in self.facts)

    @property
    def error(self) -> str:
        """The first rank's exception, or nothing."""
        return next((facts["error"] for facts in self.facts if "error" in facts), "")

    def saved(self) -> tuple[Place, tuple[Path, ...]]:
        """Return the newest place that all ranks saved, and their states; else the beginning."""
        by_rank = [dict(facts["saved"]) for facts in self.facts]
        common = set.intersection(*map(set, by_rank))
        if not common:
            return (0, 0), ()
        return max(common), tuple(states[max(common)] for states in by_rank)


class Trial:
    """One loader on its way through the cases."""

    def __init__(self, peer: ResumePeer, folder: Path) -> None:
        """Args: the loader, and an empty folder."""
        self._adapter, self._folder = peer.adapter, folder
        self._offers = peer.offers
        self._attempts = 0
        self._uncut: dict[str, AttemptResult] = {}
        self.data = folder / "data"

    def prepare(self) -> str:
        """Write the images in the loader's format; return why that failed, or nothing."""
        self.data.mkdir()
        job = Job(
            adapter=self._adapter,
            setup=Setup(folder=self.data, scratch=self._folder),
            notes=self._folder,
        )
        process = FORK.Process(target=_prepare, args=(job,))
        process.start()
        process.join(120)
        if process.exitcode == 0:
            return ""
        process.kill()
        lines = (self._folder / "0.log").read_text(errors="replace").strip().splitlines()
        return f"cannot write its format: {lines[-1] if lines else process.exitcode}"

    def run(self, name: str) -> dict[str, Any]:
        """Return the outcome of a case, ready for JSON."""
        case = CASES[name]
        if case.needs and case.needs not in self._offers:
            return {"outcome": "none"}
        setup = Setup(folder=self.data, scratch=self._folder, **case.setup)
        uncut = self.uncut(setup)
        if not uncut.done:
            return {"outcome": "failed", "message": uncut.error or "the uncut run hangs"}
        if name == "damage":
            return self._run_damaged(case, setup, uncut)
        after = self.uncut(replace(setup, **case.then)) if "world" in case.then else None
        return self._judge(name, uncut, self._go(case, setup, uncut, name), after)

    def _run_damaged(self, case: Case, setup: Setup, uncut: AttemptResult) -> dict[str, Any]:
        """Compare a resumed run on damaged data with the same resumed run on sound data."""
        sound = self._go(case, setup, uncut, "border")
        setup = replace(setup, folder=self._folder / "damaged")
        shutil.copytree(self.data, setup.folder)
        results = self._go(case, setup, uncut, "damage", start=sound[-1].attempt.start)
        view = tuple(trainer_view(one.attempt for one in sound))
        whole = AttemptResult(attempt=Attempt((0, 0), view), facts=[], hung=False, log="")
        return self._judge("damage", whole, results)

    def uncut(self, setup: Setup) -> AttemptResult:
        """Return the run that is not cut; made once for the same settings."""
        key = repr(setup)
        if key not in self._uncut:
            self._uncut[key] = self._start(setup, (0, 0), (), None)
        return self._uncut[key]

    def _go(
        self, case: Case, setup: Setup, uncut: AttemptResult, name: str, start: Place | None = None
    ) -> list[AttemptResult]:
        """Run all attempts of a case; `start`: where the trainer counts on, if not as it saved."""
        counts = [0] * setup.world
        for one in uncut.attempt.deliveries:
            counts[one.rank] += one.epoch == 0
        place, states, results = (0, 0), (), []
        cuts: list[Cut | None] = [*case.cuts(min(counts)), None]
        for number, cut in enumerate(cuts):
            if number == 1 and name == "damage":
                self._damage(setup.folder)
            now = replace(setup, **case.then) if number and case.then else setup
            result = self._start(now, place, states, cut)
            results.append(result)
            if result.done or (result.error and cut is None):
                break
            if (result.error or result.hung) and cut and cut.how not in ("worker", "kill"):
                break
            place, states = result.saved()
            place = start or place
        if name in ("last", "border") and not compare_views(uncut, results).kept:
            # Where nothing is left of an epoch a loader may give that nothing, or the next epoch;
            # the trainer gets the benefit of either.
            turned = (0, min(counts)) if place[0] else (1, 0)
            other = [*results[:-1], self._start(setup, turned, states, None)]
            results = min(results, other, key=lambda some: _badness(uncut, some))
        return results

    def _damage(self, folder: Path) -> None:
        """Damage one image in every file that holds it."""
        tars = folder / "tars" if (folder / "tars").is_dir() else folder
        if not damage(folder, dict(stored(tars))[DAMAGED]):
            raise RuntimeError(f"no file under {folder} holds image {DAMAGED} as it is")

    def _start(
        self, setup: Setup, place: Place, states: tuple[Path, ...], cut: Cut | None
    ) -> AttemptResult:
        """Run an attempt: one process for each rank."""
        self._attempts += 1
        notes = self._folder / f"attempt-{self._attempts:03}"
        notes.mkdir()
        setup = replace(setup, scratch=notes / "scratch")
        setup.scratch.mkdir()
        jobs = [
            Job(
                adapter=self._adapter,
                setup=replace(setup, rank=rank),
                notes=notes,
                start=place,
                states=states,
                cut=cut,
            )
            for rank in range(setup.world)
        ]
        processes = [FORK.Process(target=consume, args=(job,)) for job in jobs]
        for process in processes:
            process.start()
        end = time.monotonic() + SECONDS
        # Not `join`: orphaned workers hold the pipe that it waits on.
        while (hung := any(one.exitcode is None for one in processes)) and time.monotonic() < end:
            time.sleep(0.02)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the workers that it may leave
            process.join()
        found = [read_notes(notes / f"{rank}.notes", rank) for rank in range(setup.world)]
        deliveries = tuple(one for some, _ in found for one in some)
        logs = [path.read_text(errors="replace") for path in sorted(notes.glob("*.log"))]
        return AttemptResult(
            attempt=Attempt(place, deliveries),
            facts=[facts for _, facts in found],
            hung=hung,
            log="".join(logs),
        )

    def _judge(
        self,
        name: str,
        uncut: AttemptResult,
        results: list[AttemptResult],
        after: AttemptResult | None = None,
    ) -> dict[str, Any]:
        last = results[-1]
        verdict = compare_views(uncut, results, after)
        out: dict[str, Any] = {"outcome": verdict.outcome, **verdict.counts()}
        if name == "again":
            return out
        first = results[0].facts[0]
        if name == "worker":
            if not first.get("workers"):
                return {"outcome": "none", "message": "no worker processes"}
            out["noticed"] = results[0].error or ("hangs" if results[0].hung else "goes on")
        if not last.done:
            began = name == "damage" or bool(last.attempt.deliveries)
            out = {"outcome": "stops" if began else "refused", "message": last.error}
            if last.hung:
                out = {"outcome": "hangs", "message": f"no end after {SECONDS:g} s"}
            out["said"] = bool(TELLS.search(last.log))
        if name == "damage" and last.done:
            out["reported"] = max(facts.get("reported", 0) for facts in last.facts)
            out["said"] = bool(out["reported"] or TELLS.search(last.log))
        if name in ("last", "border") and last.done:
            out["resumes_in"] = "next epoch" if last.attempt.start[0] else "rest of the epoch"
        return out

    def covers(self) -> dict[str, int]:
        """Return how the uncut run of one rank covers the images."""
        uncut = self.uncut(Setup(folder=self.data, scratch=self._folder))
        return coverage(uncut.attempt.deliveries, SAMPLES)


def compare_views(
    uncut: AttemptResult, results: list[AttemptResult], after: AttemptResult | None = None
) -> Verdict:
    """Return what the attempts' trainer saw otherwise."""
    other: list[Delivery] = trainer_view(result.attempt for result in results)
    then = None if after is None else trainer_view([after.attempt])
    return compare(trainer_view([uncut.attempt]), other, then)


def _badness(uncut: AttemptResult, results: list[AttemptResult]) -> tuple[bool, int, int]:
    verdict = compare_views(uncut, results)
    return not results[-1].done, verdict.missing + verdict.repeated, verdict.reordered


def _prepare(job: Job) -> None:
    """Write the images: the main function of a process of its own."""
    log = os.open(job.notes / "0.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    importlib.import_module(f"torture.{job.adapter}").prepare(job.setup.folder)
