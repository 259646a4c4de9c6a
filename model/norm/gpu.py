"""GPU kernels (`model.gpu_kernels`): their launches, from tensors to tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.norm.reference import PAPER, Response, count_windows, is_channels_last

LANES = 128
"""Lanes of a program, one to each thread of four warps."""
LOAD_BYTES = 16
"""Bytes that a thread loads or stores at once, at most."""
LONG_NUMBERS = 2**31
"""Numbers of a tensor from which on its offsets take 64 bits."""
ROWS = 2
"""Windows below each other that a lane pools: 5 rows of pixels for two windows of 3, not 6."""
MOST_WINDOW = 4
"""Largest pooling window: what a lane holds grows with its square."""


def normalize(
    x: Tensor, gradient: Tensor | None, columns: int, relu: bool, response: Response = PAPER
) -> Tensor:
    """Response-normalize x; with `gradient`, return the gradient of x instead.

    Args:
        x: a float of `GPU_DTYPES` [b, columns * maps, h, w], dense in either memory format.
        gradient: gradient of the output, in the shape, dtype and memory format of x; or None.
        columns: number of columns whose maps x holds.
        relu: whether max(x, 0) is normalized instead of x.
        response: constants; `Response.has_kernels` must hold. A kernel is compiled for them.
    """
    from model import gpu_kernels

    y = torch.empty_like(x)
    maps = x.shape[1] // columns
    count = _count_lane_maps(x, columns)
    step = 1 if is_channels_last(x) else x.shape[2] * x.shape[3]
    settings: dict[str, Any] = {
        "relu": relu,
        "MAPS": maps,
        "STEP": step,
        **_list_constants(response),
    }
    if gradient is None:
        _launch(gpu_kernels.norm_forward, (x, y), x.numel() // count, count, **settings)
    else:
        tensors = (x, gradient, y)
        _launch(gpu_kernels.norm_backward, tensors, x.numel() // count, count, **settings)
    return y


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], lanes: int, count: int, **settings: Any
) -> None:
    """Launch a kernel with `lanes` lanes of `count` maps each; the largest tensor is the first."""
    x = tensors[0]
    if lanes:
        kernel[(-(-lanes // LANES),)](
            *tensors,
            lanes,
            **settings,
            COUNT=count,
            BLOCK=LANES,
            LONG=x.numel() >= LONG_NUMBERS,
            enable_fp_fusion=True,
        )


def _list_constants(response: Response) -> dict[str, float]:
    """Constants of the normalization as the kernels call them."""
    return {"k": response.k, "alpha": response.scale}


def pool(
    x: Tensor,
    columns: int,
    relu: bool,
    norm: bool,
    window: int,
    stride: int,
    keep: bool,
    response: Response = PAPER,
) -> tuple[Tensor, Tensor]:
    """Max-pool x, channels last.

    Args:
        x: a float of `GPU_DTYPES` [b, columns * maps, h, w], channels last.
        columns: number of columns whose maps x holds.
        relu: whether max(x, 0) is taken instead of x.
        norm: whether x is normalized before the pooling.
        window: at most MOST_WINDOW, h and w.
        stride: at most `window`.
        keep: whether `pool_gradient` follows.
        response: as in `normalize`.

    Returns:
        [b, columns * maps, pooled height, pooled width] in x's dtype, channels last; and for
        `pool_gradient`, uint8 [b, pooled height, pooled width, columns * maps]: the index of the
        largest in its window, row by row, or 255 where relu makes all of them 0. One byte a window
        costs less than to normalize the windows of a pixel again (25 pixels for windows of 3); a
        tensor without elements unless `keep`.
    """
    from model import gpu_kernels

    images, maps, *sides = x.shape
    pooled = [count_windows(side, window, stride) for side in sides]
    y = x.new_empty((images, *pooled, maps))
    origin = x.new_empty(y.shape if keep else 0, dtype=torch.uint8)
    settings = _describe_pool(x, columns, relu, norm, window, stride)
    count = _count_lane_maps(x, columns)
    lanes = images * -(-pooled[0] // ROWS) * pooled[1] * maps // count
    settings |= {"keep": keep, "ROWS": ROWS, **_list_constants(response)}
    _launch(gpu_kernels.pool_forward, (x, y, origin), lanes, count, **settings)
    return y.permute(0, 3, 1, 2), origin


def pool_gradient(
    x: Tensor | None,
    gradient: Tensor,
    origin: Tensor,
    sides: Sequence[int],
    columns: int,
    relu: bool,
    norm: bool,
    window: int,
    stride: int,
    response: Response = PAPER,
) -> Tensor:
    """Gradient of x, channels last.

    Args:
        x: as `pool` got it; None without `norm`.
        gradient: gradient of the output, in its shape, dtype and memory format.
        origin: second result of `pool`.
        sides: height and width of x.
        columns: as `pool` got it, like all others.
    """
    from model import gpu_kernels

    images, maps = gradient.shape[:2]
    dx = gradient.new_empty((images, *sides, maps)).permute(0, 3, 1, 2)
    count = _count_lane_maps(dx, columns)
    squares = images * math.prod(-(-side // stride) for side in sides)
    settings = _describe_pool(dx, columns, relu, norm, window, stride)
    settings |= _list_constants(response)
    tensors = (dx if x is None else x, gradient, origin, dx)
    _launch(gpu_kernels.pool_backward, tensors, squares * maps // count, count, **settings)
    return dx


def _count_lane_maps(x: Tensor, columns: int) -> int:
    """Adjacent maps of a lane: the widest load if the maps of a column divide by it."""
    return math.gcd(x.shape[1] // columns, LOAD_BYTES // x.element_size())


def _describe_pool(
    x: Tensor, columns: int, relu: bool, norm: bool, window: int, stride: int
) -> dict[str, Any]:
    _, maps, height, width = x.shape
    return {
        "relu": relu,
        "norm": norm,
        "MAPS": maps // columns,
        "CHANNELS": maps,
        "HEIGHT": height,
        "WIDTH": width,
        "POOLED_HEIGHT": count_windows(height, window, stride),
        "POOLED_WIDTH": count_windows(width, window, stride),
        "WINDOW": window,
        "STRIDE": stride,
    }
