"""Writes checkpoints while training goes on.

`begin` copies the tensors of a column (training stands still for this alone), a thread writes and
hashes the copy, and `finish`, some steps later, completes the checkpoint when all columns are on
the disk. Only `begin` and `finish` make collective calls, never a thread.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.checkpoint.format import (
    DIGEST,
    VERSION,
    collect_state,
    column_file,
    describe_stranger,
    hash_table,
    read_table,
)
from cluster.checkpoint.loader import load_newest
from cluster.checkpoint.memory import Memory
from cluster.checkpoint.storage import CheckpointStorage, open_storage, parse_step
from cluster.mesh import ProcessMesh
from cluster.run.events import Saved, Tell, Warned
from cluster.run.folder import Mark
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from pipeline.tools.errors import DuetError, SetupError, UsageError, summarize_error
from pipeline.tools.files import sha256

Facts = dict[str, dict[str, Any]]
"""Size in bytes and SHA-256 of each file, by name."""
PATIENCE = 30.0
"""Seconds that training waits for a checkpoint that is still being written when the next is due."""
LIMIT = 1800.0
"""The same in seconds for a checkpoint that must succeed."""
BEAT = 2.0
"""Seconds between two collective calls of processes that wait for each other (they time out)."""
PARTING = 5.0
"""Seconds for a thread to end when the process ends."""


class BackgroundTask:
    """A call in a daemon thread, which keeps its exception as a message."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.trouble = ""
        """Message of its exception; "" while it runs or if it succeeded."""
        self.seconds = 0.0
        """Seconds that it took."""
        self._action = action
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        start = time.monotonic()
        try:
            self._action()
        except BaseException as error:  # training goes on
            self.trouble = summarize_error(error)
        self.seconds = time.monotonic() - start

    def wait(self, seconds: float) -> bool:
        """Wait for the end, at most so many seconds; return whether it has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


@dataclass
class _Save:
    """A checkpoint that is being written."""

    mark: Mark
    error: float | None
    work: str
    """Name under which it is written; "" if it could not be begun."""
    trouble: str = ""
    """Reason that it has failed; "" if it has not."""
    files: Facts = field(default_factory=dict)
    """Files that this process has written."""
    task: BackgroundTask | None = None
    """Writes this process's columns; None if it has none to write."""
    blocked: float = 0.0
    """Seconds that training waited for it."""

    @property
    def is_busy(self) -> bool:
        return self.task is not None and not self.task.wait(0.0)


class CheckpointManager:
    """Writes and loads the checkpoints of a run; every process of a job has one.

        checkpoints.begin(mark, net, optimizer)
        ...                                   # steps
        if checkpoints.is_pending and nobody is busy:
            checkpoints.finish()
        ...
        checkpoints.finish(must=True)

    A checkpoint that fails is a warning, because the next one may succeed. It is an error only with
    `must`.
    """

    def __init__(
        self, run: Path, mesh: ProcessMesh, about: dict[str, Any], tell: Tell, *,
        keep: int, keep_best: int = 0, store: str = "",
    ) -> None:  # fmt: skip
        """Open the storage; nothing is written.

        Args:
            run: folder of the run, the same on every node unless there is a store.
            mesh: rank, column and replica of this process.
            about: further keys of checkpoint.json: the run's name, config, data set, classes.
            tell: gets an event for each checkpoint, and warnings.
            keep: number of newest complete checkpoints to keep.
            keep_best: number of further ones to keep, those of lowest validation error.
            store: address or folder of the checkpoints; "" for RUN.

        Raises:
            UsageError, SetupError: checkpoints cannot be written to `store`.
        """
        self._storage: CheckpointStorage = open_storage(run, store)
        self._run, self._run_id = run, str(about.get("run", ""))
        self._mesh, self._about, self._tell = mesh, about, tell
        self.before: Callable[[], None] = lambda: None
        """Hook: the leader calls it in `begin`; if it raises, the checkpoint has failed."""
        self.alongside: Callable[[], None] = lambda: None
        """Hook: the leader calls it in the thread that writes; likewise."""
        self._keep, self._keep_best = keep, keep_best
        self._save: _Save | None = None
        self._skipped: tuple[Mark, AlexNet, Sgd2012, float | None] | None = None
        """Arguments of the last `begin` if it skipped the checkpoint."""
        self._good = 0
        """Step of the last complete checkpoint."""
        self.is_ended = True
        """False if `resume` found a step in memory that may still have to validate, and so on."""
        self._errors: dict[str, float | None] = {}
        """Validation errors of the complete checkpoints, by name."""
        self._copies: dict[str, Tensor] = {}
        """CPU memory for copies of this process's tensors, reused by each checkpoint."""
        self._stopped = threading.Event()
        self._cleaning: BackgroundTask | None = None
        """The leader's removal of superfluous checkpoints."""

    def resume(self, net: AlexNet, optimizer: Sgd2012, memory: Memory | None = None) -> Mark:
        """Load the newest state, of `memory` or a complete checkpoint; all processes call it.

        Damaged checkpoints are named in a warning and passed over. If there is no state, the
        training is a new one.

        Raises:
            DataError: there are some, and none is sound.
            SetupError: they cannot be reached.
        """
        found = load_newest(
            self._storage, self._run, self._mesh, net, optimizer, self._tell, self._run_id, memory
        )
        self._errors, self._good, self.is_ended = found.errors, found.saved, found.is_ended
        return found.mark

    @property
    def last_step(self) -> int:
        """Step of the last complete checkpoint, as the leader knows it."""
        return self._good

    @property
    def is_busy(self) -> bool:
        """True while this process is writing."""
        return self._save is not None and self._save.is_busy

    @property
    def write_seconds(self) -> float:
        """Seconds that this process took to write its columns; 0 until it has."""
        return self._save.task.seconds if self._save and self._save.task else 0.0

    @property
    def is_pending(self) -> bool:
        """True if a checkpoint was begun and not finished; the same on all processes."""
        return self._save is not None

    def begin(
        self, mark: Mark, net: AlexNet, optimizer: Sgd2012, error: float | None = None
    ) -> None:
        """Copy the state and begin to write it; a collective call. Replica 0 writes.

        The previous checkpoint is finished first; if that takes longer than `PATIENCE`, this one is
        skipped with a warning.

        Args:
            mark: step and position.
            net: gives the weights of this process's columns.
            optimizer: gives their velocities.
            error: top-1 validation error, 0..1, if it was just measured.
        """
        start = time.monotonic()
        self._skipped = None
        self.finish()
        if self._save is not None:
            self._skipped = (mark, net, optimizer, error)
            if self._mesh.is_leader:
                what = f"the checkpoint of step {self._save.mark.step} is still being written"
                why = f"to {self._storage.address}; that of step {mark.step} is skipped"
                self._tell(Warned(f"{what} {why}"))
            return
        work, trouble = self._mesh.broadcast(self._open(mark) if self._mesh.is_leader else ("", ""))
        self._save = save = _Save(mark, error, work, trouble)
        if not trouble and self._mesh.replica == 0:
            self._copy(collect_state(net, optimizer))
            save.task = BackgroundTask(partial(self._write, save, net.columns))
        save.blocked = time.monotonic() - start

    def _open(self, mark: Mark) -> tuple[str, str]:
        try:
            self.before()
            return self._storage.begin(mark.step, secrets.token_hex(4)), ""
        except (OSError, DuetError) as error:
            return "", summarize_error(error)

    def _copy(self, state: dict[str, Tensor]) -> None:
        for key, tensor in state.items():
            if key not in self._copies:
                self._copies[key] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                )
            self._copies[key].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in state.values()):
            torch.cuda.current_stream().synchronize()

    def _write(self, save: _Save, columns: tuple[int, ...]) -> None:
        """Write, hash and upload the copies of `columns`; runs in the thread."""
        for column in columns:
            if self._stopped.is_set():
                return
            name = column_file(column)
            own = {
                k: tensor
                for k, tensor in self._copies.items()
                if k.split("/")[1][0] == "ab"[column]
            }
            path = self._storage.write(save.work, name, partial(save_file, own))
            facts = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            self._storage.upload(save.work, name, path)
            save.files[name] = facts
        if self._mesh.is_leader and not self._stopped.is_set():
            self._refuse_strangers()
            self.alongside()

    def _refuse_strangers(self) -> None:
        """Raise if another run has saved here: neither must remove what the other has written."""
        for name in set(self._storage.list_complete()) - set(self._errors):
            with suppress(ValueError, KeyError, TypeError):  # damaged
                if words := describe_stranger(read_table(self._storage, name)["run"], self._run_id):
                    raise UsageError(f"{name} is there, {words}: give each its own --store")

    def finish(self, *, must: bool = False) -> None:
        """Wait until all columns are written, and complete the checkpoint; a collective call.

        A no-op if none is pending. One that takes longer than `PATIENCE` stays pending, unless it
        `must` succeed.

        Raises:
            SetupError: it has failed, and `must` is set.
        """
        save, start = self._save, time.monotonic()
        if save is not None:
            parts = self._gather(save, LIMIT if must else PATIENCE)
            if parts is None and not must:
                save.blocked += time.monotonic() - start
                return
            self._save = None
            trouble = self._mesh.broadcast(
                self._conclude(save, parts) if self._mesh.is_leader else ""
            )
            save.blocked += time.monotonic() - start
            self._good = self._good if trouble else save.mark.step
            self._report(save, trouble, must and not self._skipped)
        if must and self._skipped is not None:  # for the current step
            self.begin(*self._skipped)
            self.finish(must=True)
        if must:
            self._clean(None)

    def _gather(self, save: _Save, timeout: float) -> list[tuple[Facts, str]] | None:
        """Return files and error of each process once all have written; None after a timeout."""
        deadline = time.monotonic() + timeout
        while True:
            left = deadline - time.monotonic()
            if save.task is not None:
                save.task.wait(min(BEAT, max(0.0, left)))
            busy = save.is_busy  # read first: what is read after the end is final
            trouble = save.trouble or (save.task.trouble if save.task else "")
            if trouble and self._mesh.world_size > 1 and not save.trouble:
                trouble = f"{self._mesh}: {trouble}"
            found = self._mesh.gather((busy, left <= 0, save.files, trouble))
            if not any(busy for busy, *_ in found):
                return [(files, words) for _, _, files, words in found]
            if any(late for _, late, *_ in found):
                return None

    def _conclude(self, save: _Save, parts: list[tuple[Facts, str]] | None) -> str:
        """Complete the checkpoint and remove superfluous ones. Leader only.

        Returns:
            The reason that it has failed; "" if it has not.
        """
        if parts is None:
            trouble = f"it is not written after {LIMIT:,.0f} s"
        else:
            trouble = next((words for _, words in parts if words), "")
            trouble = trouble or self._seal(save, [files for files, _ in parts])
        if trouble and save.work:
            self._clean(partial(self._storage.remove, save.work))
        return trouble

    def _seal(self, save: _Save, parts: list[Facts]) -> str:
        table: dict[str, Any] = {
            "version": VERSION,
            "step": save.mark.step,
            "position": save.mark.position,
            "top1_error": save.error,
            "files": {name: facts for part in parts for name, facts in part.items()},
        }
        table |= self._about
        table[DIGEST] = hash_table(table)
        try:
            text = json.dumps(table, indent=1) + "\n"
            name = self._storage.seal(save.work, text.encode())
        except (OSError, DuetError) as error:
            return summarize_error(error)
        self._errors[name] = save.error
        self._clean(partial(self._remove_superfluous, name))
        return ""

    def _remove_superfluous(self, name: str) -> None:
        """Remove checkpoints that need not be kept now that `name` is complete."""
        names = self._storage.list_complete()
        for old in select_superfluous(names, self._errors, name, self._keep, self._keep_best):
            self._storage.remove(old)
        self._storage.remove_unfinished(parse_step(name))

    def _clean(self, action: Callable[[], None] | None) -> None:
        """Run a removal in a thread; with None, wait for the end of the last one."""
        if self._cleaning is not None:
            if not self._cleaning.wait(0.0 if action else PATIENCE):
                return  # the next call does it
            if self._cleaning.trouble:
                why = self._cleaning.trouble
                self._tell(Warned(f"{self._storage.address} is not tidied ({why})"))
        self._cleaning = BackgroundTask(action) if action else None

    def _report(self, save: _Save, trouble: str, must: bool) -> None:
        what = (
            f"the checkpoint of step {save.mark.step} cannot be written to "
            f"{self._storage.address} ({trouble})"
        )
        if trouble and must:
            self._clean(None)
            raise SetupError(
                f"{what}; free some space there, or bring the disk back: the same command resumes "
                f"from step {self._good}"
            )
        if self._mesh.is_leader:
            failed = Warned(f"{what}; training goes on, the last one is of step {self._good}")
            self._tell(failed if trouble else Saved(save.mark.step, save.blocked))

    def close(self) -> None:
        """Stop writing; a pending checkpoint is not completed."""
        self._stopped.set()
        for task in (self._save.task if self._save else None, self._cleaning):
            if task is not None:
                task.wait(PARTING)
        self._save = None


def select_superfluous(
    newest_first: list[str], errors: dict[str, float | None], new: str, keep: int, keep_best: int
) -> list[str]:
    """Return the names of the checkpoints to delete now that `new` is complete.

    Those of later steps are damaged, since the run was not resumed from them, and do not count
    among the ones to keep.
    """
    later = [name for name in newest_first if parse_step(name) >= parse_step(new) and name != new]
    sound = [name for name in newest_first if name not in later]
    known = {name: error for name in sound if (error := errors.get(name)) is not None}
    best = sorted(known, key=lambda name: (known[name], -parse_step(name)))[:keep_best]
    return later + [name for name in sound[keep:] if name not in best]
