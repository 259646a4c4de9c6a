"""Response normalizations as the network calls them: each picks the fastest form for its tensor.

On a CPU that is a C kernel (`native`), on a GPU a Triton kernel (`gpu`; triton comes with CUDA
builds of torch), elsewhere torch's operations (`reference`). All forms compute the same numbers,
within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.gpu_support import explain_no_kernels, prepare_gpu_kernels
from model.norm import gpu, native, reference
from model.norm.reference import (
    PAPER,
    Response,
    check_shape,
    is_channels_last,
    match_layout,
    to_dense,
)


def local_response_norm(
    x: Tensor, columns: int = 1, relu: bool = False, response: Response = PAPER
) -> Tensor:
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
        response: other constants than the paper's. The compiled kernels take any k and alpha;
            another size or beta takes torch's operations (twice the time on a CPU core).

    Returns:
        As x, in its dtype and memory format.

    Raises:
        ValueError: x has another number of dimensions, or maps that do not divide by `columns`.
    """
    check_shape(x, columns)
    if torch.compiler.is_compiling():
        return reference.traceable_norm(x, columns, relu, response)
    kernel = reference.normalize
    if response.has_kernels and native.prepare_kernels(x):
        kernel = native.normalize
    elif response.has_kernels and prepare_gpu_kernels(x):
        kernel = gpu.normalize
    return NormKernel.apply(x, kernel, columns, relu, response)


def norm_pool(
    x: Tensor,
    columns: int = 1,
    relu: bool = False,
    norm: bool = True,
    window: int = 3,
    stride: int = 2,
    response: Response = PAPER,
) -> Tensor:
    """Max pooling of `local_response_norm(x, columns, relu)`, where possible without storing that.

    Where x is channels last, one pass over memory each way on a CPU and on a GPU.

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
        response: as in `local_response_norm`.

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
    has_kernels = response.has_kernels or not norm
    if has_kernels and is_channels_last(x) and not torch.compiler.is_compiling():
        if window <= native.MOST_WINDOW and native.prepare_kernels(x):
            return NormKernel.apply(x, native.pool, columns, relu, norm, window, stride, response)
        if window <= gpu.MOST_WINDOW and prepare_gpu_kernels(x):
            return PoolKernel.apply(x, columns, relu, norm, window, stride, response)
    if norm:
        x = local_response_norm(x, columns, relu, response)
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
    reason = explain_no_kernels()
    return f"torch operations, as {reason}" if reason else "Triton kernels"


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


class PoolKernel(torch.autograd.Function):
    """Pooling on a GPU: keeps a byte for each window, and x if it was normalized."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        columns: int,
        relu: bool,
        norm: bool,
        window: int,
        stride: int,
        response: Response = PAPER,
    ) -> Tensor:
        """Compute `gpu.pool`; x is channels last."""
        keep = ctx.needs_input_grad[0]
        y, origin = gpu.pool(x, columns, relu, norm, window, stride, keep, response)
        ctx.save_for_backward(x if norm else None, origin)
        ctx.sides, ctx.settings = x.shape[2:], (columns, relu, norm, window, stride, response)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute `gpu.pool_gradient`, channels last."""
        x, origin = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        dx = gpu.pool_gradient(x, gradient, origin, ctx.sides, *ctx.settings)
        return dx, *(None for _ in ctx.settings)
