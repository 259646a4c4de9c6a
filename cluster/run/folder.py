"""Layout of RUN, its locks, and the check whether the run in it may be resumed.

RUN/config.toml          every setting as used, the hash of the data set's manifest, the run's name,
                         the data set's address, the command that started the run, and the commit of
                         the source
RUN/machine.json         processor, memory, GPUs, versions, the dtype that layers compute in
RUN/metrics.jsonl        a row per step                               (run/metrics.py)
RUN/validation.jsonl     a row per validation                         (run/metrics.py)
RUN/layers.jsonl         means of each layer, every 50 steps          (run/metrics.py)
RUN/kernels.jsonl        conv1 after steps 1, 2, 4, 8 ...             (run/kernels.py)
RUN/rates.jsonl          a row per change of the learning rates       (training/learning_rate.py)
RUN/rates.toml           written by a user to change them             (training/learning_rate.py)
RUN/quarantine.jsonl     damaged images that were replaced            (pipeline/stream)
RUN/ledger/              delivered samples, with --ledger             (pipeline/stream/ledger)
RUN/checkpoints/         step-NNNNNNNN/                               (checkpoint/format.py)
RUN/evaluation-*.json    errors with 1 or 10 views                    (evaluate.py)
RUN/probabilities-*      of every image, with --save-probabilities    (run/probabilities.py)
RUN/tensorboard/, wandb/, mlruns/   the rows for a tracker            (run/trackers.py)
RUN/report.html          the report                                   (report)
RUN/measure.json         split of a step's time, with --measure       (launch/measurement.py)
RUN/attempts.jsonl       a row per start and end of the workers       (launch/controller.py)
RUN/error.log            traceback of the last failure, if there was one
RUN/.lock, RUN/.leader   locked by the driver and by the writing worker while a training runs
"""

from __future__ import annotations

import json
import os
import platform
import re
import secrets
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import (
    CHANGEABLE,
    LENGTH,
    ORIGIN_KEYS,
    RUN_KEY,
    Config,
    read_run_config,
)
from cluster.run.jsonl import read_tail
from pipeline.dataset.record import (
    ADDRESS_KEY,
    LOCK,
    RECORD,
    SEGMENTS_KEY,
    SHA256_KEY,
    read_segments,
)
from pipeline.dataset.segments import Segments
from pipeline.remote.lease import lock_folder
from pipeline.tools.errors import SetupError, UsageError
from pipeline.tools.files import NoLocks, atomic_write, ensure_writable, flock
from pipeline.tools.jsonl import parse_json
from pipeline.tools.packages import DALI, find_version
from pipeline.tools.units import cpu_count, cpu_name

if TYPE_CHECKING:
    import torch

CHECKPOINTS = "checkpoints"
CONFIG = RECORD
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
RUN_ID = re.compile("[A-Za-z0-9_.-]{1,60}")
LAST = 20
"""Number of rows to read from the end of RUN/attempts.jsonl."""
LEADER_TIMEOUT = 60.0
"""Seconds that a new leader waits for the lock of an old one."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Name of a run and identity of its data set, as in RUN/config.toml; "": not known."""

    run: str = ""
    """Name that tells the run from all others; each of its checkpoints has it."""
    data_sha256: str = ""
    """Identity of the data set: of the version that the run began with."""
    segments: Segments = ()
    """Versions of the data set, if the run has gone on with newer ones."""

    @property
    def versions(self) -> str | Segments | None:
        """Version or segments, as `StreamConfig.version` takes them."""
        return self.segments or self.data_sha256 or None


UNKNOWN = RunIdentity()


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Progress of a run: number of steps made, and samples consumed by the whole job."""

    step: int = 0
    position: int = 0


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Create RUN if need be and lock it against other trainings.

    Raises:
        UsageError: RUN cannot be written, or another training has locked it.
    """
    ensure_writable(run, "run folder")
    with lock_folder(run, LOCK, "training", str(run)):
        yield


@contextmanager
def lock_leader(run: Path) -> Iterator[None]:
    """Lock RUN against other leaders: a worker whose driver was killed may still write.

    Raises:
        SetupError: another leader keeps the lock.
    """
    with (run / ".leader").open("w") as lock:
        deadline = time.monotonic() + LEADER_TIMEOUT
        while True:
            try:
                flock(lock, wait=False)
                break
            except NoLocks:
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise SetupError(
                        f"another worker holds {run}/.leader and does not end; end its process"
                    ) from error
                time.sleep(0.1)
        yield


def read_identity(run: Path) -> RunIdentity:
    """Return the identity of the run in RUN."""
    path = run / CONFIG
    data = read_run_config(path)[1] if path.is_file() else ""
    return RunIdentity(run=read_run_id(run), data_sha256=data, segments=read_segments(run))


def read_run_id(run: Path) -> str:
    """Return the name of the run in RUN; "" if it has none yet, or its config cannot be read."""
    try:
        found = tomllib.loads((run / CONFIG).read_text(encoding="utf-8")).get(RUN_KEY, "")
    except (OSError, UnicodeError, tomllib.TOMLDecodeError):
        return ""
    return found if is_run_id(found) else ""


def is_run_id(value: object) -> bool:
    """Return whether a value is the name of a run, as `make_run_id` makes them."""
    return isinstance(value, str) and RUN_ID.fullmatch(value) is not None


def make_run_id(run: Path) -> str:
    """Return a name for a new run: that of its folder, and random digits."""
    return f"{re.sub('[^A-Za-z0-9_.-]', '', run.name)[:40]}-{secrets.token_hex(4)}"


def find_conflicts(old: Config, new: Config, samples: int | Segments) -> list[str]:
    """List what keeps `new` from resuming a run of `old`, as `name: old -> new`.

    Settings in `CHANGEABLE` may differ, except `validate_every` where `plateau` counts validations,
    and those that decide how many images batch normalisation sees, or an exact sum takes, at once.
    The length may differ if no learning rate depends on it.
    """
    before, after = old.to_settings(), new.to_settings()
    free = {*CHANGEABLE, *LENGTH} - ({"validate_every"} if old.schedule == "plateau" else set())
    found = [
        f"{name}: {_format_change(before[name], after[name])}"
        for name in before
        if before[name] != after[name] and name not in free
    ]
    sizes = old.microbatch_size(1), new.microbatch_size(1)
    together = old.design.has_batch_norm and new.design.has_batch_norm
    if together and sizes[0] != sizes[1]:
        images = f"images that are normalised together: {sizes[0]} -> {sizes[1]}"
        found.append(f"{images} (--microbatch, --replicas)")
    if old.exact and new.exact and sizes[0] != sizes[1]:
        found.append(f"images summed together: {sizes[0]} -> {sizes[1]} (--microbatch, exact)")
    lengths = old.total_steps(samples), new.total_steps(samples)
    constant = old.has_constant_rates and new.has_constant_rates
    if lengths[0] != lengths[1] and not constant:
        found.append(f"length in steps: {lengths[0]} -> {lengths[1]} (learning rates drop by it)")
    return found


def _format_change(old: Any, new: Any) -> str:
    """A changed setting; of tables of layers, the first row that differs."""
    if isinstance(old, tuple) and any(isinstance(one, Mapping) for one in (*old, *new)):
        pairs = zip_longest(old, new, fillvalue="no row")
        rows = next(pair for pair in pairs if pair[0] != pair[1])
        return " -> ".join(one if isinstance(one, str) else format_value(one) for one in rows)
    return f"{old} -> {new}"


def find_data_conflicts(old_sha256: str, new_sha256: str) -> list[str]:
    """List what keeps a run from being resumed with another data set; see `find_conflicts`."""
    if old_sha256 == new_sha256:
        return []
    return [f"data set (manifest): {old_sha256[:12]} -> {new_sha256[:12]}"]


def format_toml(
    config: Config,
    data_sha256: str,
    run_id: str = "",
    origin: Mapping[str, str] | None = None,
    segments: Segments = (),
) -> str:
    """Format the effective config as the file RUN/config.toml, which `read_run_config` reads.

    Args:
        config: every setting of the run.
        data_sha256, run_id: identity of the data set, name of the run.
        origin: texts by their names in `ORIGIN_KEYS`; empty ones are left out.
        segments: of the run; one alone is left out.
    """
    lines = ["# Written by cluster.train: every setting of this run, as it was used."]
    lines += [f"{name} = {format_value(value)}" for name, value in config.to_settings().items()]
    lines += ["# The data set: SHA-256 of its manifest.json.", f'{SHA256_KEY} = "{data_sha256}"']
    if len(segments) > 1:
        lines.append("# Its versions: identity, samples, first position, first epoch of each.")
        lines.append(f"{SEGMENTS_KEY} = {json.dumps([list(one) for one in segments])}")
    if run_id:
        lines += ["# The run, which its checkpoints name, too.", f'{RUN_KEY} = "{run_id}"']
    if known := {key: origin[key] for key in ORIGIN_KEYS if origin and origin.get(key)}:
        lines.append("# The last start: data set, CONFIG, command, and the source's commit.")
        lines += [f"{key} = {format_value(value)}" for key, value in known.items()]
    return "\n".join(lines) + "\n"


def format_value(value: object) -> str:
    """Format the value of a setting as TOML: JSON, but for characters beyond ASCII and DEL.

    Tables in a list, which are layers, come one a line.
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {format_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple) and any(isinstance(one, Mapping) for one in value):
        return "[\n" + "".join(f"  {format_value(one)},\n" for one in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def write_run_config(
    run: Path, config: Config, data_sha256: str, samples: int | Segments, step: int,
    run_id: str = "",
    origin: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write RUN/config.toml, unless its checkpoints were made with conflicting settings.

    Args:
        run: run folder.
        config: settings of this command.
        data_sha256: identity of the data set.
        samples: number of its training images, or the segments of the run.
        step: step of the newest checkpoint, 0 if there is none.
        run_id: name of the run.
        origin: how it was started; see `format_toml`.

    Raises:
        UsageError: the checkpoints were made with other settings or other data; names both.
    """
    path = run / CONFIG
    if step and path.exists():
        old, old_data = read_run_config(path)
        differ = find_conflicts(old, config, samples)
        differ += find_data_conflicts(old_data, data_sha256)
        if differ:
            raise UsageError(
                f"run folder {run} holds a run at step {step} with other settings "
                f"({'; '.join(differ)}); use these again, or another --run"
            )
    if path.exists() and step >= config.total_steps(samples):
        # Nothing will be trained with these settings, but the data set may have moved.
        known, address = _read_origin(path), (origin or {}).get(ADDRESS_KEY, "")
        if address in ("", known.get(ADDRESS_KEY)):
            return
        config, origin = old, known | {ADDRESS_KEY: address}
    with atomic_write(path) as file:
        segments = () if isinstance(samples, int) else samples
        file.write(format_toml(config, data_sha256, run_id, origin, segments).encode())


def _read_origin(path: Path) -> dict[str, str]:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    return {key: str(table[key]) for key in ORIGIN_KEYS if key in table}


def list_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints of RUN/checkpoints, newest first, without reading them."""
    return sorted(
        (path for path in folder.glob("step-*") if path.name[5:].isdecimal()),
        key=parse_step,
        reverse=True,
    )


def list_own_checkpoints(run: Path, store: str = "") -> list[Path]:
    """List the complete checkpoints that the run in RUN made, newest first.

    Args:
        run: run folder.
        store: setting of the run, which other runs may have filled; "": RUN itself. One at an
            address is not listed.
    """
    own = read_run_id(run)
    there = list_checkpoints(Path(store or run) / CHECKPOINTS)
    return [path for path in there if not own or read_maker(path) in (own, "")]


def read_maker(checkpoint: Path) -> str:
    """Return the name of the run that made a checkpoint; "" if that is not known."""
    try:
        table = parse_json((checkpoint / "checkpoint.json").read_bytes())
    except (OSError, ValueError):
        return ""
    return str(table.get("run", "")) if isinstance(table, dict) else ""


def read_store(run: Path) -> str:
    """Return the setting `store` of a run; "" if its config cannot be read."""
    try:
        return read_run_config(run / CONFIG)[0].store
    except UsageError:
        return ""


def read_last_attempt(run: Path) -> int:
    """Return the number of the last start of the workers; 0 if there was none."""
    return _read_last(run, "attempt")


def read_last_step(run: Path) -> int:
    """Return the step of the newest checkpoint at the last start or end; 0 before the first."""
    return _read_last(run, "saved", "step")


def _read_last(run: Path, *names: str) -> int:
    """Return a field of the last row of RUN/attempts.jsonl that has it, by the first name there."""
    rows = [
        next((row[name] for name in names if name in row), None)
        for row in read_tail(run / ATTEMPTS, LAST)
    ]
    return next((number for number in reversed(rows) if isinstance(number, int)), 0)


def parse_step(checkpoint: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(checkpoint.name.removeprefix("step-"))


def write_machine(run: Path, workers: int, dtype: torch.dtype) -> None:
    """Write RUN/machine.json: processor, cores, memory, GPUs and versions of this machine.

    Args:
        run: run folder.
        workers: number of processes that train.
        dtype: dtype that layers compute in.
    """
    import torch  # here: commands that only read a run start faster without it

    machine = {
        "cpu": cpu_name(),
        "cores": cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dali": find_version(*DALI),
        "ray": find_version("ray"),
        "workers": workers,
        "dtype": str(dtype).removeprefix("torch."),
    }
    with atomic_write(run / MACHINE) as file:
        file.write((json.dumps(machine, indent=1) + "\n").encode())


def find_commit() -> str:
    """Return the commit of Duet's source, with a `+` if files differ from it.

    "" outside a clone of the repository: in a package that pip installed.
    """
    source = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(source), "-c", "safe.directory=*"]
    if not (source / ".git").exists():  # git would find a repository around it
        return ""
    try:
        found, changed = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=5)
            for words in (("rev-parse", "--short=12", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() + ("+" if changed.stdout.strip() else "")
