"""Facts about the machine, and readings of its GPU.

python -m parts.machine [gpu|cpu]      in benchmarks/gpu: prints the facts
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pipeline.tools.units import cpu_count, cpu_name

DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
CODEC = ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12", "nvidia-nvjpeg")
LIBRARIES = (*DALI, *CODEC, "isal", "numpy", "triton", "pytest")
LATER = ("nvidia.dali", "isal", "tyro", "safetensors", "fsspec", "rich", "hypothesis", "xdist")
"""Modules that phases 4 to 7 of `first.sh` import and the phases before them do not."""
COPIED = 256 * 2**20
"""Bytes that are copied to see how fast the way to the GPU is."""
LOOKS = 0.25
"""Seconds between two looks at the GPU."""


def facts(device: str) -> dict[str, Any]:
    """Return names and versions of all that matters."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "device": device,
        "cpu": cpu_name(),
        "cores": cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _run("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
    }
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "gpu":
        query = "--query-gpu=driver_version,clocks.max.sm,power.limit"
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "driver, clock, power": _run("nvidia-smi", query, "--format=csv,noheader"),
            "gpu_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "to_gpu_gb_s": {"pinned": _measure_copy(True), "pageable": _measure_copy(False)},
        }
    return found


class Gauge:
    """Readings of a GPU by its driver during a window; none without `nvidia-ml-py`."""

    def __init__(self) -> None:
        self._nvml: Any = None
        try:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._gpu = self._nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        except Exception:  # an old driver, or none of its libraries: no looks then
            self._nvml = None
        self.reset()

    def reset(self) -> None:
        """Drop all readings."""
        self._seen: dict[str, list[float]] = {}
        self._next = time.perf_counter() + LOOKS

    def look(self) -> None:
        """Read the values if the last reading is some time ago."""
        if self._nvml is None or time.perf_counter() < self._next:
            return
        self._next += LOOKS
        nvml, gpu = self._nvml, self._gpu
        readings: dict[str, Callable[[], float]] = {
            "gpu_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
            "jpeg_percent": lambda: nvml.nvmlDeviceGetJpgUtilization(gpu)[0],
            "clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        }
        for name, read in readings.items():
            try:
                self._seen.setdefault(name, []).append(read())
            except Exception:  # not every GPU and driver knows each of them
                self._seen.pop(name, None)

    def read(self) -> dict[str, float]:
        """Return the medians."""
        return {name: statistics.median(values) for name, values in self._seen.items()}


def _measure_copy(pinned: bool) -> float:
    source = torch.ones(COPIED, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty_like(source, device="cuda")
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return round(COPIED / statistics.median(times) / 1e9, 1)


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0]


def main() -> int:
    """Print the facts, what `nvidia-smi` says, and what is missing here."""
    device = sys.argv[1] if len(sys.argv) > 1 else "gpu"
    if device == "gpu":
        with suppress(OSError):  # there is none
            subprocess.run(["nvidia-smi"], timeout=20, check=False)
    if device == "gpu" and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} sees no GPU")
        return 3
    found = facts(device) | {
        "C compiler, for Triton": shutil.which("cc") or shutil.which("gcc") or "none",
        "missing for phases 4 to 7": ", ".join(filter(_is_missing, LATER)) or "nothing",
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    if device == "gpu":
        print(f"figure: {found['gpu']}, {found['driver, clock, power']}, torch {found['torch']}")
    else:
        print(f"figure: {found['cpu']}, {found['cores']} cores, torch {found['torch']}")
    return 0


def _is_missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ImportError:  # nor is its package there
        return True


if __name__ == "__main__":
    sys.exit(main())
