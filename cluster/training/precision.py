"""Device and compute dtype by hardware, autocast, and settings of a device and of malloc."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from pipeline.stream.transfer import select_gpu

if TYPE_CHECKING:
    from cluster.config import Config, Dtype
    from cluster.mesh import ProcessMesh

# glibc, malloc.h: numbers of the parameters of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def choose_device(wanted: Literal["auto", "cpu", "gpu"]) -> torch.device:
    """Return the device to compute on; `auto` is a GPU if there is one.

    Raises:
        SetupError: `gpu` without a CUDA device.
    """
    if wanted == "gpu":
        select_gpu(wanted)
    cuda = wanted != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def compute_dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that layers compute in; weights, velocities and loss are always float32.

    `auto` is bfloat16 where the hardware multiplies it: GPUs since 2020 and CPUs with AMX
    (1.5 to 1.9 times as fast a step as float32 on the latter). Other CPUs only emulate it.
    """
    if wanted == "auto":
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device.type == "cuda"
            else _has_amx()
        )
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return the autocast context for the network; for float32 it is disabled."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def prepare_for(config: Config, mesh: ProcessMesh) -> None:
    """Choose torch's settings for a training: those of `prepare_device`, and of exact sums."""
    # A CPU's kernels cut some sums by their threads.
    prepare_device(mesh.device, count_threads(config, mesh), is_exact=config.exact)


def count_threads(config: Config, mesh: ProcessMesh) -> int:
    """Return the CPU threads that compute each column, or both if they are computed as one."""
    return 1 if config.exact else mesh.cores


def prepare_device(
    device: torch.device, cores: int, tf32: bool = False, is_exact: bool = False
) -> None:
    """Choose torch's settings for computing on a device; call it before the first large tensor.

    Args:
        device: device of the network.
        cores: CPU threads that torch may use.
        tf32: whether a GPU may round factors of float32 products to 10 bits, on tensor cores. No
            training does: float32 means float32, in convolutions, too, where torch's default is to
            round; bfloat16 is the faster choice.
        is_exact: whether a GPU must choose the same algorithms in every process; by default cuDNN
            takes the one that was the fastest in a trial.
    """
    torch.set_num_threads(cores)
    if device.type == "cpu":
        keep_memory()
        return
    # Shapes stay the same: cuDNN tries its algorithms once for each, and keeps the fastest.
    torch.backends.cudnn.benchmark = not is_exact
    torch.backends.cudnn.deterministic = is_exact
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32


@lru_cache(maxsize=1)
def keep_memory() -> None:
    """Have malloc keep freed memory; call it before the first large tensor.

    The activations of a step are tens of megabytes each. By default glibc hands such blocks back
    to the kernel at once and maps new pages in the next layer, page by page: a quarter of the CPU
    time of an evaluation, measured. Without glibc this does nothing. It is not for a process whose
    network is on a GPU: all threads, DALI's too, would share one arena, with no such tensor in it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)  # the heap of other arenas is too small for such blocks
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)


@lru_cache(maxsize=1)
def _has_amx() -> bool:
    try:
        return " amx_bf16 " in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
