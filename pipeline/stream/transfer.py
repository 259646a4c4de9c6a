"""Choice of a GPU, and copies to and on it that the host does not wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from pipeline.stream import operators as dali
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


def current_stream(gpu: int | None) -> torch.cuda.Stream | None:
    """Return torch's current stream of a GPU; of the CPU, None."""
    return None if gpu is None else torch.cuda.current_stream(gpu)


def to_tensor(output: Any, gpu: int | None) -> torch.Tensor:
    """Return a dense output of DALI as a tensor whose memory nobody else uses while it lives.

    On the CPU it is DALI's memory, without a copy: DALI makes each output in memory of its own, to
    which the tensor then holds the last reference.

    On a GPU it is a copy in torch's memory, made in the order of torch's current stream without a
    wait of the host. DALI frees an output in the order of its own stream, as soon as Python lets go
    of it: an alias could be overwritten while kernels that read it are still queued in torch's. A
    copy is safe because DALI's stream waits for it (`CopyToExternalImplGPU` in its
    backend_impl.cc), and torch frees its own memory in the order of the stream that uses it.

    Args:
        output: a list of tensors of one shape, as `run_on_current_stream` returns it.
        gpu: number of the GPU that it is on; None for the CPU.
    """
    pixels = output.as_tensor()
    if gpu is None:
        tensor: torch.Tensor = from_dlpack(pixels)
        return tensor
    tensor = torch.empty(
        pixels.shape(), dtype=dali.to_torch_type[pixels.dtype], device=torch.device("cuda", gpu)
    )
    # A stream makes it a copy that is not waited for.
    dali.feed_ndarray(pixels, tensor, cuda_stream=current_stream(gpu))
    return tensor
