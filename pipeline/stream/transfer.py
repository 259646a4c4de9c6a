"""Choice of a GPU, and copies to it that the host does not wait for."""

from __future__ import annotations

import torch

from pipeline.tools.errors import SetupError


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor of the host on a device, without waiting for what the device still computes.

    For a CPU it is the tensor itself. To a GPU it crosses from page-locked memory, in the order of
    the current stream; `values` may be changed at once. torch keeps that memory from its next user
    until the copy has ended (`pin_memory` caches blocks, each with the events of its copies), so
    there is nothing to wait for here. A plain `.to(device)` of pageable memory returns only when
    the stream has done all that was launched before.

    Args:
        values: any shape and dtype, on the host.
        device: a CPU or a GPU.
    """
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def select_gpu(device: str) -> int | None:
    """Return the number of the GPU to decode on; None for the CPU.

    Args:
        device: `cpu`; `gpu` for the current GPU; or `cuda:` and a number.

    Raises:
        SetupError: there is no such CUDA device.
    """
    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        raise SetupError(f"device {device} needs a CUDA device, and torch sees none; use cpu")
    if device == "gpu":
        return torch.cuda.current_device()
    number, count = int(device.removeprefix("cuda:")), torch.cuda.device_count()
    if number >= count:
        raise SetupError(f"device {device}: torch sees {count} CUDA devices, counted from 0")
    return number
