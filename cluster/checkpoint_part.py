"""What one process does for a checkpoint besides training: a copy at once, the rest in a thread."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.checkpoint.format import column_file
from cluster.checkpoint.storage import Places
from pipeline.tools.files import sha256

Facts = dict[str, dict[str, Any]]
"""Bytes and hash by file."""


class Chore:
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
    def alive(self) -> bool:
        """Whether it is still being done."""
        return self._thread.is_alive()

    def wait(self, seconds: float) -> bool:
        """Wait for its end, for a while; says whether it has come."""
        self._thread.join(seconds)
        return not self.alive


class Copies:
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
    places: Places, work: str, state: dict[str, Tensor], columns: tuple[int, ...],
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
        places.settle(work, name, path)
        facts[name] = found


def reason(error: BaseException) -> str:
    """An error in a few words."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or errno.errorcode.get(error.errno, str(error))
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
