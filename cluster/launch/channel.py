"""Messages between the driver of a run and its workers: a Ray actor and its two ends.

The actor belongs to the driver: it ends with the driver, and so do the workers.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.run.events import Event

POLL_EVERY = 0.5
"""Seconds between a worker's polls for a stop request."""
DRIVER_TIMEOUT = 60.0
"""Seconds without an answer after which a worker considers the driver lost."""


class _Box:
    """The actor: holds events and workers for the driver, and the stop request for the workers."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._workers: list[Any] = []
        self._stops = False

    def put(self, event: Event) -> None:
        self._events.append(event)

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def register(self, worker: Any) -> None:
        self._workers.append(worker)

    def take_workers(self) -> list[Any]:
        workers, self._workers = self._workers, []
        return workers

    def clear(self) -> None:
        self._events, self._stops = [], False

    def request_stop(self) -> None:
        self._stops = True

    def is_stopping(self) -> bool:
        return self._stops


class Channel:
    """The driver's end."""

    def __init__(self) -> None:
        """Start the actor, on the driver's node."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = ray.get_runtime_context().get_node_id()
        where = NodeAffinitySchedulingStrategy(here, soft=False)
        self._box = ray.remote(_Box).options(num_cpus=0, scheduling_strategy=where).remote()
        self.address = DriverAddress(self._box, here, os.getpid())

    def take(self) -> list[Event]:
        """Return the events that workers have sent since the last call."""
        import ray

        events: list[Event] = ray.get(self._box.take.remote())
        return events

    def take_workers(self) -> list[Any]:
        """Return the workers that have registered since the last call."""
        import ray

        workers: list[Any] = ray.get(self._box.take_workers.remote())
        return workers

    def clear(self) -> None:
        """Drop events and the stop request of the last start: to start an actor takes seconds."""
        self._box.clear.remote()

    def request_stop(self) -> None:
        """Have the workers save a checkpoint after their current step, and return."""
        self._box.request_stop.remote()


@dataclass(frozen=True)
class DriverAddress:
    """Address by which a worker reaches the driver; passed between processes."""

    box: Any
    node: str
    """Ray's id of the driver's node."""
    pid: int
    """Process id of the driver on that node."""

    def tell(self, event: Event) -> None:
        """Send an event without waiting."""
        self.box.put.remote(event)

    def tell_now(self, event: Event) -> None:
        """Send an event and wait until it has arrived."""
        import ray

        ray.get(self.box.put.remote(event), timeout=DRIVER_TIMEOUT)

    def register(self, worker: Any) -> None:
        """Tell the driver of a worker that is ready, a `worker.Registration`."""
        import ray

        ray.get(self.box.register.remote(worker), timeout=DRIVER_TIMEOUT)


class DriverWatch:
    """Watchdog: polls for a stop request; exits the worker when its driver is gone.

    A worker whose driver was killed must not write into a run that another driver has resumed. Ray
    ends it, too, but only after several seconds.
    """

    def __init__(self, address: DriverAddress) -> None:
        """Start the polling thread."""
        import ray

        self._address = address
        self._stopping = threading.Event()
        self.steps = 0
        """Number of calls of `is_stopping`: the loop makes one in each step."""
        # Another node may have a process with the same id.
        near = ray.get_runtime_context().get_node_id() == address.node
        self._driver = Path(f"/proc/{address.pid}") if near else None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def is_stopping(self) -> bool:
        """Return whether the driver has requested to save and stop."""
        self.steps += 1
        return self._stopping.is_set()

    def close(self) -> None:
        """End the polling thread."""
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        import ray
        from ray.exceptions import RayActorError

        heard = time.monotonic()
        while not self._stop.wait(POLL_EVERY):
            if self._driver is not None and not self._driver.exists():
                break
            try:
                if ray.get(self._address.box.is_stopping.remote(), timeout=POLL_EVERY * 10):
                    self._stopping.set()
                heard = time.monotonic()
            except RayActorError:
                break
            except Exception:  # no answer in time, or Ray is shutting down
                if time.monotonic() - heard > DRIVER_TIMEOUT and not self._stop.is_set():
                    break
        else:
            return
        with suppress(OSError):
            os.write(2, b"the driver of this run is gone; this worker ends\n")
        os._exit(1)
