"""One build, or one training, at a time in a folder or at an address.

A folder is locked by `flock`, which the kernel frees when the process ends, however it ends. A
store, and a file system without flock, has a lease: an object that names its holder and is
rewritten every `BEAT` seconds. It is stale, and the next process takes it over, when its holder
was a process of this machine and has ended, or has not rewritten it for `STALE` seconds. All times
are the store's own: the clocks of two machines may differ by more than that.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.remote.filesystem import StoreError, StoreFolder
from pipeline.tools.errors import UsageError
from pipeline.tools.files import NoLocks, try_lock, unlock
from pipeline.tools.jsonl import parse_json

BEAT = 20.0
"""Seconds between two writes of the lease."""
STALE = 120.0
"""Age of a lease in seconds from which on its holder counts as dead."""
POLL = 3.0
"""Seconds between two looks at a lease whose end is waited for."""
SETTLE = 1.5
"""Seconds in which another process may take over the same lease at the same time."""

Holder = dict[str, Any]
"""Process that holds a lock or a lease, as the file says; nothing in it is certain."""


@contextlib.contextmanager
def lock_folder(folder: Path, name: str, work: str, owner: str = "") -> Iterator[None]:
    """Lock a folder of this machine against other processes, by its file `name`.

    Args:
        folder: the folder; it exists.
        name: file of the lock; it says who holds it, and stays.
        work: kind of the work ("build", "training"), for messages.
        owner: name of the work ("run first-3f9c"), for messages and for its own next process.

    Raises:
        UsageError: another process holds it; names that.
    """
    path = folder / name
    try:
        lock = try_lock(path)
    except NoLocks:
        with Lease(StoreFolder(f"file://{folder}"), f"{name}.lease", work, owner):
            yield
        return
    if lock is None:
        raise UsageError(f"{folder} {_format_taken(_parse_holder(_read(path)), work)}")
    try:
        with contextlib.suppress(OSError):  # on a full disk it is held without a name
            path.write_text(json.dumps(_describe_process(owner)), encoding="utf-8")
        yield
    finally:
        unlock(lock)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _describe_process(owner: str) -> Holder:
    return {
        "owner": owner,
        "host": platform.node(),
        "pid": os.getpid(),
        "started": time.strftime("%F %T"),
        "machine": _machine(),
        "token": secrets.token_hex(8),
    }


def _parse_holder(text: bytes) -> Holder:
    try:
        found = parse_json(text)
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}


def _format_taken(holder: Holder, work: str, sign: str = "") -> str:
    owner = f"{holder['owner']}, " if holder.get("owner") else ""
    return (
        f"is in use by another {work} ({owner}process {holder.get('pid', '?')} on "
        f"{holder.get('host', '?')} since {holder.get('started', '?')}{sign}); wait for it, or "
        "name another"
    )


class Lease:
    """`with Lease(folder, name, "build")`: this process is the one that builds.

    Raises:
        UsageError: on entry, another one is; on the way out, another one took over meanwhile.
    """

    def __init__(
        self, folder: StoreFolder, name: str, work: str, owner: str = "",
        say: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        """Prepare the lease; nothing is written.

        Args:
            folder: folder of the object.
            name: its name there.
            work: kind of the work, for messages.
            owner: name of the work. A lease of the same owner on another machine is waited for
                until it is stale, instead of refused: its machine has probably gone.
            say: gets a line before such a wait.
        """
        self._folder, self._name, self._work, self._say = folder, name, work, say
        self._mine = _describe_process(owner)
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
            with contextlib.suppress(StoreError):  # it is stale soon
                self._folder.remove([self._name])
        elif kind is None or issubclass(kind, KeyboardInterrupt):  # by ourselves
            raise UsageError(
                f"{self._folder.address} was taken over by another {self._work}, since this one "
                f"gave no sign of life for {STALE:.0f} s; leave it to that one"
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
            raise UsageError(self._taken(holder or {}))

    def _create(self) -> bool:
        """Write the lease unless there is one: atomically if the store can, else nearly so."""

        def create(system: Any, path: str) -> bool:
            try:
                if "file" in system.protocol:  # `pipe_file` would only look first
                    with system.open(path, "xb") as file:
                        file.write(self._text())
                else:
                    system.pipe_file(path, self._text(), mode="create")
            except FileExistsError:
                return False
            return True

        return self._folder.request(self._name, create, "written")

    def _refuse_if_alive(self, holder: Holder) -> None:
        """Return when the lease is stale.

        Raises:
            UsageError: it is not.
        """
        is_near = holder.get("machine") == _machine()
        if is_near and not Path(f"/proc/{holder.get('pid')}").exists():
            return
        age = before = self._age()
        is_own = bool(self._mine["owner"]) and holder.get("owner") == self._mine["owner"]
        if age < STALE and (is_near or not is_own):
            raise UsageError(
                self._taken(holder, f", last sign of life {age:.0f} s ago")
                + f", or run this again in {STALE - age:.0f} s if it was killed"
            )
        if age < STALE and self._say is not None:
            where = f"{self._folder.address} is held for this run on {holder.get('host', '?')}"
            self._say(f"{where}; waiting {STALE - age:.0f} s for a sign of life from there")
        while before <= age < STALE:
            time.sleep(POLL)
            before, age = age, self._age()
        if age < STALE:
            raise UsageError(self._taken(holder, ", which has just given a sign of life"))

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

    def _holder(self) -> Holder | None:
        """Return what the lease says; None if there is none."""
        try:
            return _parse_holder(self._folder.read(self._name))
        except FileNotFoundError:
            return None

    def _write(self) -> None:
        self._folder.request(
            self._name, lambda system, path: system.pipe_file(path, self._text()), "written"
        )

    def _text(self) -> bytes:
        return json.dumps(self._mine).encode()

    def _taken(self, holder: Holder, sign: str = "") -> str:
        return f"{self._folder.address} {_format_taken(holder, self._work, sign)}"


def _interrupt() -> None:
    """Raise KeyboardInterrupt in the main thread, by a signal that does so there.

    A shell may have SIGINT ignored, and `ray.init` has SIGTERM end the process without a word.
    """
    raising = signal.getsignal(signal.SIGTERM) == signal.default_int_handler  # by `errors.run`
    main = threading.main_thread().ident
    if main is not None:
        signal.pthread_kill(main, signal.SIGTERM if raising else signal.SIGINT)


def _machine() -> str:
    """Return a text that is the same for processes that see each other's process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return secrets.token_hex(8)
