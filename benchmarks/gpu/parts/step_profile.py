"""Profile of some training steps: share of time that a GPU is busy, launches, kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Span = tuple[float, float]
"""Start and end, microseconds."""

LAUNCHES = (
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cudaLaunchCooperativeKernel", "cuLaunchKernel",
    "cuLaunchKernelEx", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync",
)  # fmt: skip
"""Calls of the CUDA runtime and driver that give a GPU work."""
TOP = 20
"""Operations that are listed."""


class StepProfile:
    """Profile of the work that a device does between `start` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        """Load the profiler of the device: the first one takes seconds to start."""
        self._device = device
        kinds = [ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        with profile(activities=kinds):
            torch.zeros(1, device=device)
        self._profile = profile(activities=kinds)

    def start(self) -> None:
        """Begin, when the device has done all that was launched."""
        self._wait()
        self._profile.start()

    def stop(self) -> None:
        """Wait for the device, and end."""
        self._wait()
        self._profile.stop()

    def summarize(self, steps: int, step_seconds: float) -> dict[str, Any]:
        """Return the figures of the profile.

        Args:
            steps: number of steps that were profiled.
            step_seconds: median seconds of a step that is not profiled.

        Returns:
            launches: calls that give a GPU work, a step; on a CPU operations of torch, those that
                others call included.
            top: operations by their share of the device's time.
            On a GPU, too: kernels: pieces of work of the GPU, a step. gpu_ms: milliseconds of a
            step in which at least one of them runs. gpu_busy: those of the time of a step that is
            not profiled. gpu_busy_profiled: those of the profiled time; profiling slows the host.
        """
        events = self._profile.events() or []
        names = Counter(event.name for event in events)
        cuda = self._device.type == "cuda"
        attribute = "self_device_time_total" if cuda else "self_cpu_time_total"
        rows = sorted(
            ((getattr(row, attribute), row.key) for row in self._profile.key_averages()),
            reverse=True,
        )
        total = sum(spent for spent, _ in rows) or 1.0
        top = [{"share": spent / total, "operation": key[:90]} for spent, key in rows[:TOP]]
        if not cuda:
            called = sum(count for name, count in names.items() if name.startswith("aten::"))
            return {"steps": steps, "launches": called / steps, "top": top}
        spans = [
            (event.time_range.start, event.time_range.end)
            for event in events
            if event.device_type == torch.autograd.DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
        ]
        return {
            "steps": steps,
            "launches": sum(names[name] for name in LAUNCHES) / steps,
            **measure_busy(spans, steps, step_seconds),
            "top": top,
        }

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


class ProfiledSteps(StepProfile):
    """Function for `is_stopping` of `train`, asked once a step: profiles some, then stops the run.

    Args:
        device: device of the training.
        before: steps before those that are profiled.
        count: steps to profile.
    """

    def __init__(self, device: torch.device, before: int, count: int) -> None:
        super().__init__(device)
        self._begin, self._end, self._steps = before + 1, before + count + 1, 0

    def __call__(self) -> bool:
        """Count a step that begins; return whether it is the last."""
        self._steps += 1
        if self._steps == self._begin:
            self.start()
        elif self._steps == self._end:
            self.stop()
        return self._steps == self._end


def measure_busy(spans: Iterable[Span], steps: int, step_seconds: float) -> dict[str, float]:
    """Return how long a GPU works in a step; spans that overlap count once.

    Args:
        spans: start and end of each kernel and copy of some steps.
        steps: number of the steps.
        step_seconds: seconds of a step that is not profiled.
    """
    ordered = sorted(spans)
    if not ordered:
        return {"kernels": 0.0, "gpu_ms": 0.0, "gpu_busy": 0.0, "gpu_busy_profiled": 0.0}
    busy, edge = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, edge))
        edge = max(edge, end)
    return {
        "kernels": len(ordered) / steps,
        "gpu_ms": busy / steps / 1e3,
        "gpu_busy": busy / steps / 1e6 / step_seconds,
        "gpu_busy_profiled": busy / (edge - ordered[0][0]),
    }
