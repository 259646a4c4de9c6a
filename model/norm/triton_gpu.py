"""The GPU's kernels, in Triton, which comes with CUDA builds of torch.

One program computes BLOCK numbers that follow each other in memory, whichever format that is: the
maps next to a number's own lie `step` elements apart. Neighbours are read again from the cache.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.norm.reference import LRN_ALPHA, LRN_K, LRN_SIZE, dense, is_channels_last, laid_out_as

BLOCK = 1024
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def takes(x: Tensor) -> bool:
    """Whether `Norm` can work on x."""
    return x.device.type == "cuda" and x.dtype in _DTYPES and _installed()


def described() -> str:
    """Say whether the kernels are in use, or why not."""
    return "Triton kernels" if _installed() else "torch operations, as triton is not installed"


@lru_cache(maxsize=1)
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


class Norm(torch.autograd.Function):
    """`local_response_norm` on a GPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int, relu: bool) -> Tensor:
        """Take [b, columns * maps, h, w]."""
        x = dense(x)
        ctx.save_for_backward(x)
        ctx.settings = columns, relu
        return launch(x, None, columns, relu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Take the gradient of the output."""
        (x,) = ctx.saved_tensors
        return launch(x, laid_out_as(x, gradient), *ctx.settings), None, None


def launch(x: Tensor, above: Tensor | None, columns: int, relu: bool) -> Tensor:
    """Return the normalised x, or with `above`, the gradient of that, the gradient of x.

    Args:
        x: float [b, columns * maps, h, w], contiguous in one of the two memory formats.
        above: of the same shape, dtype and format.
        columns: whose maps x holds.
        relu: whether max(x, 0) is meant.
    """
    from model.norm import gpu_kernels

    y = torch.empty_like(x)
    step = 1 if is_channels_last(x) else x.shape[2] * x.shape[3]
    grid = (-(-x.numel() // BLOCK),)
    settings = (x.numel(), step, x.shape[1] // columns, LRN_K, LRN_ALPHA / LRN_SIZE)
    if x.numel() == 0:
        return y
    if above is None:
        gpu_kernels.forward[grid](x, y, *settings, relu=relu, BLOCK=BLOCK)
    else:
        gpu_kernels.backward[grid](x, above, y, *settings, relu=relu, BLOCK=BLOCK)
    return y
