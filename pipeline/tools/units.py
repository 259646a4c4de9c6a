"""Sizes in bytes as people write them; CPU, cores and memory that this process may use."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pipeline.tools.errors import UsageError
from pipeline.tools.files import read_text

CGROUPS = Path("/sys/fs/cgroup")
"""Mount point of control groups: version 2, or 1 with a folder for each controller."""
OWN_CGROUPS = Path("/proc/self/cgroup")
"""File that lists the control groups of this process."""
CACHE_SIZE = 100 * 10**9
"""Default size limit in bytes of the cache of data sets in a store."""
CACHE_SIZE_FLAG = f"{CACHE_SIZE // 10**9}GB"
"""The same as a flag has it."""
MAX_BYTES = 2**63
"""Bytes that no size reaches."""
_SIZE = re.compile(r"\s*(?P<number>\d+(\.\d+)?)\s*(?P<prefix>[kmgtp]?)(?P<binary>i?)b?\s*", re.I)


def cpu_count() -> int:
    """Return the number of CPU cores that this process may keep busy.

    Those that it may run on, at most the quota of a container, rounded down.
    """
    allowed, quota = len(os.sched_getaffinity(0)), read_cpu_quota()
    return allowed if quota is None else min(allowed, max(1, int(quota)))


def available_memory() -> int:
    """Return the bytes of memory that this process may take, in use by the page cache or not."""
    free, left = free_memory(), read_memory_left()
    return free if left is None else min(free, left)


def free_memory() -> int:
    """Return the bytes of memory of this machine that no process holds, page cache included."""
    # sysconf's SC_AVPHYS_PAGES would leave out the page cache, which the kernel gives back.
    found = re.search(r"^MemAvailable: +(\d+) kB", read_text(Path("/proc/meminfo")), re.MULTILINE)
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(found[1]) * 1024 if found else physical


def read_cpu_quota(root: Path | None = None, own: Path | None = None) -> float | None:
    """Return the number of cores that control groups allow this process; None: no limit."""
    quotas = []
    for controller, group in _list_cgroups(root, own):
        if not controller:
            whole, _, period = read_text(group / "cpu.max").partition(" ")
        elif controller == "cpu":
            whole, period = (read_text(group / f"cpu.cfs_{x}_us") for x in ("quota", "period"))
        else:
            continue
        if whole.isdecimal() and period.isdecimal() and int(whole) and int(period):
            quotas.append(int(whole) / int(period))
    return min(quotas, default=None)


def read_memory_left(root: Path | None = None, own: Path | None = None) -> int | None:
    """Return the bytes of memory that control groups leave this process; None: no limit."""
    left = []
    for controller, group in _list_cgroups(root, own):
        if not controller:
            limit, used, cache = "memory.max", "memory.current", "inactive_file"
        elif controller == "memory":
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        most, now = read_text(group / limit), read_text(group / used)
        if most.isdecimal() and now.isdecimal() and int(most) < 2**60:  # 2**63 means no limit
            found = re.search(rf"^{cache} (\d+)$", read_text(group / "memory.stat"), re.MULTILINE)
            left.append(max(0, int(most) - int(now) + (int(found[1]) if found else 0)))
    return min(left, default=None)


def _list_cgroups(root: Path | None, own: Path | None) -> Iterator[tuple[str, Path]]:
    """Yield the folders of the control groups of a process, and of those around them.

    Each with its controller (`cpu`, `memory`); empty in version 2, where a folder is for all.
    """
    root, own = root or CGROUPS, own or OWN_CGROUPS
    for line in read_text(own).splitlines():
        _, names, path = line.split(":", 2)
        for folder in (Path(path), *Path(path).parents):
            below = str(folder).lstrip("/")
            if not names:
                yield "", root / below
            for name in filter(None, names.split(",")):
                # Version 1 mounts cpu and cpuacct together; not every system has a link for each.
                yield from ((name, root / mount / below) for mount in {name, names})


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
    size = float(match["number"]) * base**power
    if not 1 <= size < MAX_BYTES:
        raise UsageError(f"size {text!r:.60} is out of range; give one such as 500MB or 100GB")
    return int(size)
