"""Response normalizations as the network calls them: each picks the fastest form for its tensor.

On a CPU that is a C kernel (`native`), on a GPU a Triton kernel (`model.gpu_kernels`; triton comes
with CUDA builds of torch), elsewhere torch's operations (`reference`). All forms compute the same
numbers, within rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.norm import native, reference
from model.norm.reference import (
    LRN_ALPHA,
    LRN_K,
    LRN_SIZE,
    check_shape,
    is_channels_last,
    match_layout,
    to_dense,
)

GPU_BLOCK = 1024
"""Numbers that one program of a GPU kernel computes; they are adjacent in memory."""
GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def local_response_norm(x: Tensor, columns: int = 1, relu: bool = False) -> Tensor:
    """Local response normalization across the maps of a column (paper section 3.3).

        y_i = x_i / (k + alpha/size * sum of x_j^2 over the 5 maps j = i-2 .. i+2)^0.75

    The window is cut off at the first and the last map of its column and never reaches into the
    other one. alpha is divided by the window size, as in the original source (layer.py) and in
    `torch.nn.LocalResponseNorm`; the formula printed in the paper leaves the division out.

    Computed in float32 even where x is bfloat16: k + alpha/size * sum is 2 and a little, and
    bfloat16 has steps of 1/64 there, more than most sums are worth: the layer would do nothing.
    Forward and backward are one pass over memory each, and only x is kept for the latter.

    Args:
        x: float [b, columns * maps, h, w], any strides.
        columns: number of columns whose maps x holds, one column after the other.
        relu: normalize max(x, 0) instead of x, in the same pass; the gradient is 0 where x <= 0.

    Returns:
        As x, in its dtype and memory format.

    Raises:
        ValueError: x has another number of dimensions, or maps that do not divide by `columns`.
    """
    check_shape(x, columns)
    if torch.compiler.is_compiling():
        return reference.traceable_norm(x, columns, relu)
    kernel = reference.normalize
    if native.prepare_kernels(x):
        kernel = native.normalize
    elif prepare_gpu_kernels(x):
        kernel = launch_gpu_kernel
    return NormKernel.apply(x, kernel, columns, relu)


def norm_pool(
    x: Tensor,
    columns: int = 1,
    relu: bool = False,
    norm: bool = True,
    window: int = 3,
    stride: int = 2,
) -> Tensor:
    """Max pooling of `local_response_norm(x, columns, relu)`, on a CPU without storing the latter.

    Windows that stick out on the right or at the bottom are cut off, as in the original (layer.py
    rounds the number of windows up). The gradient of a window goes to the first of its largest
    numbers, row by row, as in `torch.nn.functional.max_pool2d`. In bfloat16, numbers are compared
    before they are rounded, which torch cannot do: there the two may pick another largest number.

    Args:
        x: float [b, columns * maps, h, w], any strides.
        columns: number of columns whose maps x holds, one column after the other.
        relu: take max(x, 0) for x.
        norm: False leaves out the normalization: pooling alone, of relu(x) if `relu`.
        window: side of the windows in pixels, at most h and w.
        stride: pixels between windows, at most `window`.

    Returns:
        [b, columns * maps, ceil((h - window) / stride) + 1, the same of w], in x's dtype and memory
        format.

    Raises:
        ValueError: as `local_response_norm`, or a window that does not fit.
    """
    check_shape(x, columns)
    if not 1 <= stride <= window <= min(x.shape[2:]):
        raise ValueError(
            f"window {window} with stride {stride} on maps of {x.shape[2]}x{x.shape[3]}: the "
            f"stride is at most the window, the window at most the maps"
        )
    fits = window <= native.MOST_WINDOW and is_channels_last(x)
    if fits and not torch.compiler.is_compiling() and native.prepare_kernels(x):
        return NormKernel.apply(x, native.pool, columns, relu, norm, window, stride)
    if norm:
        x = local_response_norm(x, columns, relu)
    elif relu:
        x = F.relu(x)
    return F.max_pool2d(x, window, stride, ceil_mode=True)


def spatial_response_norm(x: Tensor) -> Tensor:
    """Normalization over the neighborhood in the same map: layer `cnorm2` of the original.

        y = x / (1 + 0.001/25 * sum of x^2 over the 5x5 pixels around)^0.75

    The paper does not mention it. Windows are cut off at the borders; the sum is divided by 25 all
    the same (layer.py: scale /= size**2 for a layer of type rnorm). In float32 even where x is
    bfloat16. Only x is kept for the backward pass; on a CPU each pass goes over memory once.

    Args:
        x: float [b, maps, h, w], any strides.

    Returns:
        As x, in its dtype and memory format.

    Raises:
        ValueError: x has another number of dimensions.
    """
    check_shape(x, 1)
    is_native = not torch.compiler.is_compiling() and native.prepare_kernels(x)
    form = native if is_native else reference
    return NormKernel.apply(x, form.normalize_spatial)


def describe_backend(device: torch.device | str = "cpu") -> str:
    """The implementation that a device gets, in a few words; if not the fastest, also why."""
    kind = torch.device(device).type
    if kind == "cpu":
        return native.describe()
    if kind != "cuda":
        return "torch operations"
    return "Triton kernels" if _has_triton() else "torch operations, as triton is not installed"


def prepare_gpu_kernels(x: Tensor) -> bool:
    """Return whether the kernels of `model.gpu_kernels` can work on x."""
    return x.device.type == "cuda" and x.dtype in GPU_DTYPES and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def launch_gpu_kernel(x: Tensor, gradient: Tensor | None, columns: int, relu: bool) -> Tensor:
    """Response-normalize x on a GPU; with `gradient`, return the gradient of x instead.

    One program computes GPU_BLOCK numbers that are adjacent in memory, whichever format that is:
    the same pixel of the next map is `step` elements away. Neighbors are read again from the cache.

    Args:
        x: float [b, columns * maps, h, w], contiguous in one of the two memory formats.
        gradient: gradient of the output, in the shape, dtype and memory format of x; or None.
        columns: number of columns whose maps x holds.
        relu: whether max(x, 0) is normalized instead of x.
    """
    from model import gpu_kernels

    y = torch.empty_like(x)
    step = 1 if is_channels_last(x) else x.shape[2] * x.shape[3]
    settings = (x.numel(), step, x.shape[1] // columns, LRN_K, LRN_ALPHA / LRN_SIZE)
    kernel = gpu_kernels.norm_forward if gradient is None else gpu_kernels.norm_backward
    given = (x,) if gradient is None else (x, gradient)
    if grid := -(-x.numel() // GPU_BLOCK):
        kernel[(grid,)](*given, y, *settings, relu=relu, BLOCK=GPU_BLOCK, enable_fp_fusion=True)
    return y


class NormKernel(torch.autograd.Function):
    """Any of the forms: `NormKernel.apply(x, kernel, *settings)`. Only x is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Callable[..., Tensor], *settings: Any) -> Tensor:
        """Compute `kernel(x, None, *settings)`, with x in one of the two memory formats."""
        x = to_dense(x)
        ctx.save_for_backward(x)
        ctx.kernel, ctx.settings = kernel, settings
        return kernel(x, None, *settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute `kernel(x, gradient, *settings)`, the gradient in the memory format of x."""
        (x,) = ctx.saved_tensors
        dx = ctx.kernel(x, match_layout(x, gradient), *ctx.settings)
        return dx, None, *(None for _ in ctx.settings)
