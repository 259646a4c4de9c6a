"""A GPU without hardware: work that takes time on it, and events that mark places in that work."""

from __future__ import annotations

from typing import Any


class FakeDevice:
    """Device that computes what is launched, one after the other; the test moves the clock."""

    def __init__(self) -> None:
        self.now = 1.0
        """Seconds of the host's clock."""
        self.busy_until = 0.0
        """Time at which all launched work is done."""
        self.waits = 0
        """Number of times that the host waited for an event."""

    def launch(self, seconds: float) -> None:
        """Launch work that takes so long; the host goes on at once."""
        self.busy_until = max(self.now, self.busy_until) + seconds

    def synchronize(self) -> None:
        """Have the host wait for all work."""
        self.now = max(self.now, self.busy_until)

    def make_event(self, **settings: Any) -> FakeEvent:
        """Stand in for `torch.cuda.Event`."""
        return FakeEvent(self, **settings)


class FakeEvent:
    """Event of a fake device."""

    def __init__(
        self, device: FakeDevice, enable_timing: bool = False, blocking: bool = False
    ) -> None:
        self.device, self.enable_timing, self.blocking = device, enable_timing, blocking
        self.reached = float("nan")

    def record(self, stream: Any = None) -> None:
        """Mark the work launched so far."""
        self.reached = max(self.device.now, self.device.busy_until)

    def query(self) -> bool:
        """Return whether the work before the event is done."""
        return self.reached <= self.device.now

    def synchronize(self) -> None:
        """Have the host wait until the work before the event is done."""
        self.device.waits += 1
        self.device.now = max(self.device.now, self.reached)

    def elapsed_time(self, end: FakeEvent) -> float:
        """Return the milliseconds from this event to another; as in CUDA, both must be past."""
        if not (self.enable_timing and end.enable_timing):
            raise RuntimeError("an event was created without timing")
        if max(self.reached, end.reached) > self.device.now:
            raise RuntimeError("device not ready")
        return 1e3 * (end.reached - self.reached)
