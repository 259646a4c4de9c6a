"""Sizes in bytes as people write them; the CPU and the number of its usable cores."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

from pipeline.tools.errors import UsageError

_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<prefix>[kmgtp]?)(?P<binary>i?)b?\s*", re.I)


def cpu_count() -> int:
    """Return the number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def cpu_name() -> str:
    """Return the model of the CPU, or its architecture where the system does not tell."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if found := [line for line in lines if line.startswith("model name")]:
            return found[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def parse_size(text: str) -> int:
    """Return the bytes that `100GB`, `1.5TiB`, `500 MB` or `1000000` mean.

    Raises:
        UsageError: it is none of these, or nothing.
    """
    match = _SIZE.fullmatch(text)
    if match is None or (match["binary"] and not match["prefix"]):
        raise UsageError(f"size {text!r} cannot be read; give one such as 500MB, 100GB or 1.5TiB")
    base = 1024 if match["binary"] else 1000
    power = " kmgtp".index(match["prefix"].lower() or " ")
    size = int(float(match["number"]) * base**power)
    if size < 1:
        raise UsageError(f"size {text!r} is not positive; give one such as 500MB or 100GB")
    return size
