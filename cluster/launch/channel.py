"""What the driver of a run and its workers say to each other: a Ray actor, and its two ends.

The actor belongs to the driver: it goes when the driver goes, and so do the workers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.run.events import Event

LOOK = 0.5
"""Seconds between a worker's looks whether to end."""
SILENCE = 60.0
"""Seconds without an answer after which a worker takes the driver for lost."""


class _Box:
    """The actor: events on their way to the driver, and whether the run should end."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._end = False

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def end(self) -> None:
        self._end = True

    def ends(self) -> bool:
        return self._end


class Channel:
    """The driver's end."""

    def __init__(self) -> None:
        """Start the actor, on the driver's node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        self._box = (
            ray.remote(_Box)
            .options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote()
        )
        self.address = DriverAddress(self._box, here, os.getpid())

    def take(self) -> list[Event]:
        """What the workers have told since the last call."""
        import ray

        events: list[Event] = ray.get(self._box.take.remote())
        return events

    def ask_to_end(self) -> None:
        """Have the workers save after the step they are at, and return."""
        self._box.end.remote()


@dataclass(frozen=True)
class DriverAddress:
    """What a worker needs to reach the driver. Travels between processes."""

    box: Any
    node: str
    """Ray's id of the driver's node."""
    pid: int
    """Of the driver there."""

    def tell(self, event: Event) -> None:
        """Send an event off."""
        self.box.put.remote(event)

    def tell_now(self, event: Event) -> None:
        """Send an event and wait until it is there."""
        import ray

        ray.get(self.box.put.remote(event), timeout=SILENCE)


class DriverWatch:
    """A worker's eye on its driver: `ending` says whether to end; without a driver it exits.

    A worker whose driver was killed must not go on writing into a run that somebody else has begun
    again. Ray ends it, too, but only after several seconds.
    """

    def __init__(self, address: DriverAddress, lost: Callable[[], None] | None = None) -> None:
        """Begin to look, in a thread; `lost` is called if the driver is gone (default: exit)."""
        import ray

        self._address = address
        self._lost = lost or _leave
        self._ends = threading.Event()
        # Another node may have a process of the same number.
        near = ray.get_runtime_context().get_node_id() == address.node
        self._driver = Path(f"/proc/{address.pid}") if near else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def is_stopping(self) -> bool:
        """Whether the driver wants the run to save and end."""
        return self._ends.is_set()

    def close(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        import ray
        from ray.exceptions import RayActorError

        heard = time.monotonic()
        while not self._stop.wait(LOOK):
            if self._driver is not None and not self._driver.exists():
                return self._lost()
            try:
                if ray.get(self._address.box.ends.remote(), timeout=LOOK * 10):
                    self._ends.set()
                heard = time.monotonic()
            except RayActorError:
                return self._lost()
            except Exception:  # no answer in time, or Ray is going, and so are we
                if time.monotonic() - heard > SILENCE and not self._stop.is_set():
                    return self._lost()
        return None


def _leave() -> None:
    with suppress(OSError):
        os.write(2, b"the driver of this run is gone; this worker ends\n")
    os._exit(1)
