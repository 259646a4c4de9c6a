"""The CPU's kernels, called by the addresses of tensors.

No compiler, or one that fails, is no error: `takes` says no and torch's own operations do the work.
Set DUET_KERNELS=torch to do without.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from functools import lru_cache

import torch
from torch import Tensor

from model.norm import build
from model.norm.reference import (
    LRN_ALPHA,
    LRN_K,
    LRN_SIZE,
    SPATIAL_SCALE,
    SPATIAL_SIZE,
    is_channels_last,
)

MOST_WINDOW = 4
"""Largest pooling window of the kernels, as in kernels.c."""
COLOURS = 3
"""Of the pictures that the kernels take, as in kernels.c."""
_SUFFIXES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float64: "float64"}
_LONG, _INT, _DOUBLE, _POINTER = ctypes.c_long, ctypes.c_int, ctypes.c_double, ctypes.c_void_p
_NORM = (*[_POINTER] * 3, *[_LONG] * 6, _DOUBLE, _DOUBLE, _INT, _INT)
_POOL = (*[_POINTER] * 3, *[_LONG] * 7, _DOUBLE, _DOUBLE, _INT, _INT, _INT)

_SPATIAL = (*[_POINTER] * 3, *[_LONG] * 4, _DOUBLE, _INT)
_PICTURES = (*[_POINTER] * 2, *[_LONG] * 5, _INT)
_KERNELS = (("norm", _NORM), ("pool", _POOL), ("spatial", _SPATIAL), ("pictures", _PICTURES))


def takes(x: Tensor) -> bool:
    """Whether `norm` can work on x; compiles the kernels when it is first asked."""
    return x.device.type == "cpu" and x.dtype in _SUFFIXES and _library()[0] is not None


def pools(x: Tensor, window: int) -> bool:
    """Whether `pool` can work on x."""
    return window <= MOST_WINDOW and is_channels_last(x) and takes(x)


def takes_pictures(x: Tensor, height: int, width: int, dtype: torch.dtype) -> bool:
    """Whether `pictures` can work on x."""
    colours, h, w = x.shape[1:]
    fits = colours == COLOURS and h <= height and w <= width and x.is_contiguous()
    return fits and x.dtype == torch.float32 and dtype in _SUFFIXES and takes(x)


def described() -> str:
    """Say whether the kernels are in use, or why not."""
    return _library()[1]


def norm(x: Tensor, above: Tensor | None, columns: int, relu: bool) -> Tensor:
    """Return the normalised x, or with `above`, the gradient of that, the gradient of x.

    Args:
        x: bfloat16, float32 or float64 [b, columns * maps, h, w], dense in either format.
        above: of the same shape, dtype and memory format.
        columns: whose maps x holds.
        relu: whether max(x, 0) is meant.
    """
    y = torch.empty_like(x)
    images, maps, height, width = x.shape
    map_step, pixel_step = (1, maps) if is_channels_last(x) else (height * width, 1)
    sizes = (images, height * width, columns, maps // columns, map_step, pixel_step)
    _call("norm", x, above, y, *sizes, LRN_K, LRN_ALPHA / LRN_SIZE, relu)
    return y


def pool(
    x: Tensor,
    above: Tensor | None,
    columns: int,
    relu: bool,
    norm: bool,
    window: int,
    stride: int,
) -> Tensor:
    """Return the pooled x, or with `above`, the gradient of that, the gradient of x.

    Args:
        x: bfloat16, float32 or float64 [b, columns * maps, h, w], channels last.
        above: [b, columns * maps, pooled height, pooled width], same dtype and format.
        columns: whose maps x holds.
        relu: whether max(x, 0) is meant.
        norm: whether x is normalised before.
        window: at most MOST_WINDOW, h and w.
        stride: at most `window`.
    """
    images, maps, *sides = x.shape
    y = torch.empty_like(x)
    if above is None:
        pooled = [-(-(side - window) // stride) + 1 for side in sides]
        y = x.new_empty((images, *pooled, maps)).permute(0, 3, 1, 2)
    sizes = (images, *sides, columns, maps // columns, window, stride)
    _call("pool", x, above, y, *sizes, LRN_K, LRN_ALPHA / LRN_SIZE, relu, norm)
    return y


def spatial(x: Tensor, above: Tensor | None) -> Tensor:
    """Return x normalised over the pixels around, or with `above`, the gradient of that, that of x.

    Args:
        x: bfloat16, float32 or float64 [b, maps, h, w], dense in either format.
        above: of the same shape, dtype and memory format.
    """
    y = torch.empty_like(x)
    images, maps, height, width = x.shape
    if not is_channels_last(x):  # each map is an image of its own
        images, maps = images * maps, 1
    _call("spatial", x, above, y, images, height, width, maps, SPATIAL_SCALE / SPATIAL_SIZE**2)
    return y


def pictures(x: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return x with zeros on its right and at its bottom, channels last.

    Args:
        x: float32 [b, COLOURS, h, w], contiguous.
        height: of the result, at least h.
        width: of the result, at least w.
        dtype: of the result: bfloat16, float32 or float64.
    """
    images, colours, *sides = x.shape
    y = x.new_empty((images, height, width, colours), dtype=dtype)
    sizes = (images, *sides, height, width, torch.get_num_threads())
    getattr(_library()[0], f"pictures_{_SUFFIXES[dtype]}")(x.data_ptr(), y.data_ptr(), *sizes)
    return y.permute(0, 3, 1, 2)


def _call(name: str, x: Tensor, above: Tensor | None, y: Tensor, *settings: float) -> None:
    library = _library()[0]
    failed: int = getattr(library, f"{name}_{_SUFFIXES[x.dtype]}")(
        x.data_ptr(),
        None if above is None else above.data_ptr(),
        y.data_ptr(),
        *settings,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the working space of the normalisation")


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The kernels, and a description; or None and the reason."""
    try:
        if os.environ.get("DUET_KERNELS") == "torch":
            raise build.Unavailable("DUET_KERNELS=torch")
        library, compiler = build.kernels()
    except (build.Unavailable, OSError, subprocess.SubprocessError) as error:
        return None, f"torch operations, as there are no compiled kernels: {error}"
    for name, arguments in _KERNELS:
        for suffix in _SUFFIXES.values():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, ctypes.c_int
    return library, f"kernels compiled by {compiler}"
