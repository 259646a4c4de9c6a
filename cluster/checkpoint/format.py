"""Files of a checkpoint: names, hashes, loading, and the choice of one of a run's checkpoints.

    RUN/checkpoints/step-00000400/
        column-a.safetensors    "weights/a.conv1.weight", "velocity/a.conv1.weight", ...
        column-b.safetensors
        checkpoint.json         written last: step, position, error, config, classes, file hashes,
                                and a hash of all that

The tensors of a column are the same whether one process holds both columns or two processes hold
one each, so a run can be resumed in the other layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cluster.checkpoint.storage import (
    JSON,
    CheckpointStorage,
    open_named,
    open_storage,
    parse_step,
)
from cluster.run.events import Tell, Warned
from cluster.run.folder import Mark, is_run_id, read_run_id
from pipeline.remote.filesystem import StoreError
from pipeline.tools.errors import DataError, DuetError, UsageError, summarize_error
from pipeline.tools.files import sha256
from pipeline.tools.jsonl import hash_json, parse_json
from pipeline.tools.text import hide_credentials

if TYPE_CHECKING:  # commands that only look at a run start faster without torch
    from torch import Tensor

    from model.alexnet import AlexNet
    from model.optimizer import Sgd2012

VERSION = 1
DIGEST = "sha256"
"""Key of checkpoint.json with the hash of its other content; older ones have none."""
_TENSOR = re.compile(r"[ab]\.\w+\.[\w.]+")
UNSOUND = (OSError, ValueError, KeyError, TypeError, DuetError)
"""Exceptions that a damaged checkpoint raises when it is read."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint and its files."""

    path: Path
    """Local folder with its files. If they were downloaded, it exists as long as this object."""
    mark: Mark
    classes: tuple[str, ...]
    """Names of the classes that it was trained on."""
    error: float | None = None
    """Top-1 validation error at its step, 0..1; None without a validation."""
    name: str = ""
    run: str = ""
    """Name of the run that made it; "" in older ones."""
    table: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Content of its checkpoint.json."""
    holder: object = field(default=None, repr=False, compare=False)
    """Object that keeps a temporary `path` from being removed."""


def column_file(column: int) -> str:
    """Return the name of a column's file."""
    return f"column-{'ab'[column]}.safetensors"


def collect_state(net: AlexNet, optimizer: Sgd2012) -> dict[str, Tensor]:
    """Return weights and velocities of this process's columns, under the keys of the files."""
    weights, velocities = net.column_state(), optimizer.column_state(net)
    return {f"weights/{key}": tensor for key, tensor in weights.items()} | {
        f"velocity/{key}": tensor for key, tensor in velocities.items()
    }


def load_checkpoint(path: Path, net: AlexNet, optimizer: Sgd2012 | None = None) -> None:
    """Load a network's columns (and the optimizer's velocities) from a complete checkpoint.

    Raises:
        DataError: the checkpoint is of another network.
    """
    try:
        net.load_column_state(load_columns(path, net.columns, "weights/"))
        if optimizer is not None:
            optimizer.load_column_state(net, load_columns(path, net.columns, "velocity/"))
    except ValueError as error:
        raise DataError(f"checkpoint {path}: {error}") from error


def load_columns(path: Path, columns: Iterable[int], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of some columns whose keys have a prefix, by the rest of their keys.

    Raises:
        DataError: a file is no file of tensors, or of none of a network's.
    """
    found: dict[str, Tensor] = {}
    for column in columns:
        name = path / column_file(column)
        try:
            with safe_open(name, "pt") as file:
                keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
                found |= {key.removeprefix(prefix): file.get_tensor(key) for key in keys}
        except SafetensorError as error:
            raise DataError(f"{name} holds no tensors ({summarize_error(error)})") from error
    if strange := [key for key in found if not _TENSOR.fullmatch(key)]:
        raise DataError(f"{path} has a tensor {strange[0]!r}, which is of no network")
    return found


def find_sound(storage: CheckpointStorage, names: Iterable[str], tell: Tell) -> Checkpoint | None:
    """Return the first of some checkpoints whose files match their hashes.

    Raises:
        StoreError: the store does not answer, which says nothing about the checkpoint.
    """
    for name in names:
        try:
            return verify_checkpoint(storage, name)
        except StoreError:
            raise
        except UNSOUND as error:
            # An `OSError` as a whole: it names the file.
            why = str(error) if isinstance(error, OSError) else summarize_error(error)
            what = f"checkpoint {storage.address}/{name} is damaged ({why})"
            tell(Warned(f"{what}; passing over it"))
    return None


def read_table(storage: CheckpointStorage, name: str) -> dict[str, Any]:
    """Read and check checkpoint.json: nothing in it is trusted, since a store may have sent it.

    Raises:
        ValueError, KeyError, TypeError, OSError, DuetError: it is damaged, or not there.
    """
    table = parse_json(storage.read(name, JSON))
    if not isinstance(table, dict):
        raise ValueError(f"{JSON} holds no table")
    if table["version"] != VERSION:
        raise ValueError(f"version {table['version']}, this program reads {VERSION}")
    if DIGEST in table and table[DIGEST] != hash_table(table):
        raise ValueError(f"{JSON} does not have the SHA-256 it was written with")
    if table["step"] != parse_step(name):
        raise ValueError(f"it is of step {table['step']!r:.80}")
    _require(table, "step", _is_count(table["step"]))
    _require(table, "position", _is_count(table["position"]))
    top1_error = table.get("top1_error")
    _require(table, "top1_error", top1_error is None or _is_number(top1_error))
    _require(table, "run", is_run_id(table.setdefault("run", "")) or table["run"] == "")
    classes, config = table["classes"], table.setdefault("config", {})
    _require(table, "classes", isinstance(classes, list) and all(map(_is_text, classes)))
    _require(table, "config", isinstance(config, dict))
    columns = config.get("columns", 2)
    _require(config, "columns", type(columns) is int and columns in (1, 2))
    _check_files(table["files"], [column_file(column) for column in range(columns)])
    return table


def _check_files(files: Any, names: list[str]) -> None:
    """Check the table of a checkpoint's files, whose names are joined to local folders."""
    if not isinstance(files, dict):
        raise ValueError(f"files is {files!r}")
    if strangers := sorted(set(files) - set(names)):
        raise ValueError(f"it names a file {strangers[0]!r}, which no checkpoint has")
    for name in names:
        if name not in files:
            raise ValueError("a column is missing")
        facts = files[name]
        if not _is_count(facts["bytes"]) or not _is_text(facts["sha256"]):
            raise ValueError(f"{name} is described by {facts!r}")


def _require(table: dict[str, Any], key: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{key} is {table[key]!r:.80}")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def hash_table(table: dict[str, Any]) -> str:
    """Return the SHA-256 of the content of checkpoint.json."""
    return hash_json({key: value for key, value in table.items() if key != DIGEST})


def read_newest_table(storage: CheckpointStorage) -> dict[str, Any] | None:
    """Read the newest checkpoint.json that is not damaged; None if there is none.

    Raises:
        OSError, DuetError: the place cannot be reached.
    """
    for name in storage.list_complete():
        try:
            return read_table(storage, name)
        except StoreError:
            raise
        except UNSOUND:
            continue
    return None


def read_error(storage: CheckpointStorage, name: str) -> float | None:
    """Return the top-1 validation error of a checkpoint, 0..1; None without one, or if damaged.

    Raises:
        StoreError: the store does not answer, which says nothing about the checkpoint.
    """
    try:
        error: float | None = read_table(storage, name).get("top1_error")
    except StoreError:
        raise
    except UNSOUND:
        return None
    return error


def verify_checkpoint(storage: CheckpointStorage, name: str) -> Checkpoint:
    """Compare a checkpoint's files with the hashes in its checkpoint.json.

    Raises:
        ValueError, KeyError, TypeError, OSError, DuetError: it is damaged.
    """
    table = read_table(storage, name)
    path, holder = fetch_files(storage, name, table, list(table["files"]))
    return Checkpoint(
        path=path,
        mark=Mark(step=table["step"], position=table["position"]),
        classes=tuple(table["classes"]),
        error=table.get("top1_error"),
        name=name,
        run=table.get("run", ""),
        table=table,
        holder=holder,
    )


def fetch_files(
    storage: CheckpointStorage, name: str, table: dict[str, Any], files: list[str]
) -> tuple[Path, object]:
    """Return a local folder with verified files of a checkpoint, and the folder's holder.

    Raises:
        ValueError: they do not match `table`; also the errors of `verify_checkpoint`.
    """
    path, holder = storage.fetch(name, files)
    for file in files:
        facts = table["files"][file]
        size = (path / file).stat().st_size
        if size != facts["bytes"]:
            raise ValueError(f"{file} has {size} bytes instead of {facts['bytes']}")
        if sha256(path / file) != facts["sha256"]:
            raise ValueError(f"{file} does not have the SHA-256 it was written with")
    return path, holder


def choose_checkpoint(
    run: Path, store: str, tell: Tell, named: str | None = None, best: bool = False
) -> Checkpoint:
    """Find a checkpoint for commands that look at a run; a store's is downloaded.

    A training that resumes takes the newest sound one: `loader.load_newest`. A checkpoint of
    another run, which has written into the same store, is refused.

    Args:
        run: folder of the run.
        store: the run's setting of that name.
        tell: gets a warning for each damaged checkpoint that is skipped.
        named: step of the wanted checkpoint, or its folder or address; None for the newest that is
            not damaged.
        best: choose the one with the lowest validation error instead.

    Raises:
        UsageError: there is none, or none like this, or `named` and `best` are both given.
        DataError: it is damaged.
        StoreError: the store does not answer.
    """
    if best and named is not None:
        raise UsageError(f"give --best or --checkpoint {named}, not both")
    storage, place, step = open_storage(run, store), str(run), None
    if named is not None and named.isdecimal():
        step = int(named)
    elif named is not None:
        if (one := open_named(named)) is None:
            there = ", ".join(str(parse_step(name)) for name in storage.list_complete()) or "none"
            raise UsageError(
                f"--checkpoint {named} is neither a step nor a checkpoint's folder (step-...); the "
                f"steps of {run} are {there}"
            )
        storage, place, step = one[0], hide_credentials(one[1]), parse_step(one[2])
    found = choose_from_storage(storage, place, tell, step, best)
    if words := describe_stranger(found.run, read_run_id(run)):
        place = place if place != str(run) else store or place
        raise UsageError(f"{place} holds checkpoints {words} in {run}; name the folder of that run")
    return found


def describe_stranger(theirs: str, own: str) -> str:
    """Return words for a checkpoint of another run; "" if it is not, or nobody knows."""
    return f"of run {theirs}, not of {own}" if theirs and own and theirs != own else ""


def choose_from_storage(
    storage: CheckpointStorage, run: str, tell: Tell, step: int | None = None, best: bool = False
) -> Checkpoint:
    """See `choose_checkpoint`; `run` names the run in messages."""
    names = storage.list_complete()
    if not names:
        raise UsageError(f"{run} has no complete checkpoint yet; train on with cluster.train")
    if best:
        errors = {}
        for name in names:
            with suppress(StoreError):  # passed over like a damaged one
                if (error := read_error(storage, name)) is not None:
                    errors[name] = error
        if not errors:
            raise UsageError(f"no checkpoint of {run} has a validation error; leave --best out")
        names = sorted(errors, key=lambda name: (errors[name], -parse_step(name)))
    if step is not None:
        there = ", ".join(str(parse_step(name)) for name in names)
        names = [name for name in names if parse_step(name) == step]
        if not names:
            raise UsageError(f"{run} has no checkpoint of step {step}; there are {there}")
    found = find_sound(storage, names, tell)
    if found is None:
        raise DataError(f"no checkpoint of {run} is sound; restore one, or train anew")
    return found
