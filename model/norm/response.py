"""The normalisations as the network calls them: each takes the quickest form there is for x.

The GPU's kernels, in Triton, which comes with CUDA builds of torch.

One program computes BLOCK numbers that follow each other in memory, whichever format that is: the
maps next to a number's own lie `step` elements apart. Neighbours are read again from the cache.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.norm import native, reference
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


def local_response_norm(x: Tensor, columns: int = 1, relu: bool = False) -> Tensor:
    """Local response normalisation across the maps of a column (paper section 3.3).

        y_i = x_i / (k + alpha/size * sum of x_j^2 over the 5 maps j = i-2 .. i+2)^0.75

    The window is cut off at the first and the last map of its column and never reaches into the
    other one. alpha is divided by the window size, as in the original source (layer.py) and in
    `torch.nn.LocalResponseNorm`; the formula printed in the paper leaves the division out.

    Computed in float32 even where x is bfloat16: k + alpha/size * sum is 2 and a little, and
    bfloat16 has steps of 1/64 there, more than most sums are worth: the layer would do nothing.
    Forward and backward are one pass over memory each, and only x is kept for the latter.

    Args:
        x: float [b, columns * maps, h, w], any strides.
        columns: how many columns' maps x holds, one column after the other.
        relu: take max(x, 0) for x, in the same pass; its gradient is 0 where x <= 0.

    Returns:
        as x, in its dtype and memory format.

    Raises:
        ValueError: x has another number of dimensions, or maps that do not divide by `columns`.
    """
    _check(x, columns)
    if torch.compiler.is_compiling():
        return reference.traceable_norm(x, columns, relu)
    if native.takes(x):
        return cast(Tensor, _NativeNorm.apply(x, columns, relu))
    if takes(x):
        return cast(Tensor, Norm.apply(x, columns, relu))
    return cast(Tensor, reference.Norm.apply(x, columns, relu))


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
    before they are rounded, which torch cannot do: there the two differ in whom they call largest.

    Args:
        x: float [b, columns * maps, h, w], any strides.
        columns: how many columns' maps x holds, one column after the other.
        relu: take max(x, 0) for x.
        norm: False leaves out the normalisation: pooling alone, of relu(x) if `relu`.
        window: side of the windows in pixels, at most h and w.
        stride: pixels between windows, at most `window`.

    Returns:
        [b, columns * maps, ceil((h - window) / stride) + 1, the same of w], in x's dtype and memory
        format.

    Raises:
        ValueError: as `local_response_norm`, or a window that does not fit.
    """
    _check(x, columns)
    if not 1 <= stride <= window <= min(x.shape[2:]):
        raise ValueError(
            f"window {window} with stride {stride} on maps of {x.shape[2]}x{x.shape[3]}: the "
            f"stride is at most the window, the window at most the maps"
        )
    if not torch.compiler.is_compiling() and native.pools(x, window):
        return cast(Tensor, _NativePool.apply(x, columns, relu, norm, window, stride))
    if norm:
        x = local_response_norm(x, columns, relu)
    elif relu:
        x = F.relu(x)
    return F.max_pool2d(x, window, stride, ceil_mode=True)


def spatial_response_norm(x: Tensor) -> Tensor:
    """Normalisation over the neighbourhood in the same map: layer `cnorm2` of the original.

        y = x / (1 + 0.001/25 * sum of x^2 over the 5x5 pixels around)^0.75

    The paper does not mention it. Windows are cut off at the borders; the sum is divided by 25 all
    the same (layer.py: scale /= size**2 for a layer of type rnorm). In float32 even where x is
    bfloat16. Only x is kept for the backward pass; on a CPU each pass goes over memory once.

    Args:
        x: float [b, maps, h, w], any strides.

    Returns:
        as x, in its dtype and memory format.

    Raises:
        ValueError: x has another number of dimensions.
    """
    _check(x, 1)
    if torch.compiler.is_compiling() or not native.takes(x):
        return cast(Tensor, reference.Spatial.apply(x))
    return cast(Tensor, _NativeSpatial.apply(x))


def describe_backend(device: torch.device | str = "cpu") -> str:
    """Say in a few words what computes the normalisation there, and if it is not the best, why."""
    kind = torch.device(device).type
    if kind == "cpu":
        return native.described()
    return described() if kind == "cuda" else "torch operations"


def _check(x: Tensor, columns: int) -> None:
    if x.dim() != 4 or columns < 1 or x.shape[1] % columns:
        raise ValueError(
            f"x is {list(x.shape)}; it must be [b, columns * maps, h, w] with {columns} columns"
        )


class _NativeNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int, relu: bool) -> Tensor:
        x = reference.dense(x)
        ctx.save_for_backward(x)
        ctx.settings = columns, relu
        return native.norm(x, None, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return native.norm(x, reference.laid_out_as(x, gradient), *ctx.settings), None, None


class _NativePool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, columns: int, relu: bool, norm: bool, window: int, stride: int
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = columns, relu, norm, window, stride
        return native.pool(x, None, *ctx.settings)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        found = native.pool(x, reference.laid_out_as(x, gradient), *ctx.settings)
        return found, None, None, None, None, None


class _NativeSpatial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = reference.dense(x)
        ctx.save_for_backward(x)
        return native.spatial(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return native.spatial(x, reference.laid_out_as(x, gradient))
