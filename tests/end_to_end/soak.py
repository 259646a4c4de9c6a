"""One training on a simulated cluster, disturbed at random, against the same one left in peace.

    make soak                          50 kills, about half an hour on two cores
    python -m tests.end_to_end.soak OUT [--kills 50] [--seed 0]

Exact mode on three nodes of two (fake) GPUs. Workers are killed and frozen, nodes killed and
drained, the driver killed, interrupted and terminated, the job stopped, the disk of the checkpoints
filled and taken away. Whenever the command has ended it is given again, with another layout: one
process with both columns or a pair, and 1, 2 or 4 replicas of it. In the end
every loss must be that of the undisturbed run, every weight the same bit for bit, and the ledger
must prove that every sample was delivered exactly once. Exit code 1 if not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.stream.ledger.proof import prove
from pipeline.tools.errors import DuetError, UsageError, run
from tests.end_to_end.disturbances import Disturbed, Driver
from tests.helpers.images import folder_per_class, packed
from tests.helpers.ray_cluster import Simulated
from tests.helpers.training_processes import REPOSITORY

NODES = 3
CONFIG = "soak.toml"
LAST = 40
"""Steps before the end by which the last kill is due: some are made until it happens."""
PATIENCE = 240.0
"""Seconds without a new step after which the run is taken for stuck."""
SETTINGS = {
    "dtype": "float32",
    "width": 0.125,
    "batch_size": 16,
    "exact": True,
    "microbatch": 4,
    "schedule": "manual",
    "changes": ["3 lr 0.005", "6 lr.conv1 0"],
    "checkpoint_every": 10,
    "validate_every": 40,
    "collective_timeout": 10,
    "node_wait": 120,
    "max_failures": 30,
    "ledger": True,
}


@dataclass(frozen=True, kw_only=True)
class Soak:
    """Disturb a training at random, and compare it with one that was not."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder for data, runs and the log; one of an earlier soak is emptied."""
    kills: int = 50
    """Times that something is killed, frozen, drained or stopped."""
    seed: int = 0
    """Seed of the random choice of disturbances, victims and times."""
    steps_per_kill: int = 40
    """Length of the training, in steps for each disturbance."""


def soak(options: Soak) -> dict[str, object]:
    """Run both trainings and compare them.

    Raises:
        DuetError: the run is stuck or has failed, or is not what the undisturbed one is.
    """
    options.out.mkdir(parents=True)
    folder_per_class(options.out / "pictures" / "train", 60)
    folder_per_class(options.out / "pictures" / "val", 5, first_seed=5000)
    data = options.out / "data"
    packed(data, train=options.out / "pictures" / "train", val=options.out / "pictures" / "val",
           samples_per_shard=20)  # fmt: skip
    config = options.out / CONFIG
    steps = options.kills * options.steps_per_kill
    settings = SETTINGS | {"steps": steps}
    config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    peace, war = options.out / "undisturbed", options.out / "disturbed"

    def words(run: Path) -> list[str]:
        return [str(config.resolve()), "--data", str(data.resolve()), "--run", str(run.resolve())]

    with Simulated([2] * NODES, DUET_DASHBOARD="1", PATH=path,
                   RAY_JOB_STOP_WAIT_TIME_S="30") as cluster:  # fmt: skip
        subprocess.run(
            [sys.executable, "-m", "cluster.train", *words(peace), "--replicas", "1"],
            cwd=REPOSITORY, env=cluster.environment, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        driver = Driver(cluster, words(war), options.out / "disturbed.log", options.seed)
        run = Disturbed(options.seed, cluster, driver, war)
        start = time.monotonic()
        disturb(options.kills, steps, run)
        seconds = time.monotonic() - start
    compare(peace, war, steps)
    proof = prove(data, [war])
    if proof.findings:
        raise DuetError(f"the ledger proves nothing: {proof.findings[0]}")
    rows = [json.loads(line) for line in (war / "attempts.jsonl").read_text().splitlines()]
    return {
        "kills": dict(run.done),
        "commands": driver.starts,
        "layouts": dict(driver.layouts),
        "replicas": count_replicas(war),
        "starts": sum(row["event"] == "start" for row in rows),
        "steps": steps,
        "seconds": round(seconds),
        "seed": options.seed,
        "ledger": proof.summary(),
    }


def count_replicas(run: Path) -> dict[str, int]:
    """Count the steps by the replicas that made them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return dict(Counter(str(row["replicas"]) for row in rows))


def disturb(kills: int, steps: int, run: Disturbed) -> None:
    """Keep giving the command, and disturbing what it does, until the run is finished."""
    run.driver.start(as_job=False)
    most = made = 0
    moved = time.monotonic()
    due = 3
    while True:
        run.tick()
        code = run.driver.code()
        if code == 0:
            break
        if code is not None:
            run.say(f"given again (exit code {code})")
            run.driver.start(as_job=run.random.random() < 0.3)
        if (step := run.step()) > most:
            most, moved = step, time.monotonic()
        if time.monotonic() - moved > PATIENCE:
            raise DuetError(f"no new step for {PATIENCE:g} s; see {run.folder}")
        if made < kills and most >= due and code is None:
            made += strike(run, kills - made)
            left = max(1, kills - made)
            share = run.random.uniform(0.3, 1.2) * (steps - LAST - most) / left
            due = min(most + max(1, round(share)), max(most + 1, steps - LAST))
        time.sleep(0.2)
    run.settle()
    if made < kills:
        raise DuetError(f"the run was finished after {made} kills; give more --steps-per-kill")


def strike(run: Disturbed, left: int) -> int:
    """Disturb it, sometimes again while it recovers, sometimes its disk; returns the kills made."""
    time.sleep(run.random.uniform(0, 1.5))  # anywhere in a step, a save, a validation
    run.disturb()
    if left > 1 and run.random.random() < 0.15:
        time.sleep(run.random.uniform(0, 12))
        run.disturb()
        return 2
    if run.random.random() < 0.1:
        run.random.choice([run.full_disk, run.vanished_disk])()
    return 1


def compare(peace: Path, war: Path, steps: int) -> None:
    """Hold the disturbed run against the other one.

    Raises:
        DuetError: a loss, an error or a weight differs.
    """
    for name in ("metrics.jsonl", "validation.jsonl"):
        both = []
        for folder in (peace, war):
            rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            both.append(
                [(row["step"], row["position"], row["loss"], row["top1_error"]) for row in rows]
            )
        if both[0] != both[1]:
            where = next((a for a, b in zip(*both, strict=False) if a != b), "its length")
            raise DuetError(f"{war / name} is not that of the undisturbed run, from {where} on")
    for column in "ab":
        name = f"checkpoints/step-{steps:08d}/column-{column}.safetensors"
        if (peace / name).read_bytes() != (war / name).read_bytes():
            raise DuetError(f"{war / name} is not that of the undisturbed run")


def main() -> int:
    """Run the command."""
    options = tyro.cli(Soak, prog="python -m tests.end_to_end.soak", description=Soak.__doc__)
    if options.out.exists():
        if not (options.out / CONFIG).is_file():
            raise UsageError(f"{options.out} is there, and no soak's; name another folder")
        shutil.rmtree(options.out)
    found = soak(options)
    print(json.dumps(found, indent=1))
    print(
        f"{sum(found['kills'].values())} disturbances: every loss of {found['steps']} steps and "  # type: ignore[attr-defined]
        "every weight is that of the undisturbed run, bit for bit; every sample exactly once"
    )
    return 0


if __name__ == "__main__":
    run(main)
