"""Time that a training loses to failures, by kind: worker killed or frozen, node lost, and so on.

    python -m benchmarks.goodput [--kinds killed frozen ...] [--every 30] [--failures 3] [--json]

A small training runs on a simulated cluster of this machine (`tests/helpers/ray_cluster`), or on a
Ray of its own for the kinds that need no second node. Every `--every` seconds something fails. For
each failure: the seconds until the next step that had not been made before, split by stage, and
the steps that were made twice. Goodput is the time in which steps were made for the first time
over all time, from the first steps on.

    stop    the failure, to the end of the old workers (RUN/attempts.jsonl)
    start   to the first step of the new ones: processes, imports, rendezvous, checkpoint, decoder
    redo    to the next step that had not been made before
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from harness.report import Figure, Options, Report, Table, start

from pipeline.tools.errors import DuetError
from tests.helpers.images import folder_per_class, packed
from tests.helpers.ray_cluster import Simulated
from tests.helpers.training_processes import (
    REPOSITORY,
    end_processes,
    marked,
    train_processes,
)

Kind = Literal["killed", "frozen", "spare", "no-spare", "driver", "drained"]
KINDS: dict[str, str] = {
    "killed": "worker killed",
    "frozen": "worker frozen",
    "spare": "node lost, another is free",
    "no-spare": "node lost, another comes after 10 s",
    "driver": "driver killed, started again at once",
    "drained": "node drained, another is free",
}
"""Kinds of failure, by their word on the command line."""
FREE = {"spare": 1, "no-spare": 0, "drained": 1}
"""Nodes of the simulated cluster that are free, for the kinds that need one."""
LAYOUTS = {"pair": [2], "replicas": [1, 1]}
"""GPUs, which are simulated, of the nodes that a layout takes."""
COMES_AFTER = 10.0
"""Seconds after which a lost node comes back."""
PATIENCE = 180.0
"""Seconds for a step to be made."""
POLL = 0.01
"""Seconds between looks at the run's files."""


@dataclass(frozen=True, kw_only=True)
class Setup(Options):
    """Measure what failures cost a training."""

    kinds: tuple[Kind, ...] = ("killed", "frozen", "spare", "no-spare", "driver", "drained")
    """Kinds of failure."""
    every: float = 30.0
    """Seconds between two failures."""
    failures: int = 3
    """Failures of each kind."""
    layout: Literal["pair", "replicas"] = "replicas"
    """A pair of columns on a node, or two replicas of one worker each, on two nodes."""
    width: float = 0.25
    """Factor on all maps and units of the network."""
    batch_size: int = 32
    """Images in a step."""
    checkpoint_every: int = 50
    """Steps between two checkpoints."""
    timeout: int = 5
    """Seconds after which a worker that does not answer counts as frozen."""
    flags: tuple[str, ...] = ()
    """Further words for `cluster.train`."""


@dataclass(kw_only=True)
class Loss:
    """Cost of a failure."""

    seconds: float
    """Until the next step that had not been made before."""
    twice: int
    """Steps that were made again."""
    stages: dict[str, float] = field(default_factory=dict)
    """The seconds by stage."""


class Training:
    """The training command and what it writes."""

    def __init__(self, setup: Setup, folder: Path, kind: str) -> None:
        self._folder, self.run = folder, folder / f"run-{kind}"
        self._words = [
            sys.executable, "-m", "cluster.train", str(folder / "config.toml"),
            "--data", str(folder / "data"), "--run", str(self.run), *setup.flags,
        ]  # fmt: skip
        self.mark, self.environment = marked(PYTHONPATH=str(REPOSITORY))
        self.cluster: Simulated | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._offset, self._step = 0, 0

    def use(self, cluster: Simulated) -> None:
        """Train on a simulated cluster."""
        self.cluster, self.mark, self.environment = cluster, cluster.mark, cluster.environment

    def start(self) -> None:
        """Give the command."""
        with (self._folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._words, cwd=REPOSITORY, env=self.environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip

    def step(self) -> int:
        """Return the last step with a row; rows may have been cut off since the last call."""
        path = self.run / "metrics.jsonl"
        with suppress(OSError):
            if path.stat().st_size < self._offset:
                self._offset = 0
            with path.open("rb") as file:
                file.seek(self._offset)
                whole, end, _ = file.read().rpartition(b"\n")
            self._offset += len(whole + end)
            with suppress(ValueError, KeyError, IndexError):
                self._step = int(json.loads(whole.splitlines()[-1])["step"])
        return self._step

    def attempts(self) -> list[dict[str, Any]]:
        """Return the rows about starts and ends."""
        with suppress(OSError):
            lines = (self.run / "attempts.jsonl").read_bytes().splitlines()
            return [json.loads(line) for line in lines if line.endswith(b"}")]
        return []

    def wait(self, step: int) -> float:
        """Wait until a step is made; returns the time of day.

        Raises:
            DuetError: it is not, or the command has ended.
        """
        deadline = time.time() + PATIENCE
        while self.step() < step:
            ended = self.process is not None and self.process.poll() is not None
            if ended or time.time() > deadline:
                tail = (self._folder / "log").read_text()[-2000:]
                raise DuetError(f"step {step} is not made:\n{tail}")
            time.sleep(POLL)
        return time.time()

    def victims(self) -> list[int]:
        """Return the ids of the workers that train, the leader last."""
        return train_processes(self.mark)[::-1]


@contextmanager
def start_training(setup: Setup, folder: Path, kind: str) -> Iterator[Training]:
    """Start a training that outlasts the measurement, and end it after the block."""
    training = Training(setup, folder, kind)
    with ExitStack() as held:
        if kind in FREE:
            gpus = LAYOUTS[setup.layout]
            training.use(held.enter_context(Simulated(gpus + gpus[:1] * FREE[kind])))
        held.callback(end_processes, training.mark)
        training.start()
        yield training


def fail(setup: Setup, kind: str, number: int, training: Training) -> None:
    """Have something fail; a node that is taken away is replaced by another."""
    cluster = training.cluster
    if kind in ("killed", "frozen"):
        victims = training.victims()
        how = signal.SIGKILL if kind == "killed" else signal.SIGSTOP
        os.kill(victims[number % len(victims)], how)
    elif kind == "driver":
        assert training.process is not None
        training.process.kill()
        training.process.wait()
        training.start()
    elif cluster is not None:
        last = next(row for row in reversed(training.attempts()) if row["event"] == "start")
        node = find_node(cluster, last.get("nodes", []), number)
        if kind == "drained":
            cluster.drain(node, 60)
        else:
            cluster.kill(node)
        if kind == "no-spare":
            time.sleep(COMES_AFTER)
        cluster.add(LAYOUTS[setup.layout][0])


def find_node(cluster: Simulated, nodes: list[str], number: int) -> int:
    """Return the number of a node where a worker is."""
    used = [one for one, identity in cluster.nodes.items() if identity in nodes]
    return (used or list(cluster.nodes))[number % len(used or cluster.nodes)]


def measure(setup: Setup, folder: Path, kind: str) -> dict[str, Any]:
    """Have a kind of failure happen, again and again, and return what that cost."""
    losses: list[Loss] = []
    with start_training(setup, folder, kind) as training:
        training.wait(10)
        first, start = training.step(), time.time()
        for number in range(setup.failures):
            due = start + (number + 1) * setup.every
            time.sleep(max(0.0, due - time.time()))
            losses.append(suffer(setup, kind, number, training))
        seconds, steps = time.time() - start, training.step() - first
    lost = statistics.mean(loss.seconds for loss in losses)
    return {
        "kind": kind,
        "failures": [asdict(loss) for loss in losses],
        "seconds": round(statistics.median(loss.seconds for loss in losses), 2),
        "twice": max(loss.twice for loss in losses),
        "stages": average_stages(losses),
        "every": setup.every,
        "measured": round(1 - sum(loss.seconds for loss in losses) / seconds, 4),
        "expected": {str(every): round(max(0.0, 1 - lost / every), 4) for every in (30, 120, 600)},
        "steps": steps,
    }


def suffer(setup: Setup, kind: str, number: int, training: Training) -> Loss:
    """Have one failure, and wait until it is made good."""
    known = len(training.attempts())
    start, before = time.time(), training.step()
    fail(setup, kind, number, training)
    made = max(before, training.step())  # a freeze lets a step or two pass
    while True:  # until the workers have started again
        rows = training.attempts()[known:]
        new = next((row for row in rows if row["event"] == "start"), None)
        if new is not None:
            break
        made = max(made, training.step())
        if time.time() - start > PATIENCE:
            raise DuetError(f"{kind}: nothing starts again; see {training.run}")
        time.sleep(POLL)
    again = training.wait(new["step"] + 1)
    end = training.wait(made + 1)
    ended = next((row["time"] for row in rows if row["event"] == "end"), start)
    return Loss(
        seconds=round(end - start, 2),
        twice=made - new["step"],
        stages={
            "stop": round(ended - start, 2),
            "start": round(again - ended, 2),
            "redo": round(end - again, 2),
            **new.get("seconds", {}),
        },
    )


def average_stages(losses: list[Loss]) -> dict[str, float]:
    """Return the mean seconds of each stage."""
    names = {name: None for loss in losses for name in loss.stages}
    return {
        name: round(statistics.mean(loss.stages.get(name, 0.0) for loss in losses), 2)
        for name in names
    }


def prepare(setup: Setup, folder: Path) -> None:
    """Write the data set and the config."""
    folder_per_class(folder / "images", 60)
    packed(folder / "data", train=folder / "images", samples_per_shard=40)
    settings = {
        "dtype": "float32",
        "width": setup.width,
        "batch_size": setup.batch_size,
        "steps": 10**7,
        "checkpoint_every": setup.checkpoint_every,
        "validate_every": 0,
        "collective_timeout": setup.timeout,
        "replicas": 1 if setup.layout == "pair" else 2,
        "columns_per_worker": 1 if setup.layout == "pair" else 2,
        "max_failures": 100,
        "ledger": True,
    }
    lines = (f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    (folder / "config.toml").write_text("".join(lines))


def report(setup: Setup) -> Report:
    """Have every kind of failure happen."""
    folder = Path(tempfile.mkdtemp(prefix="duet-goodput-"))
    try:
        prepare(setup, folder)
        found = [measure(setup, folder, kind) for kind in setup.kinds]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    head = ("failure", "s to the next step", "stages", "steps twice",
            f"goodput, each {setup.every:g} s", "expected each 30 s, 2 min, 10 min")  # fmt: skip
    rows = [
        (
            KINDS[row["kind"]], f"{row['seconds']:.1f}",
            ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["stages"].items()),
            str(row["twice"]), f"{row['measured']:.3f}",
            " ".join(f"{share:.3f}" for share in row["expected"].values()),
        )
        for row in found
    ]  # fmt: skip
    return Report(
        tables={"goodput": Table(head, rows)},
        figures={
            f"{KINDS[row['kind']]}, to the next step": Figure(
                [loss["seconds"] for loss in row["failures"]], "s", "lower"
            )
            for row in found
        },
        facts={"rows": found},
    )


if __name__ == "__main__":
    start(Setup, report, __doc__)
