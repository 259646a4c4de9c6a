"""Cores, memory, limits and the compiler of this machine; its GPUs are in `gpus`.

The GPUs of this machine: as torch sees them, and what nvidia-smi says of them.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.doctor.finding import GB, Finding, fail, first_line, ok, warn

BFLOAT16 = (8, 0)
"""First compute capability that multiplies it."""
BUSY = 0.5 * GB
"""Bytes in use beyond which someone else works there; an idle GPU's driver takes some."""
SMI_SECONDS = 10


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One of them."""

    name: str
    free: int
    total: int
    capability: tuple[int, int]
    uuid: str = ""
    neighbour: bool | None = None
    """Whether it reaches the memory of the next one; None: it is the last."""
    mig: bool = False
    """Cut into instances (MIG)."""
    users: tuple[str, ...] = ()
    """Other processes on it, `PID NAME` each."""
    built_for: bool = True
    """torch has code for it."""


def gather_gpus() -> list[Gpu]:
    """Look; empty where torch sees none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    built = [name.rpartition("_")[2] for name in torch.cuda.get_arch_list()] if count else []
    mig = _smi("--query-gpu=uuid,mig.mode.current") if count else []
    users = _smi("--query-compute-apps=gpu_uuid,pid,process_name") if count else []
    found = []
    for index in range(count):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        peer = torch.cuda.can_device_access_peer(index, index + 1) if index + 1 < count else None
        uuid = str(getattr(properties, "uuid", ""))
        capability = (properties.major, properties.minor)
        found.append(
            Gpu(
                name=properties.name,
                free=free,
                total=total,
                capability=capability,
                uuid=uuid,
                neighbour=peer,
                mig="MIG" in properties.name or ("Enabled",) in matching(mig, uuid),
                users=others(users, uuid),
                built_for=has_code(built, capability),
            )
        )
    return found


def _smi(query: str) -> list[list[str]]:
    """Rows of an answer of nvidia-smi; none where there is no such program."""
    if not (program := shutil.which("nvidia-smi")):
        return []
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader"],
            capture_output=True, text=True, timeout=SMI_SECONDS, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return []
    return rows_of(done.stdout)


def rows_of(text: str) -> list[list[str]]:
    """Cells of nvidia-smi's CSV."""
    return [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line]


def matching(rows: list[list[str]], uuid: str) -> list[tuple[str, ...]]:
    """Rows of one GPU, without its uuid; torch leaves out the `GPU-` before it."""
    return [tuple(row[1:]) for row in rows if uuid and row[0].removeprefix("GPU-") == uuid]


def others(rows: list[list[str]], uuid: str) -> tuple[str, ...]:
    """Processes on a GPU besides this one, `PID NAME` each."""
    me = str(os.getpid())
    return tuple(
        " ".join(row[:2]) for row in matching(rows, uuid) if len(row) >= 2 and row[0] != me
    )


def has_code(built: list[str], capability: tuple[int, int]) -> bool:
    """Whether a torch built for `sm_` numbers such as 80 or 90a runs on a GPU.

    Code of the same major and a lower minor runs; for a newer GPU, the last is compiled anew.
    """
    numbers = [int("".join(filter(str.isdigit, name))) for name in built]
    mine = capability[0] * 10 + capability[1]
    if not numbers or mine > max(numbers):
        return True
    return any(number // 10 == capability[0] and number <= mine for number in numbers)


def judge_gpus(gpus: list[Gpu], wanted: bool) -> Iterator[Finding]:
    """Yield what there is to say.

    Args:
        gpus: of this machine.
        wanted: the config says `device = "gpu"`, and no cluster is there to have them.
    """
    if not gpus:
        if wanted:
            mend = '--device auto (or cpu), or see the line "torch" above'
            yield fail("GPUs", 'none that torch sees, and the config says device = "gpu"', mend)
        else:
            yield ok("GPUs", "none that torch sees: training runs on the CPU")
        return
    names = ", ".join(sorted({gpu.name for gpu in gpus}))
    if len(gpus) % 2:
        mend = "--columns-per-worker 2 uses them all, a whole network on each"
        yield warn("GPUs", f"{len(gpus)} ({names}): one has no partner", mend)
    else:
        yield ok("GPUs", f"{len(gpus)} ({names})")
    for index, gpu in enumerate(gpus):
        yield from _one(f"GPU {index}", gpu)
    pairs = list(enumerate(gpus))[:-1:2]
    if apart := [index for index, gpu in pairs if gpu.neighbour is False]:
        yield warn(
            "peer access",
            f"GPUs {apart[0]} and {apart[0] + 1} cannot reach each other's memory; "
            "NCCL goes through the host",
            "nvidia-smi topo -m   # in a virtual machine or with an IOMMU: switch ACS off",
        )
    elif pairs:
        yield ok("peer access", f"within {'all ' if len(pairs) > 1 else ''}{len(pairs)} pair(s)")


def _one(name: str, gpu: Gpu) -> Iterator[Finding]:
    if not gpu.built_for:
        major, minor = gpu.capability
        yield fail(name, f"this torch has no code for {gpu.name} ({major}.{minor})",
                   "make install CUDA=12   # its torch knows older GPUs")  # fmt: skip
    if gpu.mig:
        yield warn(
            name, f"{gpu.name} is cut into instances (MIG); NCCL does not join two of one GPU",
            "--columns-per-worker 2, or, as root, when nothing runs there: nvidia-smi -mig 0",
        )  # fmt: skip
    used = gpu.total - gpu.free
    if gpu.users or used > BUSY + 0.01 * gpu.total:
        who = ", ".join(gpu.users) or "processes that are not shown"
        mend = "nvidia-smi   # who? and CUDA_VISIBLE_DEVICES chooses others"
        yield warn(name, f"{used / GB:.1f} of {gpu.total / GB:.1f} GB in use by {who}", mend)
    if gpu.capability < BFLOAT16:
        yield warn(name, f"{gpu.name} has no bfloat16: slower",
                   "--dtype float32   # it is what auto takes there")  # fmt: skip


def triton() -> Iterator[Finding]:
    """Yield what computes the normalisation on a GPU."""
    import torch

    from model.norm.response import describe_backend, local_response_norm

    try:
        x = torch.ones(1, 4, 2, 2, device="cuda")
        local_response_norm(x).sum().item()
    except Exception as error:
        mend = "apt install gcc python3-dev   # Triton compiles its launcher in C"
        yield fail("kernels", f"Triton's do not work: {first_line(error)}", mend)
        return
    said = describe_backend("cuda")
    if said.startswith("torch"):
        yield warn("kernels", said, "pip install -c constraints.txt triton")
    else:
        yield ok("kernels", said)


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
    from model.norm.response import describe_backend

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
        kernels="" if gpus else describe_backend("cpu"),
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
    if have.memory < 2 * GB:  # torch, DALI and Ray's processes before any image
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
