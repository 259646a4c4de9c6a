"""Checks of this machine: GPUs, cores, memory, limits, temporary folder, compiler, kernels.

`gather_gpus` and `gather` collect facts; the judging functions are pure.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.finding import GB, Finding, fail, ok, warn
from pipeline.throughput.nvidia_smi import query_smi, select_rows
from pipeline.tools.errors import summarize_error
from pipeline.tools.text import human_bytes
from pipeline.tools.units import (
    cpu_count,
    free_memory,
    read_memory_left,
)

BFLOAT16 = (8, 0)
"""First compute capability with bfloat16 arithmetic."""
BUSY_BYTES = 0.5 * GB
"""Memory in use above which another process uses a GPU; the driver of an idle one takes less."""
MIN_FILES = 4096
"""Open files that a worker with a large set of shards, and Ray beside it, may need."""
MIN_SHARED = 2 * GB
"""Bytes of /dev/shm below which NCCL and Ray's object store fail."""
MIN_TEMPORARY = 2 * GB
"""Bytes in the temporary folder for Ray's logs and uploads to a store."""
FULL_DISK = 0.95
"""Used share of a disk above which Ray's object store refuses to spill."""
SOCKET_PATH = 107
"""Most bytes in the path of a Unix socket (sun_path in unix(7), less the closing zero)."""
RAY_SUFFIX = len("/duet-12345678/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
"""Bytes that Ray appends to the temporary folder for the longest of its sockets."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Facts about one GPU."""

    name: str
    free: int
    """Bytes of free memory."""
    total: int
    """Bytes of memory."""
    capability: tuple[int, int]
    """CUDA compute capability."""
    has_peer_access: bool | None = None
    """True if it can access the memory of the next GPU; None: it is the last."""
    is_mig: bool = False
    """True if it is split into instances (MIG)."""
    users: tuple[str, ...] = ()
    """Other processes on it, `PID NAME` each."""
    is_built_for: bool = True
    """True if torch has code for it."""


def gather_gpus() -> list[Gpu]:
    """Collect facts about the GPUs; empty if torch sees none."""
    import torch

    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    built = [name.rpartition("_")[2] for name in torch.cuda.get_arch_list()]
    mig = query_smi("--query-gpu=uuid,mig.mode.current")
    users = query_smi("--query-compute-apps=gpu_uuid,pid,process_name")
    gpus = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        peer = torch.cuda.can_device_access_peer(index, index + 1) if index + 1 < count else None
        uuid = str(getattr(properties, "uuid", ""))
        capability = (properties.major, properties.minor)
        gpus.append(
            Gpu(
                name=properties.name,
                free=free,
                total=total,
                capability=capability,
                has_peer_access=peer,
                is_mig="MIG" in properties.name or ["Enabled"] in select_rows(mig, uuid),
                users=list_users(users, uuid),
                is_built_for=has_code(built, capability),
            )
        )
    return gpus


def list_users(rows: list[list[str]], uuid: str) -> tuple[str, ...]:
    """List the processes on a GPU except this one, `PID NAME` each."""
    own = str(os.getpid())
    return tuple(
        " ".join(row[:2]) for row in select_rows(rows, uuid) if len(row) > 1 and row[0] != own
    )


def has_code(built: list[str], capability: tuple[int, int]) -> bool:
    """Return whether a torch built for `sm_` numbers such as 80 or 90a runs on a GPU.

    Code for the same major and a lower minor runs; for a newer GPU the driver compiles the last.
    """
    numbers = [int("".join(filter(str.isdigit, name))) for name in built]
    own = capability[0] * 10 + capability[1]
    return own > max(numbers, default=0) or any(own // 10 * 10 <= n <= own for n in numbers)


def judge_gpus(gpus: list[Gpu], needs_gpu: bool) -> Iterator[Finding]:
    """Judge the GPUs of this machine.

    Args:
        gpus: GPUs of this machine.
        needs_gpu: the config says `device = "gpu"`, and the training runs on this machine.
    """
    if not gpus:
        mend = '--device auto (or cpu), or see the line "torch" above'
        why = ', and the config says device = "gpu"' if needs_gpu else ": training runs on the CPU"
        yield fail("GPUs", f"none that torch sees{why}", mend, unless=not needs_gpu)
        return
    is_odd = len(gpus) % 2 == 1 and len(gpus) > 1
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    text = f"{len(gpus)} ({names}){': one has no partner' * is_odd}"
    mend = "--columns-per-worker 2 uses them all, a whole network on each"
    yield warn("GPUs", text, mend, unless=not is_odd)
    for index, gpu in enumerate(gpus):
        yield from _judge_gpu(f"GPU {index}", gpu, len(gpus))
    pairs = list(enumerate(gpus))[:-1:2]
    if apart := [index for index, gpu in pairs if gpu.has_peer_access is False]:
        yield warn(
            "peer access",
            f"GPUs {apart[0]} and {apart[0] + 1} cannot reach each other's memory; "
            "NCCL goes through the host",
            "nvidia-smi topo -m   # in a virtual machine or with an IOMMU: switch ACS off",
        )
    elif pairs:
        yield ok("peer access", f"within {'all ' if len(pairs) > 1 else ''}{len(pairs)} pair(s)")


def _judge_gpu(name: str, gpu: Gpu, count: int) -> Iterator[Finding]:
    if not gpu.is_built_for:
        major, minor = gpu.capability
        mend = "make install CUDA=12   # its torch knows older GPUs"
        yield fail(name, f"this torch has no code for {gpu.name} ({major}.{minor})", mend)
    if gpu.is_mig and count > 1:
        text = f"{gpu.name} is split into instances (MIG); NCCL does not join two of one GPU"
        mend = "--columns-per-worker 2, or, as root, when nothing runs there: nvidia-smi -mig 0"
        yield warn(name, text, mend)
    used = gpu.total - gpu.free
    if gpu.users or used > BUSY_BYTES + 0.01 * gpu.total:
        who = ", ".join(gpu.users) or "processes that are not shown"
        mend = "nvidia-smi   # who? and CUDA_VISIBLE_DEVICES chooses others"
        yield warn(name, f"{human_bytes(used)} of {human_bytes(gpu.total)} in use by {who}", mend)
    if gpu.capability < BFLOAT16:
        mend = "--dtype float32   # it is what auto takes there"
        yield warn(name, f"{gpu.name} has no bfloat16: slower", mend)


def find_compiler() -> str:
    """Return the C compiler that Triton would call; empty if there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or ""


def judge_compiler(compiler: str, headers: Path) -> Finding:
    """Judge whether Triton can compile the launcher of its kernels.

    Args:
        compiler: command of a C compiler; empty: there is none.
        headers: folder where Python.h should be.
    """
    mend = "apt install gcc python3-dev   # Triton compiles the launcher of its kernels in C"
    if not compiler or not shutil.which(compiler.split()[0]):
        return warn("compiler", f"no C compiler ({compiler or 'CC, gcc, clang'})", mend)
    if not (headers / "Python.h").exists():
        return warn("compiler", f"{compiler}, but {headers} has no Python.h", mend)
    return ok("compiler", f"{compiler}, with Python.h")


def try_gpu_kernels() -> tuple[str, str]:
    """Run the normalization on a GPU; return what computed it, and the error, empty if it works."""
    import torch

    from model.norm.response import describe_backend, local_response_norm

    try:
        local_response_norm(torch.ones(1, 4, 2, 2, device="cuda")).sum().item()
    except Exception as error:
        return "", summarize_error(error)
    return describe_backend("cuda"), ""


def judge_gpu_kernels(backend: str, error: str) -> Finding:
    """Judge the result of `try_gpu_kernels`."""
    if error:
        mend = "TRITON_CACHE_DIR=$(mktemp -d) duet doctor   # a new cache; else "
        mend += 'as the line "compiler" says'
        return fail("kernels", f"Triton's do not work: {error}", mend)
    mend = "pip install -c constraints.txt triton"
    if "installed" not in backend:
        mend = 'as the line "compiler" says, or make room in ~/.triton'
    return warn("kernels", backend, mend, unless=not backend.startswith("torch"))


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Facts about this machine except its GPUs."""

    gpus: int = 0
    """Number of GPUs."""
    cores: int = 1
    """Cores that this process may use, at most a container's quota."""
    has_quota: bool = False
    """True if a container's quota limits the cores."""
    memory: int = 0
    """Bytes available now, at most what a container's limit leaves."""
    has_memory_limit: bool = False
    """True if a container's limit is below the machine's available memory."""
    shared: int = 0
    """Bytes free in /dev/shm."""
    files: int = 0
    """Open files that a process may have."""
    locked: int = -1
    """Bytes of memory that a process may lock; -1: any number."""
    has_infiniband: bool = False
    temporary: str = "/tmp"
    """Path of the temporary folder."""
    temporary_free: int = 0
    """Bytes free on its disk."""
    temporary_full: float = 0.0
    """Used share of its disk, 0..1."""
    vectors: str = ""
    """Vector instructions by torch's name: AVX512, AVX2, ..."""
    has_amx: bool = False
    kernels: str = ""
    """Description of what computes the normalization on the CPU; empty on a machine with GPUs."""


def gather(gpus: int) -> Hardware:
    """Collect facts; the first call on a machine compiles the CPU kernels in some three seconds."""
    import torch

    from cluster.training.precision import compute_dtype
    from model.norm.response import describe_backend

    cores, free, left = cpu_count(), free_memory(), read_memory_left()
    temporary = tempfile.gettempdir()
    disk = shutil.disk_usage(temporary)
    shared = Path("/dev/shm")
    return Hardware(
        gpus=gpus,
        cores=cores,
        has_quota=cores < len(os.sched_getaffinity(0)),
        memory=free if left is None else min(free, left),
        has_memory_limit=left is not None and left < free,
        shared=shutil.disk_usage(shared).free if shared.exists() else 0,
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        locked=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        has_infiniband=any(Path("/sys/class/infiniband").glob("*")),
        temporary=temporary,
        temporary_free=disk.free,
        temporary_full=disk.used / disk.total,
        vectors=torch.backends.cpu.get_cpu_capability(),
        has_amx=compute_dtype("auto", torch.device("cpu")) == torch.bfloat16,
        kernels="" if gpus else describe_backend("cpu"),
    )


def judge(have: Hardware, own_ray: bool) -> Iterator[Finding]:
    """Judge this machine; `own_ray`: a training would start a Ray of its own here."""
    kinds = "AMX: bfloat16" if have.has_amx else "no AMX: float32"
    limit = "of a container's quota" if have.has_quota else "for this process"
    cores = f"{have.cores} {limit}, {have.vectors}, {kinds}"
    mend = "docker run --cpus 4   # decoding and training share one now"
    yield warn("cores", cores, mend, unless=have.cores >= 2)
    limit = ", by a container's limit" if have.has_memory_limit else ""
    memory = f"{human_bytes(have.memory)} available{limit}"
    mend = "docker run --memory 8g, or end what runs here   # Ray alone takes 1.6 GB"
    # 2 GB: torch, DALI and Ray's processes before any image.
    yield warn("memory", memory, mend, unless=have.memory >= 2 * GB)
    mend = "docker run --shm-size=8g, or an emptyDir of medium Memory at /dev/shm"
    shared = f"{human_bytes(have.shared)} free"
    yield warn("/dev/shm", shared, mend, unless=have.shared >= MIN_SHARED)
    if have.gpus and have.has_infiniband and have.locked >= 0:
        text = f"{human_bytes(have.locked)}; InfiniBand needs any number"
        mend = "ulimit -l unlimited   # docker run --ulimit memlock=-1; before ray start, too"
        yield warn("locked memory", text, mend)
    mend = "ulimit -n 65536   # before ray start, too"
    yield warn("open files", f"{have.files:,}", mend, unless=have.files >= MIN_FILES)
    yield _judge_temporary(have, own_ray)
    if have.kernels:
        yield _judge_kernels(have.kernels)


def _judge_temporary(have: Hardware, own_ray: bool) -> Finding:
    most = SOCKET_PATH - RAY_SUFFIX
    if own_ray and len(os.fsencode(have.temporary)) > most:
        text = f"{have.temporary} is too long for Ray's sockets; {most} characters do"
        return fail("temporary", text, "export TMPDIR=/tmp")
    free = f"{have.temporary}: {human_bytes(have.temporary_free)} free"
    if have.temporary_free >= MIN_TEMPORARY and have.temporary_full <= FULL_DISK:
        return ok("temporary", free)
    folders = (name for name in ("/var/tmp", "/scratch", "/dev/shm") if Path(name).is_dir())
    large = (name for name in folders if shutil.disk_usage(name).free > 5 * MIN_TEMPORARY)
    text = f"{free}, its disk is {have.temporary_full:.0%} full"
    return warn("temporary", text, f"make room, or export TMPDIR={next(large, '/a/larger/disk')}")


def _judge_kernels(backend: str) -> Finding:
    if not backend.startswith("torch operations"):
        return ok("kernels", backend)
    reason = backend.partition(": ")[2]
    mend = "CC=gcc, or another compiler; DUET_KERNELS=torch to do without"
    if "DUET_KERNELS" in reason:
        mend = "unset DUET_KERNELS"
    elif "no C compiler" in reason:
        mend = "apt install gcc   # or CC=..."
    return warn("kernels", f"the normalization takes several times as long: {reason}", mend)
