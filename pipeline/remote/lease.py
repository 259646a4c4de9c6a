"""One build at a time at an address: an object that names the builder and is rewritten regularly.

All times are the store's own: the clocks of two machines may differ by more than `STALE`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import signal
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.remote.filesystem import StoreFolder
from pipeline.tools.errors import UsageError

BEAT = 20.0
"""Seconds between two writes of the lease."""
STALE = 120.0
"""Age of a lease in seconds from which on its holder counts as dead."""
SETTLE = 1.5
"""Seconds in which another process may take over the same lease at the same time."""


class Lease:
    """`with Lease(folder, name)`: this process is the one that builds.

    Raises:
        UsageError: on entry, another one is; on the way out, another one took over meanwhile.
    """

    def __init__(self, folder: StoreFolder, name: str) -> None:
        self._folder, self._name = folder, name
        self._mine = {
            "host": platform.node(),
            "pid": os.getpid(),
            "started": time.strftime("%F %T"),
            "machine": _machine(),
            "token": secrets.token_hex(8),
        }
        self._stop = threading.Event()
        self._lost = False
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        if not self._lost:
            self._folder.remove([self._name])
        elif kind is KeyboardInterrupt:  # by ourselves
            raise UsageError(
                f"{self._folder.address} was taken over by another build, since this one gave no "
                f"sign of life for {STALE:.0f} s; leave it to that one"
            ) from None

    def _take(self) -> None:
        if not self._create():
            holder = self._holder()
            if holder is None:  # it has just ended
                self._create()
            elif holder != self._mine:  # as it is after an answer that got lost
                self._refuse_if_alive(holder)
                self._write()
                time.sleep(SETTLE)
        holder = self._holder()
        if holder != self._mine:
            raise UsageError(self._taken(holder or {}, "just now"))

    def _create(self) -> bool:
        """Write the lease unless there is one: atomically if the store can, else nearly so."""

        def create(system: Any, path: str) -> bool:
            try:
                system.pipe_file(path, self._text(), mode="create")
            except FileExistsError:
                return False
            return True

        return self._folder.request(self._name, create, "written")

    def _refuse_if_alive(self, holder: dict[str, Any]) -> None:
        if holder.get("machine") == _machine() and not Path(f"/proc/{holder.get('pid')}").exists():
            return
        age = self._age()
        if age < STALE:
            raise UsageError(
                self._taken(holder, f"{age:.0f} s ago")
                + f", or run this again in {STALE - age:.0f} s if it was killed"
            )

    def _age(self) -> float:
        """Return the age of the lease in seconds; `STALE` if it was removed meanwhile."""

        def measure(system: Any, path: str) -> float:
            try:
                beat = system.modified(path)
            except FileNotFoundError:
                return STALE
            probe = f"{path}.{self._mine['token']}"
            system.pipe_file(probe, b"")
            try:
                return float((system.modified(probe) - beat).total_seconds())
            finally:
                system.rm_file(probe)

        return self._folder.request(self._name, measure, "written")

    def _renew(self) -> None:
        """Rewrite the lease regularly; interrupt the build when another process has taken it."""
        while not self._stop.wait(BEAT):
            with contextlib.suppress(Exception):  # the build itself reports a store that is down
                holder = self._holder()
                if holder == self._mine:
                    self._write()
                elif holder is not None:
                    self._lost = True
                    _interrupt()
                    return

    def _holder(self) -> dict[str, Any] | None:
        """Return what the lease says; nothing in it is certain. None if there is none."""
        try:
            found = json.loads(self._folder.read(self._name))
        except FileNotFoundError:
            return None
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    def _write(self) -> None:
        self._folder.request(
            self._name, lambda system, path: system.pipe_file(path, self._text()), "written"
        )

    def _text(self) -> bytes:
        return json.dumps(self._mine).encode()

    def _taken(self, holder: dict[str, Any], when: str) -> str:
        return (
            f"{self._folder.address} is being built by process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')} since {holder.get('started', '?')} (last sign of life "
            f"{when}); wait for it, or name another address"
        )


def _interrupt() -> None:
    """Raise KeyboardInterrupt in the main thread, by a signal that is not ignored there."""
    ours = callable(signal.getsignal(signal.SIGTERM))  # `errors.run`; a shell may ignore SIGINT
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGTERM if ours else signal.SIGINT)


def _machine() -> str:
    """Return a text that is the same for processes that see each other's process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return secrets.token_hex(8)
