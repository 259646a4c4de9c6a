"""Both columns on disk: whole or not at all, and loadable from either layout.

    RUN/checkpoints/step-00000400/
        column-a.safetensors    "weights/a.conv1.weight", "velocity/a.conv1.weight", ...
        column-b.safetensors
        checkpoint.json         written last: step, position, error, config, classes, file hashes

A column's tensors are the same whether one process held it or two, so a run may go on in the other
layout. `checkpoint_writer` writes them, `checkpoint_places` knows where they lie.

Which checkpoint of a finished or running run to look at.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from cluster.checkpoint.storage import JSON, CheckpointStorage, open_storage, parse_step
from cluster.run.events import Tell, Warned
from cluster.run.folder import Mark
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from pipeline.remote.filesystem import StoreError
from pipeline.tools.errors import DataError, DuetError, UsageError
from pipeline.tools.files import sha256


def reason(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or errno.errorcode.get(error.errno, str(error))
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


VERSION = 1
UNSOUND = (OSError, ValueError, KeyError, TypeError, DuetError)
"""What reading a damaged checkpoint raises."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint and where it lies."""

    path: Path
    """Local folder with its files; of a store's, it is there as long as this object."""
    mark: Mark
    classes: tuple[str, ...]
    """Names of the classes it was trained on."""
    error: float | None = None
    """Top-1 validation error at its step, if there was a validation."""
    name: str = ""
    holder: object = field(default=None, repr=False, compare=False)
    """Keeps a temporary `path` from being removed."""


def column_file(column: int) -> str:
    """Name of a column's file."""
    return f"column-{'ab'[column]}.safetensors"


def collect_state(net: AlexNet, optimiser: Sgd2012) -> dict[str, Tensor]:
    """Weights and velocities of the columns that are here, under the keys of the files."""
    weights, velocities = net.column_state(), optimiser.column_state(net)
    return {f"weights/{key}": tensor for key, tensor in weights.items()} | {
        f"velocity/{key}": tensor for key, tensor in velocities.items()
    }


def load_checkpoint(path: Path, net: AlexNet, optimiser: Sgd2012 | None = None) -> None:
    """Fill a network (and optimiser) with the columns it holds from a complete checkpoint.

    Raises:
        DataError: the checkpoint is of another network.
    """
    state: dict[str, Tensor] = {}
    for column in net.columns:
        state |= load_file(path / column_file(column))
    try:
        net.load_column_state(_under("weights/", state))
        if optimiser is not None:
            optimiser.load_column_state(net, _under("velocity/", state))
    except ValueError as error:
        raise DataError(f"checkpoint {path}: {error}") from error


def _under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }


def find_sound(places: CheckpointStorage, names: Iterable[str], tell: Tell) -> Checkpoint | None:
    """Return the first of some checkpoints of which every byte is right.

    Raises:
        StoreError: the store does not answer; that says nothing about the checkpoint.
    """
    for name in names:
        try:
            return verify_checkpoint(places, name)
        except StoreError:
            raise
        except UNSOUND as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            there = f"{places.address}/{name}"
            tell(Warned(f"checkpoint {there} is damaged ({reason}); passing over it"))
    return None


def read_table(places: CheckpointStorage, name: str) -> dict[str, Any]:
    """Read checkpoint.json.

    Raises:
        ValueError, KeyError, TypeError, OSError, DuetError: it is damaged, or not there.
    """
    table: dict[str, Any] = json.loads(places.read(name, JSON))
    if table["version"] != VERSION:
        raise ValueError(f"version {table['version']}, this program reads {VERSION}")
    return table


def verify_checkpoint(places: CheckpointStorage, name: str) -> Checkpoint:
    """Compare a checkpoint's files with what its checkpoint.json says.

    Raises:
        ValueError, KeyError, TypeError, OSError, DuetError: it is damaged.
    """
    table = read_table(places, name)
    columns = table.get("config", {}).get("columns", 2)
    if {column_file(column) for column in range(columns)} - set(table["files"]):
        raise ValueError("a column is missing")
    path, holder = fetch_files(places, name, table, list(table["files"]))
    mark = Mark(step=table["step"], position=table["position"])
    if mark.step != parse_step(name):
        raise ValueError(f"it is of step {mark.step}")
    return Checkpoint(
        path=path,
        mark=mark,
        classes=tuple(table["classes"]),
        error=table.get("top1_error"),
        name=name,
        holder=holder,
    )


def fetch_files(
    places: CheckpointStorage, name: str, table: dict[str, Any], files: list[str]
) -> tuple[Path, object]:
    """Return a local folder with files of a checkpoint, their hashes compared, and its holder.

    Raises:
        ValueError: they are not what `table` says; besides, what `check` raises.
    """
    path, holder = places.fetch(name, files)
    for file in files:
        facts = table["files"][file]
        size = (path / file).stat().st_size
        if size != facts["bytes"]:
            raise ValueError(f"{file} has {size} bytes instead of {facts['bytes']}")
        if sha256(path / file) != facts["sha256"]:
            raise ValueError(f"{file} does not have the SHA-256 it was written with")
    return path, holder


def choose_checkpoint(
    run: Path, store: str, tell: Tell, step: int | None = None, best: bool = False
) -> Checkpoint:
    """Find a checkpoint of a run, wherever it has them; it is fetched if need be.

    Args:
        run: folder of the run.
        store: its setting of that name.
        tell: gets a warning for each damaged one that is passed over.
        step: that of this step; None: the newest sound one.
        best: the one with the lowest validation error instead.

    Raises:
        UsageError: there is none, or not such a one.
        DataError: there is, and it is damaged.
        StoreError: the store does not answer.
    """
    return choose_from_storage(open_storage(run, store), str(run), tell, step, best)


def choose_from_storage(
    places: CheckpointStorage, run: str, tell: Tell, step: int | None = None, best: bool = False
) -> Checkpoint:
    """As `choose`, given where the checkpoints lie, and how messages call that."""
    names = places.list_complete()
    if not names:
        raise UsageError(f"{run} has no complete checkpoint yet; train on with cluster.train")
    if best:
        names = _by_error(places, names)
        if not names:
            raise UsageError(f"no checkpoint of {run} has a validation error; leave --best out")
    if step is not None:
        there = ", ".join(str(parse_step(name)) for name in names)
        names = [name for name in names if parse_step(name) == step]
        if not names:
            raise UsageError(f"{run} has no checkpoint of step {step}; there are {there}")
    found = find_sound(places, names, tell)
    if found is None:
        raise DataError(f"no checkpoint of {run} is sound; restore one, or train anew")
    return found


def _by_error(places: CheckpointStorage, names: Iterable[str]) -> list[str]:
    """Those with a validation error, the lowest first."""
    errors = {}
    for name in names:
        try:
            error = read_table(places, name).get("top1_error")
        except (OSError, ValueError, KeyError, TypeError, DuetError):
            continue  # damaged
        if error is not None:
            errors[name] = error
    return sorted(errors, key=lambda name: (errors[name], -parse_step(name)))
