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
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.tools.errors import UsageError

BEAT = 20.0
"""Seconds between two writes of the lease."""
STALE = 120.0
"""Age of a lease in seconds from which on its holder counts as dead."""
SETTLE = 1.5
"""Seconds in which another process may take over the same lease at the same time."""

Request = Callable[..., Any]
"""`StoreTarget.request`."""


class Lease:
    """`with Claim(...)`: this process is the one that builds.

    Raises:
        UsageError: on entry, another one is; on the way out, another one took over meanwhile.
    """

    def __init__(self, request: Request, name: str, address: str) -> None:
        self._request, self._name, self._address = request, name, address
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
            self._request(self._name, _remove, "removed")
        elif kind is KeyboardInterrupt:  # by ourselves
            raise UsageError(
                f"{self._address} was taken over by another build, since this one gave no sign of "
                f"life for {STALE:.0f} s; leave it to that one"
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

        return bool(self._request(self._name, create, "written"))

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
        probe = f"{self._name}.{self._mine['token']}"

        def now(system: Any, path: str) -> Any:
            system.pipe_file(path, b"")
            try:
                return system.modified(path)
            finally:
                system.rm_file(path)

        def last(system: Any, path: str) -> Any:
            with contextlib.suppress(FileNotFoundError):
                return system.modified(path)
            return None

        beat = self._request(self._name, last)
        if beat is None:
            return STALE
        return float((self._request(probe, now, "written") - beat).total_seconds())

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

        def read(system: Any, path: str) -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return bytes(system.cat_file(path))
            return None

        text = self._request(self._name, read)
        try:
            found = json.loads(text) if text is not None else None
        except ValueError:
            return {}
        return found if isinstance(found, dict) or found is None else {}

    def _write(self) -> None:
        self._request(
            self._name, lambda system, path: system.pipe_file(path, self._text()), "written"
        )

    def _text(self) -> bytes:
        return json.dumps(self._mine).encode()

    def _taken(self, holder: dict[str, Any], when: str) -> str:
        return (
            f"{self._address} is being built by process {holder.get('pid', '?')} on "
            f"{holder.get('host', '?')} since {holder.get('started', '?')} (last sign of life "
            f"{when}); wait for it, or name another address"
        )


def _interrupt() -> None:
    """Raise KeyboardInterrupt in the main thread, by a signal that is not ignored there."""
    ours = callable(signal.getsignal(signal.SIGTERM))  # `errors.run`; a shell may ignore SIGINT
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGTERM if ours else signal.SIGINT)


def _remove(system: Any, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        system.rm_file(path)


def _machine() -> str:
    """Return a text that is the same for processes that see each other's process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return secrets.token_hex(8)
