"""Checkpoints written while training goes on.

`begin` copies what a column owns (the only time training stands still), a thread writes and hashes
the copy, and `finish`, some steps later, makes it a checkpoint when all columns are on the disk.
Collective calls are made by `begin` and `finish` only, never by a thread.

What one process does for a checkpoint besides training: a copy at once, the rest in a thread.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.checkpoint.format import VERSION, collect_state, column_file, reason
from cluster.checkpoint.loader import load_newest
from cluster.checkpoint.storage import CheckpointStorage, open_storage, parse_step
from cluster.mesh import ProcessMesh
from cluster.run.events import Saved, Tell, Warned
from cluster.run.folder import Mark
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from pipeline.tools.errors import DuetError, SetupError
from pipeline.tools.files import sha256

Facts = dict[str, dict[str, Any]]
"""Bytes and hash by file."""


class BackgroundTask:
    """Something done in a thread that may be left behind; what goes wrong is kept in words."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.trouble = ""
        """Why it has failed, once it has ended."""
        self.seconds = 0.0
        """How long it took."""
        self._action = action
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        start = time.monotonic()
        try:
            self._action()
        except BaseException as error:  # training goes on
            self.trouble = reason(error)
        self.seconds = time.monotonic() - start

    @property
    def is_alive(self) -> bool:
        """Whether it is still being done."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Wait for its end, for a while; says whether it has come."""
        self._thread.join(seconds)
        return not self.is_alive


class StateCopies:
    """Memory for a copy of a process's tensors, kept from save to save."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}

    def take(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors to the CPU; the copies are good until this is called again."""
        for key, tensor in state.items():
            if key not in self._memory:
                self._memory[key] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                )
            self._memory[key].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in state.values()):
            torch.cuda.current_stream().synchronize()
        return self._memory


def write_columns(
    places: CheckpointStorage, work: str, state: dict[str, Tensor], columns: tuple[int, ...],
    facts: Facts, stopped: threading.Event,
) -> None:  # fmt: skip
    """Write, hash and bring to their place the files of some columns.

    Args:
        places: where to.
        work: name under which they are written.
        state: copies of the tensors.
        columns: which.
        facts: gets bytes and hash of each file that is there.
        stopped: nothing more is begun when set.
    """
    for column in columns:
        if stopped.is_set():
            return
        name = column_file(column)
        own = {key: t for key, t in state.items() if key.split("/")[1][0] == "ab"[column]}
        path = places.write(work, name, partial(save_file, own))
        found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        places.upload(work, name, path)
        facts[name] = found


PATIENCE = 30.0
"""Seconds that training waits for a save that is still under way when the next one is due."""
LIMIT = 1800.0
"""The same for the save that must succeed."""
BEAT = 2.0
"""Seconds after which processes that wait for each other say so: a collective has a timeout."""
PARTING = 5.0
"""Seconds for a thread to end when the process goes."""


@dataclass
class _Save:
    """A save under way."""

    mark: Mark
    error: float | None
    work: str
    """Name under which it is written; empty if it could not even be begun."""
    trouble: str = ""
    """Why it has failed."""
    files: Facts = field(default_factory=dict)
    """What this process has written."""
    chore: BackgroundTask | None = None
    """Its writing, if this process has any."""
    blocked: float = 0.0
    """Seconds for which training stood still."""

    @property
    def is_busy(self) -> bool:
        return self.chore is not None and self.chore.is_alive


class CheckpointManager:
    """The checkpoints of a run, as the processes of a job write and read them together.

        checkpoints.begin(mark, net, optimiser)
        ...                                   # steps
        if checkpoints.is_pending and nobody is busy:
            checkpoints.finish()
        ...
        checkpoints.finish(must=True)

    A save that fails is a warning: the next one may be luckier. Only where it `must` be is it an
    error.
    """

    def __init__(
        self, run: Path, place: ProcessMesh, about: dict[str, Any], tell: Tell, *,
        keep: int, keep_best: int = 0, store: str = "",
    ) -> None:  # fmt: skip
        """Prepare; writes nothing.

        Args:
            run: folder of the run, the same on every node unless there is a store.
            place: of this process.
            about: what checkpoint.json says besides the mark: config, data set, classes.
            tell: gets what was saved, and warnings.
            keep: newest complete checkpoints to keep.
            keep_best: how many to keep besides, of the lowest validation error.
            store: address or folder to have them in; "": in RUN.

        Raises:
            UsageError, SetupError: `store` is nothing that checkpoints can be written to.
        """
        self._places: CheckpointStorage = open_storage(run, store)
        self._run = run
        self._place, self._about, self._tell = place, about, tell
        self.before: Callable[[], None] = lambda: None
        """The leader calls it as a save begins; what it raises makes it a failed save."""
        self.alongside: Callable[[], None] = lambda: None
        """Likewise, in the thread that writes."""
        self._keep, self._keep_best = keep, keep_best
        self._save: _Save | None = None
        self._left_out: tuple[Mark, AlexNet, Sgd2012, float | None] | None = None
        """What the last `begin` was asked for and did not begin."""
        self._good = 0
        """Step of the last complete one."""
        self._errors: dict[str, float | None] = {}
        """Validation errors of the complete ones, by name."""
        self._copies = StateCopies()
        self._stopped = threading.Event()
        self._cleaning: BackgroundTask | None = None
        """The leader's removing of what is not needed any more."""

    def resume(self, net: AlexNet, optimiser: Sgd2012) -> Mark:
        """Load the newest complete checkpoint, if there is one; all processes call it.

        Damaged ones are named in a warning and passed over.

        Raises:
            DataError: there are some, and none is sound.
            SetupError: they cannot be reached.
        """
        mark, self._errors = load_newest(
            self._places, self._run, self._place, net, optimiser, self._tell
        )
        self._good = mark.step
        return mark

    @property
    def is_busy(self) -> bool:
        """Whether this process still writes."""
        return self._save is not None and self._save.is_busy

    @property
    def write_seconds(self) -> float:
        """Seconds that this process took to write its part of the save under way; 0 until then."""
        return self._save.chore.seconds if self._save and self._save.chore else 0.0

    @property
    def is_pending(self) -> bool:
        """Whether a save was begun and not finished; the same on all processes."""
        return self._save is not None

    def begin(
        self, mark: Mark, net: AlexNet, optimiser: Sgd2012, error: float | None = None
    ) -> None:
        """Copy the state and begin to write it; all processes call it, those of replica 0 write.

        If the save before is still under way it is finished first, or, if that takes more than
        `PATIENCE`, this one is left out, with a warning.

        Args:
            mark: the step that was made.
            net: the columns here.
            optimiser: its velocities.
            error: top-1 validation error, 0 to 1, if it was just measured.
        """
        start = time.monotonic()
        self._left_out = None
        self.finish()
        if self._save is not None:
            self._left_out = (mark, net, optimiser, error)
            if self._place.is_leader:
                self._warn(
                    f"the checkpoint of step {self._save.mark.step} is still being written to "
                    f"{self._places.address}; that of step {mark.step} is left out"
                )
            return
        work, trouble = self._place.broadcast(
            self._open(mark) if self._place.is_leader else ("", "")
        )
        self._save = save = _Save(mark, error, work, trouble)
        if not trouble and self._place.replica == 0:
            state = self._copies.take(collect_state(net, optimiser))
            save.chore = BackgroundTask(partial(self._write, save, state, net.columns))
        save.blocked = time.monotonic() - start

    def _open(self, mark: Mark) -> tuple[str, str]:
        try:
            self.before()
            return self._places.begin(mark.step, secrets.token_hex(4)), ""
        except (OSError, DuetError) as error:
            return "", reason(error)

    def _write(self, save: _Save, state: dict[str, Any], columns: tuple[int, ...]) -> None:
        """What the thread does."""
        write_columns(self._places, save.work, state, columns, save.files, self._stopped)
        if self._place.is_leader and not self._stopped.is_set():
            self.alongside()

    def finish(self, *, must: bool = False) -> None:
        """Wait for all parts and make them a checkpoint; all processes call it.

        Without a save under way this does nothing. One that takes longer than `PATIENCE` stays
        under way, unless it `must` succeed.

        Raises:
            SetupError: it has failed, and `must` not.
        """
        save, start = self._save, time.monotonic()
        if save is not None:
            parts = self._parts(save, LIMIT if must else PATIENCE)
            if parts is None and not must:
                save.blocked += time.monotonic() - start
                return
            self._save = None
            trouble = self._place.broadcast(
                self._conclude(save, parts) if self._place.is_leader else ""
            )
            save.blocked += time.monotonic() - start
            self._good = self._good if trouble else save.mark.step
            self._report(save, trouble, must and not self._left_out)
        if must and self._left_out is not None:  # no step was made since
            self.begin(*self._left_out)
            self.finish(must=True)
        if must:
            self._clean(None)

    def _parts(self, save: _Save, patience: float) -> list[tuple[Facts, str]] | None:
        """Wait until all processes have written; None if they do not in time."""
        deadline = time.monotonic() + patience
        while True:
            left = deadline - time.monotonic()
            if save.chore is not None:
                save.chore.wait(min(BEAT, max(0.0, left)))
            busy = save.is_busy  # first: what is read after its end is final
            trouble = save.trouble or (save.chore.trouble if save.chore else "")
            if trouble and self._place.world_size > 1 and not save.trouble:
                trouble = f"{self._place}: {trouble}"
            found = self._place.gather((busy, left <= 0, save.files, trouble))
            if not any(busy for busy, *_ in found):
                return [(files, words) for _, _, files, words in found]
            if any(late for _, late, *_ in found):
                return None

    def _conclude(self, save: _Save, parts: list[tuple[Facts, str]] | None) -> str:
        """Make it a checkpoint, and have removed what is not needed any more; the leader's.

        Returns:
            why it has failed, or nothing.
        """
        if parts is None:
            trouble = f"it is not written after {LIMIT:,.0f} s"
        else:
            trouble = next((words for _, words in parts if words), "")
            trouble = trouble or self._seal(save, [files for files, _ in parts])
        if trouble and save.work:
            self._clean(partial(self._places.remove, save.work))
        return trouble

    def _seal(self, save: _Save, parts: list[Facts]) -> str:
        table = {
            "version": VERSION,
            "step": save.mark.step,
            "position": save.mark.position,
            "top1_error": save.error,
            "files": {name: facts for part in parts for name, facts in part.items()},
        }
        try:
            text = json.dumps(table | self._about, indent=1) + "\n"
            name = self._places.seal(save.work, text.encode())
        except (OSError, DuetError) as error:
            return reason(error)
        self._errors[name] = save.error
        self._clean(partial(self._tidy, name))
        return ""

    def _tidy(self, name: str) -> None:
        """Remove what a new checkpoint makes superfluous."""
        names = self._places.list_complete()
        for old in select_superfluous(names, self._errors, name, self._keep, self._keep_best):
            self._places.remove(old)
        self._places.remove_unfinished(parse_step(name))

    def _clean(self, action: Callable[[], None] | None) -> None:
        """Have a thread remove something; None: wait until nothing is being removed."""
        if self._cleaning is not None:
            if not self._cleaning.wait(0.0 if action else PATIENCE):
                return  # the next time does it
            if self._cleaning.trouble:
                self._warn(f"{self._places.address} is not tidied ({self._cleaning.trouble})")
        self._cleaning = BackgroundTask(action) if action else None

    def _report(self, save: _Save, trouble: str, must: bool) -> None:
        where = f"{self._places.address} ({trouble})"
        if trouble and must:
            self._clean(None)
            raise SetupError(
                f"the checkpoint of step {save.mark.step} cannot be written to {where}; free some "
                f"space there, or bring the disk back: the same command goes on from step "
                f"{self._good}"
            )
        if not self._place.is_leader:
            return
        if not trouble:
            self._tell(Saved(save.mark.step, save.blocked))
        else:
            self._warn(
                f"the checkpoint of step {save.mark.step} cannot be written to {where}; training "
                f"goes on, the last one is of step {self._good}"
            )

    def _warn(self, text: str) -> None:
        self._tell(Warned(text))

    def close(self) -> None:
        """End this process's own writing, if there is any; no checkpoint comes of it."""
        self._stopped.set()
        for chore in (self._save.chore if self._save else None, self._cleaning):
            if chore is not None:
                chore.wait(PARTING)
        self._save = None


def select_superfluous(
    newest_first: list[str],
    errors: dict[str, float | None],
    new: str,
    keep: int,
    keep_best: int,
) -> list[str]:
    """Return which checkpoints to delete now that `new` is complete.

    Later ones are damaged: had they been sound, the run would have gone on from them. They must
    not count among those that stay.
    """
    later = [name for name in newest_first if parse_step(name) >= parse_step(new) and name != new]
    sound = [name for name in newest_first if name not in later]
    known = {name: error for name in sound if (error := errors.get(name)) is not None}
    best = sorted(known, key=lambda name: (known[name], -parse_step(name)))[:keep_best]
    return later + [name for name in sound[keep:] if name not in best]
