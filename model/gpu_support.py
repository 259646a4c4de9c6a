"""The GPU kernels' availability: whether Triton can compile and launch here, or why it cannot.

Triton compiles each kernel at its first launch. That needs a C compiler (for the launcher), a GPU
that Triton knows and a place for its cache; where one is missing, torch's operations do the work.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch
from torch import Tensor

GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Types of the tensors that the kernels take."""


def prepare_gpu_kernels(x: Tensor) -> bool:
    """True if `model.gpu_kernels` work on x; the first call on a GPU tries whether any runs."""
    return x.device.type == "cuda" and x.dtype in GPU_DTYPES and not explain_no_kernels()


@lru_cache(maxsize=1)
def explain_no_kernels() -> str:
    """Launch a tiny kernel on the current GPU: why that fails, in a line, or "" if it works.

    The answer holds for the whole process. A failure is also said once as a warning.
    """
    try:
        _launch_trial()
    except ImportError as error:
        reason = "triton is not installed" if error.name == "triton" else str(error)
    # Triton raises its own errors, those of the C compiler it starts, and those of the driver.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        reason = f"Triton's kernels do not run here: {type(error).__name__}: {lines[-1][:200]}"
    else:
        return ""
    warnings.warn(f"torch operations replace the GPU kernels: {reason}", stacklevel=2)
    return reason


def _launch_trial() -> None:
    """Launch the smallest kernel and look at its result.

    Raises:
        RuntimeError: it ran and did not write.
        Exception: whatever prevents a launch.
    """
    from model import gpu_kernels

    number = torch.zeros(1, device="cuda")
    gpu_kernels.write_one[(1,)](number)
    if number.item() != 1:
        raise RuntimeError("a kernel ran and wrote nothing")
