"""Cores, memory, limits and the compiler of this machine; its GPUs are in `gpus`."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.finding import GB, Finding, fail, ok, warn

FILES = 4096
"""Open files that a worker with a large set of shards, and Ray beside it, may need."""
SHARED = 2 * GB
"""Bytes of /dev/shm below which NCCL and Ray's object store get into trouble."""
TEMPORARY = 2 * GB
"""Bytes of the temporary folder for Ray's logs and what is on its way to a store."""
FULL = 0.95
"""Of a disk, beyond which Ray's object store refuses to spill."""
SOCKET = 107
"""Most bytes in the path of a Unix socket (sun_path in unix(7), less the closing zero)."""
RAY_BELOW = len("/duet-12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""What Ray adds to the temporary folder for the longest of its sockets."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What this machine has."""

    gpus: int = 0
    cores: int = 1
    """That this process may use, a container's quota taken into account."""
    quota: bool = False
    """A container's quota is what limits them."""
    memory: int = 0
    """Bytes available now, a container's limit taken into account."""
    limited: bool = False
    """A container's limit is what counts."""
    shared: int = 0
    """Bytes free in /dev/shm."""
    files: int = 0
    """Open files that a process may have."""
    locked: int = -1
    """Bytes of memory that a process may lock; -1: any number."""
    infiniband: bool = False
    temporary: str = "/tmp"
    temporary_free: int = 0
    temporary_full: float = 0.0
    """Used share of its disk."""
    vectors: str = ""
    """AVX512, AVX2, ... as torch calls it."""
    matrix_units: bool = False
    """AMX."""
    kernels: str = ""
    """What computes the normalisation on the CPU, in words; empty: no matter."""


def gather(gpus: int) -> Hardware:
    """Look; the first time on a machine this compiles the kernels, some three seconds."""
    import torch

    from cluster.training.precision import compute_dtype
    from model.norm.response import backend

    allowed = len(os.sched_getaffinity(0))
    bytes_left, quota = container(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    available = _available(Path("/proc/meminfo"))
    temporary = tempfile.gettempdir()
    disk = shutil.disk_usage(temporary)
    shared = Path("/dev/shm")
    return Hardware(
        gpus=gpus,
        cores=allowed if quota is None else min(allowed, max(1, int(quota))),
        quota=quota is not None and quota < allowed,
        memory=available if bytes_left is None else min(available, bytes_left),
        limited=bytes_left is not None and bytes_left < available,
        shared=shutil.disk_usage(shared).free if shared.exists() else 0,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        temporary=temporary,
        temporary_free=disk.free,
        temporary_full=disk.used / disk.total,
        vectors=torch.backends.cpu.get_cpu_capability(),
        matrix_units=compute_dtype("auto", torch.device("cpu")) == torch.bfloat16,
        kernels="" if gpus else backend("cpu"),
    )


def _available(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def container(root: Path, mine: Path) -> tuple[int | None, float | None]:
    """Return what the control groups of this process leave it: bytes of memory, and cores.

    Args:
        root: where control groups are mounted; version 2, or 1 with folders memory and cpu.
        mine: says which groups this process is in (/proc/self/cgroup).

    Returns:
        None for either if there is no limit.
    """
    try:
        lines = [line.split(":", 2) for line in mine.read_text(encoding="utf-8").splitlines()]
    except OSError:
        lines = []
    memory: list[int] = []
    cores: list[float] = []
    for _, controllers, path in lines:
        names = controllers.split(",")
        for folder in (Path(path), *Path(path).parents):
            below = str(folder).lstrip("/")
            if controllers == "":
                memory += _memory_of(root / below, "memory.max", "memory.current", "inactive_file")
                cores += _quota(_word(root / below / "cpu.max"))
            if "memory" in names:
                memory += _memory_of(
                    root / "memory" / below, "memory.limit_in_bytes", "memory.usage_in_bytes",
                    "total_inactive_file",
                )  # fmt: skip
            if "cpu" in names:
                group = root / "cpu" / below
                whole, period = (
                    _word(group / "cpu.cfs_quota_us"),
                    _word(group / "cpu.cfs_period_us"),
                )
                cores += _quota(f"{whole} {period}")
    return min(memory, default=None), min(cores, default=None)


def _memory_of(group: Path, limit: str, used: str, cache: str) -> list[int]:
    most, now = _word(group / limit), _word(group / used)
    if not most.isdecimal() or not now.isdecimal() or int(most) > 2**60:  # 2**63: none, in words
        return []
    rows = dict(line.split(" ", 1) for line in _word(group / "memory.stat").splitlines())
    return [int(most) - int(now) + int(rows.get(cache, 0))]


def _quota(text: str) -> list[float]:
    whole, _, period = text.partition(" ")
    return [int(whole) / int(period)] if whole.isdecimal() and period.isdecimal() else []


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def judge(have: Hardware, own_ray: bool) -> Iterator[Finding]:
    """Yield what there is to say; `own_ray`: a training would start a Ray on this machine."""
    kinds = "AMX: bfloat16" if have.matrix_units else "no AMX: float32"
    whose = "of a container's quota" if have.quota else "for this process"
    cores = f"{have.cores} {whose}, {have.vectors}, {kinds}"
    if have.cores < 2:
        yield warn("cores", cores, "docker run --cpus 4   # decoding and training share one now")
    else:
        yield ok("cores", cores)
    yield from _memories(have)
    if have.files < FILES:
        yield warn("open files", f"{have.files}", "ulimit -n 65536   # before ray start, too")
    else:
        yield ok("open files", f"{have.files:,}")
    yield from _temporary(have, own_ray)
    if have.kernels:
        yield _kernels(have.kernels)


def _memories(have: Hardware) -> Iterator[Finding]:
    limit = ", by a container's limit" if have.limited else ""
    memory = f"{have.memory / GB:.1f} GB available{limit}"
    if have.memory < 2 * GB:  # torch, DALI and Ray's processes before any picture
        mend = "docker run --memory 8g, or end what runs here   # Ray alone takes 1.6 GB"
        yield warn("memory", memory, mend)
    else:
        yield ok("memory", memory)
    shared = f"{have.shared / GB:.1f} GB free"
    if have.shared < SHARED:
        mend = "docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm"
        yield warn("/dev/shm", shared, mend)
    else:
        yield ok("/dev/shm", shared)
    if have.gpus and have.infiniband and have.locked >= 0:
        yield warn(
            "locked memory", f"{have.locked / 1e6:.1f} MB; InfiniBand needs any number",
            "ulimit -l unlimited   # docker run --ulimit memlock=-1; before ray start, too",
        )  # fmt: skip


def _temporary(have: Hardware, own_ray: bool) -> Iterator[Finding]:
    free = f"{have.temporary}: {have.temporary_free / GB:.1f} GB free"
    if own_ray and len(os.fsencode(have.temporary)) + RAY_BELOW > SOCKET:
        most = SOCKET - RAY_BELOW
        yield fail(
            "temporary", f"{have.temporary} is too long for Ray's sockets; {most} characters do",
            "export TMPDIR=/tmp",
        )  # fmt: skip
    elif have.temporary_free < TEMPORARY or have.temporary_full > FULL:
        told = f"{free}, its disk is {have.temporary_full:.0%} full"
        yield warn("temporary", told, f"make room, or export TMPDIR={_elsewhere()}")
    else:
        yield ok("temporary", free)


def _elsewhere() -> str:
    """A short folder on another disk with room, as far as one is known."""
    for name in ("/var/tmp", "/scratch", "/dev/shm"):
        if Path(name).is_dir() and shutil.disk_usage(name).free > 5 * TEMPORARY:
            return name
    return "/a/larger/disk"


def _kernels(said: str) -> Finding:
    if not said.startswith("torch operations"):
        return ok("kernels", said)
    reason = said.partition(": ")[2]
    if "DUET_KERNELS" in reason:
        mend = "unset DUET_KERNELS"
    elif "no C compiler" in reason:
        mend = "apt install gcc   # or CC=..."
    else:
        mend = "CC=gcc, or another compiler; DUET_KERNELS=torch to do without"
    return warn("kernels", f"the normalisation takes several times as long: {reason}", mend)
