"""GPUs, memory, limits and the compiler of this machine."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config import Config
from cluster.doctor.finding import Finding, fail, ok, warn
from model.summary import footprint, table

GB = 10**9
FILES = 4096
"""Open files that a worker with a large set of shards may need."""
SHARED = 2 * GB
"""Bytes of /dev/shm below which NCCL and Ray's object store get into trouble."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One of them."""

    name: str
    free: int
    total: int
    capability: tuple[int, int]
    neighbour: bool | None = None
    """Whether it reaches the memory of the next one; None: it is the last."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What this machine has."""

    gpus: list[Gpu] = field(default_factory=list)
    cores: int = 1
    memory: int = 0
    """Bytes available now."""
    shared: int = 0
    """Bytes free in /dev/shm."""
    files: int = 0
    """Open files that a process may have."""
    compiler: str = ""
    matrix_units: bool = False
    """AMX."""


def gather() -> Hardware:
    """Look."""
    import torch

    from cluster.compute import compute_dtype

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        peer = torch.cuda.can_device_access_peer(index, index + 1) if index + 1 < count else None
        gpus.append(
            Gpu(
                name=torch.cuda.get_device_name(index),
                free=free,
                total=total,
                capability=torch.cuda.get_device_capability(index),
                neighbour=peer,
            )
        )
    return Hardware(
        gpus=gpus,
        cores=len(os.sched_getaffinity(0)),
        memory=_available(),
        shared=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        compiler=shutil.which("cc") or shutil.which("gcc") or shutil.which("clang") or "",
        matrix_units=compute_dtype("auto", torch.device("cpu")) == torch.bfloat16,
    )


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def judge(have: Hardware, config: Config | None) -> Iterator[Finding]:
    """Yield what there is to say, with a training of `config` in mind if it is given."""
    yield from _gpus(have)
    kinds = "with AMX: bfloat16" if have.matrix_units else "without AMX: float32"
    cores = f"{have.cores} for this process, {kinds}"
    if have.cores < 2:
        yield warn("cores", cores, "give it two: decoding and training share one")
    else:
        yield ok("cores", cores)
    yield _memory(have, config)
    shared = f"{have.shared / GB:.1f} GB free"
    if have.shared < SHARED:
        mend = "docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm"
        yield warn("/dev/shm", shared, mend)
    else:
        yield ok("/dev/shm", shared)
    if have.files < FILES:
        yield warn("open files", f"{have.files}", "ulimit -n 65536   # before ray start")
    else:
        yield ok("open files", f"{have.files:,}")
    if have.compiler:
        yield ok("C compiler", have.compiler)
    elif not have.gpus:
        yield warn("C compiler", "none: normalisation takes twice the time", "apt install gcc")


def _gpus(have: Hardware) -> Iterator[Finding]:
    if not have.gpus:
        yield ok("GPUs", "none that torch sees: training runs on the CPU")
        return
    names = ", ".join(sorted({gpu.name for gpu in have.gpus}))
    if len(have.gpus) % 2:
        mend = "--columns-per-worker 2 uses them all, a whole network on each"
        yield warn("GPUs", f"{len(have.gpus)} ({names}): one has no partner", mend)
    else:
        yield ok("GPUs", f"{len(have.gpus)} ({names})")
    for index, gpu in enumerate(have.gpus):
        if gpu.free < 0.9 * gpu.total:
            used = (gpu.total - gpu.free) / GB
            yield warn(f"GPU {index}", f"{used:.1f} GB in use by others", "nvidia-smi   # who?")
        if gpu.capability < (8, 0):
            yield warn(f"GPU {index}", f"{gpu.name} has no bfloat16", "--dtype float32")
    pairs = list(enumerate(have.gpus))[:-1:2]
    if apart := [index for index, gpu in pairs if gpu.neighbour is False]:
        yield warn(
            "peer access", f"GPUs {apart[0]} and {apart[0] + 1} cannot reach each other's memory",
            "nvidia-smi topo -m; look for IOMMU or ACS in the way; NCCL goes through the host",
        )  # fmt: skip
    elif pairs:
        yield ok("peer access", f"within {'all ' if len(pairs) > 1 else ''}{len(pairs)} pair(s)")


def _memory(have: Hardware, config: Config | None) -> Finding:
    free = f"{have.memory / GB:.1f} GB available"
    if config is None or have.gpus:
        return ok("memory", free)
    share = config.batch_size // config.replica_sizes[0]
    need = footprint(table(design=config.design), min(share, config.micro(config.replica_sizes[0])))
    told = f"{free}, a replica of this network takes about {need / GB:.1f} GB"
    if have.memory < need:
        return fail("memory", told, "--microbatch 16, or a smaller --width")
    return ok("memory", told)
