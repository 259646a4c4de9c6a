"""Why an attempt failed: who went, who complained, and what the user is told."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from cluster.launch.placement import Worker
from cluster.run.events import Failed
from cluster.run.folder import ERRORS
from pipeline.tools.errors import DuetError

DEATHS = ("WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError", "ActorDiedError")
"""What Ray Train calls a worker that is gone; one that raised an error comes as that error."""


@dataclass
class Failure:
    """What is known of it."""

    workers: tuple[Worker, ...] = ()
    """In job order; empty if they were not placed yet."""
    told: Failed | None = None
    """What the first worker that gave up has told."""
    raised: BaseException | None = None
    """What Ray Train has made of it."""

    @property
    def deaths(self) -> list[str]:
        """The workers that went without a word."""
        errors = getattr(self.raised, "worker_failures", {})
        gone = [rank for rank, error in errors.items() if type(error).__name__ in DEATHS]
        return [self._name(rank) for rank in sorted(gone)]

    def _name(self, rank: int) -> str:
        for worker in self.workers:
            if worker.rank == rank:
                columns = f"column{'s' if ' ' in worker.column else ''} {worker.column}"
                return f"replica {worker.replica}, {columns} (node {worker.node})"
        return f"rank {rank}"

    @property
    def final(self) -> bool:
        """Whether the same would happen again."""
        return self.told is not None and self.told.final

    @property
    def why(self) -> str:
        """The cause in a line, not what it led to: others miss the one that has died."""
        if self.told is not None and (self.told.final or not self.deaths):
            return f"{self.told.worker}: {self.told.text}"
        if self.deaths:
            others = f" and {len(self.deaths) - 1} more" if len(self.deaths) > 1 else ""
            return f"the worker of {self.deaths[0]}{others} died: killed, or out of memory"
        # Ray's own errors begin with lines that only announce the next.
        told = [line.strip() for line in str(self.raised).splitlines() if line.strip()]
        lines = [line for line in told if not line.endswith(":")]
        return (lines or [repr(self.raised)])[0].split(". ")[0]

    def error(self, run: Path, aside: str = "") -> DuetError:
        """Return the error to leave with; RUN/error.log gets the whole story.

        Args:
            run: folder of the run.
            aside: what Ray has said meanwhile, and nobody was shown.
        """
        trace = [self.told.trace] if self.told else []
        if not self.final:
            trace += [str(self.raised), aside]
        text, log = self.why, run / ERRORS
        try:
            body = "\n".join([time.strftime("%F %T"), text, *trace]) + "\n"
            log.write_text(body, encoding="utf-8")
            text = f"{text} (traceback in {os.path.relpath(log)})"
        except OSError:
            pass  # the disk may be what is wrong
        error = DuetError(text)
        if self.told is not None and (self.final or not self.deaths):
            error.exit_code = self.told.exit_code
        return error
