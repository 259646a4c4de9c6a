"""Checkpoints written while training goes on.

`begin` copies what a column owns (the only time training stands still), a thread writes and hashes
the copy, and `finish`, some steps later, makes it a checkpoint when all columns are on the disk.
"""

from __future__ import annotations

import errno
import json
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.checkpoint import (
    VERSION,
    Found,
    column_file,
    fetched,
    first_sound,
    load,
    read_table,
    state_of,
)
from cluster.checkpoint_places import Places, places_of, step_in
from cluster.events import Saved, Tell, Warned
from cluster.place import Place
from cluster.run_folder import Mark, last_step
from model.alexnet import AlexNet
from model.optim import Sgd2012
from pipeline.errors import DataError, DuetError, SetupError
from pipeline.files import sha256

Facts = dict[str, dict[str, Any]]
"""Bytes and hash by file."""


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
    thread: threading.Thread | None = None
    blocked: float = 0.0
    """Seconds for which training stood still."""


class Checkpoints:
    """The checkpoints of a run, as the processes of a job write and read them together.

        checkpoints.begin(mark, net, optimiser)
        ...                                   # steps
        if checkpoints.pending and nobody is busy:
            checkpoints.finish()
        ...
        checkpoints.finish(must=True)

    A save that fails is a warning: the next one may be luckier. Only where it `must` be is it an
    error.
    """

    def __init__(
        self, run: Path, place: Place, about: dict[str, Any], tell: Tell, *,
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
        """
        self._places: Places = places_of(run, store)
        self._run = run
        self._place, self._about, self._tell = place, about, tell
        self.before: Callable[[], None] = lambda: None
        """The leader calls it before a checkpoint counts; what it raises makes it a failed save."""
        self.alongside: Callable[[], None] = lambda: None
        """Likewise, in the thread that writes."""
        self._keep, self._keep_best = keep, keep_best
        self._save: _Save | None = None
        self._good = 0
        """Step of the last complete one."""
        self._errors: dict[str, float | None] = {}
        """Validation errors of the complete ones, by name."""
        self._copies: dict[str, Tensor] = {}

    def resume(self, net: AlexNet, optimiser: Sgd2012) -> Mark:
        """Load the newest complete checkpoint, if there is one; all processes call it.

        Damaged ones are named in a warning and passed over.

        Raises:
            DataError: there are some, and none is sound.
        """
        found, names, trouble = self._place.share(
            self._look() if self._place.leads else (None, [], "")
        )
        if trouble:
            raise SetupError(trouble)
        if found is None and names:
            raise DataError(
                f"no checkpoint in {self._places.address} is sound; restore one, "
                "or name another --run to start over"
            )
        if found is None:
            return Mark()
        path = found.path
        if not self._place.leads:
            table = read_table(self._places, found.name)
            files = [column_file(column) for column in net.columns]
            path = fetched(self._places, found.name, table, files)
        load(path, net, optimiser)
        self._good = found.mark.step
        return found.mark

    def _look(self) -> tuple[Found | None, list[str], str]:
        """Find the newest sound one, and the names of all; the leader's."""
        try:
            names = self._places.sealed()
            before = last_step(self._run)
            if not names and before:
                # To begin at step 0 would throw away what is only out of reach.
                return (
                    None,
                    [],
                    (
                        f"{self._places.address} holds no checkpoint, but the run had one of step "
                        f"{before}; bring its disk back, or name another --run to start over"
                    ),
                )
            self._places.tidy()
        except (OSError, DuetError) as error:
            return None, [], f"{self._places.address} cannot be read ({reason(error)})"
        for name in names:
            try:
                self._errors[name] = read_table(self._places, name).get("top1_error")
            except (OSError, ValueError, KeyError, TypeError, DuetError):
                self._errors[name] = None
        found = first_sound(self._places, names, self._tell)
        return replace(found, places=None) if found else None, names, ""

    @property
    def busy(self) -> bool:
        """Whether this process still writes."""
        return self._save is not None and alive(self._save.thread)

    @property
    def pending(self) -> bool:
        """Whether a save was begun and not finished; the same on all processes."""
        return self._save is not None

    def begin(
        self, mark: Mark, net: AlexNet, optimiser: Sgd2012, error: float | None = None
    ) -> None:
        """Copy the state and begin to write it; all processes call it, those of replica 0 write.

        Args:
            mark: the step that was made.
            net: the columns here.
            optimiser: its velocities.
            error: top-1 validation error, 0 to 1, if it was just measured.
        """
        start = time.monotonic()
        if self._save is not None:
            self.finish()
        work, trouble = self._place.share(self._open(mark) if self._place.leads else ("", ""))
        self._save = save = _Save(mark, error, work, trouble)
        if not trouble and self._place.replica == 0:
            state = self._copied(state_of(net, optimiser))
            save.thread = threading.Thread(
                target=self._write, args=(save, state, net.columns), daemon=True
            )
            save.thread.start()
        save.blocked = time.monotonic() - start

    def _open(self, mark: Mark) -> tuple[str, str]:
        try:
            return self._places.begin(mark.step, secrets.token_hex(4)), ""
        except (OSError, DuetError) as error:
            return "", reason(error)

    def _copied(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors into memory that is kept from save to save."""
        for key, tensor in state.items():
            if key not in self._copies:
                pinned = tensor.is_cuda
                self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._copies[key].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in state.values()):
            torch.cuda.current_stream().synchronize()
        return self._copies

    def _write(self, save: _Save, state: dict[str, Tensor], columns: tuple[int, ...]) -> None:
        """The thread: write, hash, bring to its place. Nothing collective is called here."""
        try:
            for column in columns:
                name = column_file(column)
                own = {key: t for key, t in state.items() if key.split("/")[1][0] == "ab"[column]}
                path = self._places.write(save.work, name, partial(save_file, own))
                facts = {"bytes": path.stat().st_size, "sha256": sha256(path)}
                self._places.settle(save.work, name, path)
                save.files[name] = facts
            if self._place.leads:
                self.alongside()
        except Exception as error:
            save.trouble = reason(error)

    def finish(self, *, must: bool = False) -> None:
        """Wait for all parts and make them a checkpoint; all processes call it.

        Without a save under way this does nothing.

        Raises:
            SetupError: it has failed, and `must` not.
        """
        save, start = self._save, time.monotonic()
        if save is None:
            return
        self._save = None
        if save.thread is not None:
            save.thread.join()
        parts = self._place.gather((save.files, save.trouble))
        trouble = next((words for _, words in parts if words), "")
        files = {name: facts for part, _ in parts for name, facts in part.items()}
        if self._place.leads:
            trouble = trouble or self._seal(save, files)
            if trouble and save.work:
                self._remove(save.work)
            save.blocked += time.monotonic() - start
            self._report(save, trouble, must)
        trouble = self._place.share(trouble)
        if not trouble:
            self._good = save.mark.step
        elif must:
            raise SetupError(
                f"the checkpoint of step {save.mark.step} cannot be written to "
                f"{self._places.address} ({trouble}); mend that, and the same command goes on "
                f"from step {self._good}"
            )

    def _report(self, save: _Save, trouble: str, must: bool) -> None:
        if not trouble:
            self._tell(Saved(save.mark.step, save.blocked))
        elif not must:
            self._tell(
                Warned(
                    f"the checkpoint of step {save.mark.step} cannot be written to "
                    f"{self._places.address} ({trouble}); training goes on, the last one is of "
                    f"step {self._good}"
                )
            )

    def _seal(self, save: _Save, files: Facts) -> str:
        """Make it a checkpoint, and remove those that are not needed any more; the leader's.

        Returns:
            why it has failed, or nothing.
        """
        table = {
            "version": VERSION,
            "step": save.mark.step,
            "position": save.mark.position,
            "top1_error": save.error,
            "files": files,
        }
        try:
            self.before()
            text = json.dumps(table | self._about, indent=1) + "\n"
            name = self._places.seal(save.work, text.encode())
        except (OSError, DuetError) as error:
            return reason(error)
        self._errors[name] = save.error
        try:
            names = self._places.sealed()
        except (OSError, DuetError):
            return ""  # another time
        for old in superfluous(names, self._errors, save.mark.step, self._keep, self._keep_best):
            self._remove(old)
        return ""

    def _remove(self, name: str) -> None:
        try:
            self._places.remove(name)
        except (OSError, DuetError) as error:
            self._tell(Warned(f"{self._places.address}/{name} cannot be removed ({reason(error)})"))

    def close(self) -> None:
        """Wait for this process's own writing, if there is any; no checkpoint comes of it."""
        if self._save is not None and self._save.thread is not None:
            self._save.thread.join()
        self._save = None


def superfluous(
    newest_first: list[str],
    errors: dict[str, float | None],
    step: int,
    keep: int,
    keep_best: int,
) -> list[str]:
    """Return which checkpoints to delete now that the one of `step` is complete.

    Later ones are damaged: had they been sound, the run would have gone on from them. They must
    not count among those that stay.
    """
    later = [name for name in newest_first if step_in(name) > step]
    sound = [name for name in newest_first if step_in(name) <= step]
    known = {name: error for name in sound if (error := errors.get(name)) is not None}
    best = sorted(known, key=lambda name: (known[name], -step_in(name)))[:keep_best]
    return later + [name for name in sound[keep:] if name not in best]


def alive(thread: threading.Thread | None) -> bool:
    """Whether a thread runs."""
    return thread is not None and thread.is_alive()


def reason(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or errno.errorcode.get(error.errno, str(error))
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
