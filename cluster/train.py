"""Train both columns, or go on where the run in RUN stopped.

    python -m cluster.train CONFIG.toml --data DATA --run RUN [--steps N] [flags override the file]

Starts a Ray on this machine, reachable from this machine only, unless RAY_ADDRESS names one
(`ray job submit` sets it). What a run leaves in RUN: see `run_folder`.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import time
from contextlib import closing, redirect_stdout
from dataclasses import replace
from pathlib import Path

from cluster.config import Config
from cluster.config_file import Command, parse
from cluster.console import Screen
from cluster.events import Failed, Started
from cluster.run_folder import CHECKPOINTS, ERRORS, QUARANTINE, held, reached, settle
from model.design import stages
from pipeline.dataset import DataSet, is_remote, open_dataset
from pipeline.errors import DuetError, UsageError, run
from pipeline.manifest import Manifest, identity
from pipeline.pixel_stats import Statistics
from pipeline.storage import Storage

DEATHS = ("WorkerHealthCheckFailedError", "WorkerHealthCheckTimeoutError", "ActorDiedError")
"""What Ray Train calls a worker that is gone; one that raised an error comes as that error."""


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Raises:
        DuetError: one line, with the exit code to leave with.
    """
    command = parse(sys.argv[1:] if argv is None else argv)
    folder = command.run.resolve()
    config = command.settings
    if config.cache:  # RUN/config.toml is read from elsewhere, too
        config = replace(config, cache=str(Path(config.cache).resolve()))
    dataset = open_dataset(command.data, **config.cached)
    data = command.data if is_remote(command.data) else str(dataset.folder.resolve())
    manifest = Manifest.load(dataset.folder)
    samples = manifest.split("train", dataset.folder).samples
    with closing(dataset):
        check(command, manifest, dataset)
    with held(folder), Screen() as screen:
        step, total = reached(folder), config.total_steps(samples)
        settle(folder, config, identity(dataset.folder), samples, step)
        if step >= total and sound(folder, total, screen):
            screen.say(f"{command.run} is finished: step {step} of {total}; nothing to do")
            return 0
        screen.say(summary(command, manifest, total))
        try:
            train_with_ray(config, data, folder, screen)
        except KeyboardInterrupt:
            screen.say(f"stopped; the same command goes on from step {reached(folder)}")
            raise
        finally:
            if replaced := damage(folder / QUARANTINE):
                screen.say(f"{replaced}; {command.run / QUARANTINE} lists them")
    return 0


def check(command: Command, manifest: Manifest, dataset: DataSet) -> None:
    """Refuse, before anything has started, what the workers would refuse after half a minute.

    Raises:
        UsageError: there is nothing to validate on, or no such network.
        DataError: a file of the data set is missing or damaged.
    """
    if command.settings.validate_every and "val" not in manifest.splits:
        raise UsageError(
            f"data set {command.data} has no split 'val'; build it with --val or --holdout, "
            "or train with --validate-every 0"
        )
    for split in ("train", "val") if command.settings.validate_every else ("train",):
        Storage(dataset, split)
    Statistics.load(dataset.folder, manifest.stats_sha256)

    try:
        stages(len(manifest.classes), command.settings.design)
    except ValueError as error:
        raise UsageError(f"{error} ({command.config} and the flags given)") from error


def sound(folder: Path, total: int, screen: Screen) -> bool:
    """Whether the last checkpoint of a run that looks finished can be read, byte for byte."""
    from cluster.checkpoint import newest

    found = newest(folder / CHECKPOINTS, screen.show)
    return found is not None and found.mark.step >= total


def summary(command: Command, manifest: Manifest, total: int) -> str:
    """The run in a line or two."""
    config = command.settings
    pictures = manifest.splits["train"].samples
    return (
        f"{command.config} -> {command.run}\n"
        f"{pictures:,} pictures, {len(manifest.classes)} classes; width {config.width:g}, "
        f"batch {config.batch_size}, "
        f"{total:,} steps = {total * config.batch_size / pictures:.1f} epochs"
    )


def damage(path: Path) -> str:
    """What RUN/quarantine.jsonl says, in words; nothing if there is none."""
    try:
        rows = len(path.read_bytes().splitlines())
    except OSError:
        return ""
    return f"{rows:,} damaged picture{'s were' if rows > 1 else ' was'} replaced by others"


def train_with_ray(config: Config, data: str, folder: Path, screen: Screen) -> None:
    """Start the workers and show what they tell until they are done.

    Raises:
        DuetError: the run failed.
    """
    from cluster.ray_session import SCRATCH, Training, place_workers, session

    aside = io.StringIO()  # what Ray has to say on stdout
    first: Failed | None = None
    try:
        with redirect_stdout(aside), session(workers=config.size * config.replicas):
            training = Training(config, data, folder, place_workers(config))
            for event in training.events():
                if isinstance(event, Started):
                    first = None  # what failed before has been mended by the restart
                if isinstance(event, Failed):
                    first = first or event
                    if event.final:
                        break
                screen.show(event)
    finally:
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
    if first is not None or training.failure is not None:
        raise explain(first, training.failure, folder, aside.getvalue())


def explain(
    first: Failed | None, failure: BaseException | None, folder: Path, aside: str
) -> DuetError:
    """The error to leave with; RUN/error.log gets the whole story."""
    deaths = [
        f"the worker of rank {rank} died: killed, or out of memory"
        for rank, error in getattr(failure, "worker_failures", {}).items()
        if type(error).__name__ in DEATHS
    ]
    if first is not None and (first.final or not deaths):
        text, code = f"{first.worker}: {first.text}", first.exit_code
    else:
        # Ray's own errors begin with lines that only announce the next.
        told = [line.strip() for line in str(failure).splitlines() if line.strip()]
        lines = deaths or [line for line in told if not line.endswith(":")] or [repr(failure)]
        text, code = lines[0], 1
    log = folder / ERRORS
    trace = [first.trace] if first else []
    if first is None or not first.final:
        trace += [str(failure), aside]
    log.write_text("\n".join([time.strftime("%F %T"), text, *trace]) + "\n", encoding="utf-8")
    error = DuetError(f"{text} (traceback in {os.path.relpath(log)})")
    error.exit_code = code
    return error


if __name__ == "__main__":
    run(main)
