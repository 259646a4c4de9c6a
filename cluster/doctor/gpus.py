"""The GPUs of this machine: as torch sees them, and what nvidia-smi says of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

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


def gather() -> list[Gpu]:
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


def judge(gpus: list[Gpu], wanted: bool) -> Iterator[Finding]:
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

    from model.norm.response import backend, local_response_norm

    try:
        x = torch.ones(1, 4, 2, 2, device="cuda")
        local_response_norm(x).sum().item()
    except Exception as error:
        mend = "apt install gcc python3-dev   # Triton compiles its launcher in C"
        yield fail("kernels", f"Triton's do not work: {first_line(error)}", mend)
        return
    said = backend("cuda")
    if said.startswith("torch"):
        yield warn("kernels", said, "pip install -c constraints.txt triton")
    else:
        yield ok("kernels", said)
