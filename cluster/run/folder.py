"""What RUN holds, who may write to it, and whether a run in it may be continued.

RUN/config.toml          every setting as used, and the hash of the data set's manifest
RUN/machine.json         processor, memory, GPUs, versions
RUN/metrics.jsonl        a row a step                       (log.py)
RUN/validation.jsonl     a row a validation                 (log.py)
RUN/layers.jsonl         each layer's means, every 50 steps (log.py)
RUN/kernels.jsonl        conv1 after steps 1, 2, 4, 8 ...   (kernels.py)
RUN/rates.jsonl          a row a change of the rates        (rates.py)
RUN/rates.toml           put there by hand to change them   (hand_rates.py)
RUN/quarantine.jsonl     damaged images that others replaced  (pipeline/stream/quarantine.py)
RUN/ledger/              what was delivered, with --ledger      (pipeline/ledger.py)
RUN/checkpoints/         step-NNNNNNNN/                     (checkpoint.py)
RUN/evaluation-*.json    errors with 1 or 10 views            (evaluate.py)
RUN/probabilities-*      of every image, with --save-probabilities  (probabilities.py)
RUN/tensorboard/         the rows for TensorBoard, with --tensorboard  (tensorboard.py)
RUN/report.html          all of it on one page               (report)
RUN/measure.json         where a step's time goes, with --measure  (measure.py)
RUN/attempts.jsonl       a row a start and an end of its workers    (supervisor.py)
RUN/error.log            traceback of the last failure, if there was one
RUN/.lock, RUN/.leader   held while a training runs: by its driver, by the worker that writes
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config import Config, find_conflicts, format_toml, read_run_config
from cluster.run.jsonl import read_tail
from pipeline.tools.errors import SetupError, UsageError
from pipeline.tools.files import atomic_write, ensure_writable

CHECKPOINTS = "checkpoints"
CONFIG = "config.toml"
MACHINE = "machine.json"
ERRORS = "error.log"
MEASURE = "measure.json"
ATTEMPTS = "attempts.jsonl"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
LAYERS = "layers.jsonl"
KERNELS = "kernels.jsonl"
RATES = "rates.jsonl"
QUARANTINE = "quarantine.jsonl"
LEDGER = "ledger"
LAST = 20
"""Rows at the end of RUN/attempts.jsonl among which the last whole one is looked for."""
LEADER_PATIENCE = 60.0
"""Seconds that the leader of a new start waits for that of an old one to be gone."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How far a run has come: steps made and samples consumed by the whole job."""

    step: int = 0
    position: int = 0


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Create RUN if need be and keep other trainings out of it.

    Raises:
        UsageError: RUN cannot be written, or another training holds it.
    """
    ensure_writable(run, "run folder")
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"run folder {run} is in use by another training; name another"
            ) from error
        yield


@contextmanager
def lock_leader(run: Path) -> Iterator[None]:
    """Keep other leaders out of RUN: the worker of a driver that was killed may still write.

    Raises:
        SetupError: another one does not end.
    """
    with (run / ".leader").open("w") as lock:
        deadline = time.monotonic() + LEADER_PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise SetupError(
                        f"another worker holds {run}/.leader and does not end; end its process"
                    ) from error
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks
        yield


def write_run_config(run: Path, config: Config, data_sha256: str, samples: int, step: int) -> None:
    """Write RUN/config.toml, after making sure that a run with checkpoints keeps its meaning.

    Args:
        run: folder of the run.
        config: the settings of this command.
        data_sha256: identity of the data set.
        samples: its training images.
        step: step of the newest checkpoint, 0 if there is none.

    Raises:
        UsageError: the checkpoints were made with other settings or other data; names both.
    """
    path = run / CONFIG
    if step and path.exists():
        old, old_data = read_run_config(path)
        differ = find_conflicts(old, config, samples)
        if old_data != data_sha256:
            differ.append(f"data set (manifest): {old_data[:12]} -> {data_sha256[:12]}")
        if differ:
            raise UsageError(
                f"run folder {run} holds a run at step {step} with other settings "
                f"({'; '.join(differ)}); use these again, or another --run"
            )
    if path.exists() and step >= config.total_steps(samples):
        return  # nothing will be trained with these settings
    with atomic_write(path) as file:
        file.write(format_toml(config, data_sha256).encode())


def list_checkpoints(folder: Path) -> list[Path]:
    """The sealed checkpoints of RUN/checkpoints, newest first; their bytes are not looked at."""
    return sorted(
        (path for path in folder.glob("step-*") if path.name[5:].isdecimal()),
        key=parse_step,
        reverse=True,
    )


def read_store(run: Path) -> str:
    """Return where a run has its checkpoints, as its config says; "" where that cannot be read."""
    try:
        return read_run_config(run / CONFIG)[0].store
    except UsageError:
        return ""


def read_last_attempt(run: Path) -> int:
    """Number of the last start of the workers; 0 if there was none."""
    return _last(run, "attempt")


def read_last_step(run: Path) -> int:
    """Step of the newest checkpoint when the workers of a run last began or ended; 0 at first."""
    return _last(run, "step")


def _last(run: Path, name: str) -> int:
    """A number of the last row of RUN/attempts.jsonl that has it."""
    numbers = [
        row[name] for row in read_tail(run / ATTEMPTS, LAST) if isinstance(row.get(name), int)
    ]
    return numbers[-1] if numbers else 0


def parse_step(checkpoint: Path) -> int:
    """Return the step in the name of one of `list_checkpoints`."""
    return int(checkpoint.name.removeprefix("step-"))


def write_machine(run: Path, workers: int) -> None:
    """Write RUN/machine.json: what this process runs on."""
    with atomic_write(run / MACHINE) as file:
        file.write(
            (json.dumps(describe_machine() | {"workers": workers}, indent=1) + "\n").encode()
        )


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory, GPUs and versions, as far as they can be found out."""
    import torch  # here: whoever only looks at a run need not wait for it

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dali": _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "ray": _version("ray"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
