"""Both columns on disk: whole or not at all, and loadable from either layout.

    RUN/checkpoints/step-00000400/
        column-a.safetensors    "weights/a.conv1.weight", "velocity/a.conv1.weight", ...
        column-b.safetensors
        checkpoint.json         written last: step, position, config, classes, hashes of the files

A folder takes its name only when everything in it is on the disk; until then it is called
`step-00000400.partial`. A column's tensors are the same whether one process held it or two, so
a run may go on in the other layout.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from cluster.events import Saved, Tell, Warned
from cluster.place import Place
from cluster.run_folder import CHECKPOINTS, Mark, checkpoints_in, step_of
from model.alexnet import AlexNet
from model.optim import Sgd2012
from pipeline.errors import DataError
from pipeline.files import PARTIAL, sealed, sha256, sync_folder

JSON = "checkpoint.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Found:
    """A complete checkpoint and where it lies."""

    path: Path
    mark: Mark
    classes: tuple[str, ...]
    """Names of the classes it was trained on."""


def column_file(column: int) -> str:
    """Name of a column's file."""
    return f"column-{'ab'[column]}.safetensors"


class Checkpoints:
    """The checkpoints of a run, as the processes of a job write and read them together."""

    def __init__(self, run: Path, place: Place, about: dict[str, Any], keep: int) -> None:
        """Prepare; writes nothing.

        Args:
            run: folder of the run, the same on every node.
            place: of this process.
            about: what checkpoint.json says besides the mark: config, data set, classes.
            keep: complete checkpoints to keep.
        """
        self._folder = run / CHECKPOINTS
        self._place, self._about, self._keep = place, about, keep

    def resume(self, net: AlexNet, optimiser: Sgd2012, tell: Tell) -> Mark:
        """Load the newest complete checkpoint, if there is one; all processes call it.

        Damaged ones are named in a warning and passed over.
        """
        found = newest(self._folder, tell) if self._place.leads else None
        found, there = self._place.share((found, bool(checkpoints_in(self._folder))))
        if found is None and there:
            raise DataError(
                f"no checkpoint in {self._folder} is sound; restore one, "
                "or delete that folder to start over"
            )
        if found is None:
            return Mark()
        load(found.path, net, optimiser)
        return found.mark

    def save(self, mark: Mark, net: AlexNet, optimiser: Sgd2012, tell: Tell) -> None:
        """Write a checkpoint; all processes call it, those of replica 0 write."""
        start = time.monotonic()
        partial = self._folder / f"step-{mark.step:08d}{PARTIAL}"
        if self._place.leads:
            self._clear(partial)
        self._place.gather(None)
        written = self._write_columns(partial, net, optimiser) if self._place.replica == 0 else {}
        files = {
            name: facts for part in self._place.gather(written) for name, facts in part.items()
        }
        if self._place.leads:
            self._seal(partial, mark, files)
            tell(Saved(mark.step, time.monotonic() - start))
        self._place.gather(None)

    def _clear(self, partial: Path) -> None:
        """Make an empty folder; whatever a crash left under such a name goes."""
        for left in self._folder.glob(f"step-*{PARTIAL}/"):
            shutil.rmtree(left)
        partial.mkdir(parents=True)

    def _write_columns(
        self, partial: Path, net: AlexNet, optimiser: Sgd2012
    ) -> dict[str, dict[str, Any]]:
        state = state_of(net, optimiser)
        written = {}
        for column in net.columns:
            path = partial / column_file(column)
            own = {
                key: tensor for key, tensor in state.items() if key.split("/")[1][0] == "ab"[column]
            }
            save_file(own, path)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            written[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        return written

    def _seal(self, partial: Path, mark: Mark, files: dict[str, dict[str, Any]]) -> None:
        table = {"version": VERSION, "step": mark.step, "position": mark.position, "files": files}
        with sealed(partial / JSON) as file:
            file.write((json.dumps(table | self._about, indent=1) + "\n").encode())
        final = partial.with_name(partial.name.removesuffix(PARTIAL))
        if final.exists():  # a damaged one that was passed over
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(self._folder)
        for path in superfluous(checkpoints_in(self._folder), mark.step, self._keep):
            shutil.rmtree(path)


def superfluous(newest_first: list[Path], step: int, keep: int) -> list[Path]:
    """Return which checkpoints to delete now that the one of `step` is complete.

    Later ones are damaged: had they been sound, the run would have gone on from them. They must
    not count among the `keep` that stay.
    """
    later = [path for path in newest_first if step_of(path) > step]
    sound = [path for path in newest_first if step_of(path) <= step]
    return later + sound[keep:]


def state_of(net: AlexNet, optimiser: Sgd2012) -> dict[str, Tensor]:
    """Weights and velocities of the columns that are here, under the keys of the files."""
    weights, velocities = net.column_state(), optimiser.column_state(net)
    return {f"weights/{key}": tensor for key, tensor in weights.items()} | {
        f"velocity/{key}": tensor for key, tensor in velocities.items()
    }


def load(path: Path, net: AlexNet, optimiser: Sgd2012 | None = None) -> None:
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


def newest(folder: Path, tell: Tell) -> Found | None:
    """Find the newest complete checkpoint, checking every byte; None if there is none.

    Args:
        folder: RUN/checkpoints.
        tell: gets a warning for each damaged one that is passed over.
    """
    for path in checkpoints_in(folder):
        try:
            return _check(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)
            tell(Warned(f"checkpoint {path} is damaged ({reason}); passing over it"))
    return None


def _check(path: Path) -> Found:
    """Compare a checkpoint's files with what its checkpoint.json says.

    Raises:
        ValueError, KeyError, TypeError, OSError: it is damaged.
    """
    table = json.loads((path / JSON).read_bytes())
    if table["version"] != VERSION:
        raise ValueError(f"version {table['version']}, this program reads {VERSION}")
    columns = table.get("config", {}).get("columns", 2)
    if {column_file(column) for column in range(columns)} - set(table["files"]):
        raise ValueError("a column is missing")
    for name, facts in table["files"].items():
        size = (path / name).stat().st_size
        if size != facts["bytes"]:
            raise ValueError(f"{name} has {size} bytes instead of {facts['bytes']}")
        if sha256(path / name) != facts["sha256"]:
            raise ValueError(f"{name} does not have the SHA-256 it was written with")
    mark = Mark(step=table["step"], position=table["position"])
    return Found(path=path, mark=mark, classes=tuple(table["classes"]))
