"""The machine that is measured."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a figure depends on."""

    processor: str
    cores: int
    """That this process may use."""
    memory: int
    """Bytes."""
    gpu: str
    torch: str
    dali: str


def machine(gpu: bool) -> Machine:
    """This one."""
    import nvidia.dali

    return Machine(
        processor=_processor(),
        cores=cores(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu=torch.cuda.get_device_name() if gpu else "",
        torch=torch.__version__,
        dali=nvidia.dali.__version__,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines
                 if line.startswith("model name")), platform.processor())  # fmt: skip


def in_cores(count: int) -> str:
    """A number of cores in words."""
    return f"{count} core{'s' if count > 1 else ''}"


def in_threads(count: int) -> str:
    """A number of threads in words."""
    return f"{count} thread{'s' if count > 1 else ''}"


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes() -> int:
    """Bytes that the kernel could use to keep files: what is free, and what it keeps already."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
