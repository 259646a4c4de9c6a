"""The normalisations out of torch's own operations."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LRN_SIZE = 5
LRN_ALPHA = 1e-4
LRN_BETA = 0.75
LRN_K = 2.0

# cnorm2 of the original (layer-params-145.cfg): scale and pow; k is 1, minDiv came later.
SPATIAL_SIZE = 5
SPATIAL_SCALE = 1e-3

# Numbers worked on at a time on a CPU. One thread: few enough that all intermediate values stay in
# its cache, which makes the layer 2 to 3 times as fast as going over the whole batch operation by
# operation. Several threads: enough for each to outweigh waking it for every operation (with two
# threads a whole evaluation is 1.7 times as fast as with the small chunk).
_CHUNK = 150_000
_CHUNK_PER_THREAD = 600_000


class Norm(torch.autograd.Function):
    """`local_response_norm`, for any device and any float.

    With s = k + alpha/size * sum, s^-.75 is two square roots and the sum a product with a band
    matrix: no power, no transposition. Only x is kept: to compute s again is quicker than to store.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int, relu: bool) -> Tensor:
        """Take [b, columns * maps, h, w]."""
        x = dense(x)
        ctx.save_for_backward(x)
        ctx.columns, ctx.relu = columns, relu
        y = torch.empty_like(x)
        window = _Window(x, columns)
        with torch.autocast(x.device.type, enabled=False):
            for part, out in zip(window.parts(x), window.parts(y), strict=True):
                wide = window.widened(part, relu)
                root = window.inverse_root(wide)
                out.copy_(root.sqrt().mul_(root).mul_(wide))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Take the gradient of the output."""
        (x,) = ctx.saved_tensors
        gradient = laid_out_as(x, gradient)
        result = torch.empty_like(x)
        window = _Window(x, ctx.columns)
        with torch.autocast(x.device.type, enabled=False):
            for part, above, out in zip(
                window.parts(x), window.parts(gradient), window.parts(result), strict=True
            ):
                wide = window.widened(part, ctx.relu)
                root = window.inverse_root(wide)
                direct = root.sqrt().mul_(root).mul_(above)
                others = window.sum((direct * wide).mul_(root).mul_(root))
                found = direct.addcmul_(others, wide, value=-2 * LRN_BETA)
                out.copy_(found.masked_fill_(part <= 0, 0) if ctx.relu else found)
        return result, None, None


def traceable_norm(x: Tensor, columns: int, relu: bool) -> Tensor:
    """`local_response_norm` as one expression, for `torch.compile` to make a kernel of."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(_working(x)).unflatten(1, (columns, -1))
        if relu:
            wide = wide.relu()
        maps, edge = wide.shape[2], LRN_SIZE // 2
        squares = F.pad(wide * wide, (0, 0, 0, 0, edge, edge))
        total = squares[:, :, :maps]
        for i in range(1, LRN_SIZE):
            total = total + squares[:, :, i : i + maps]
        root = (LRN_K + LRN_ALPHA / LRN_SIZE * total).rsqrt()
        return cast(Tensor, (wide * root * root.sqrt()).flatten(1, 2).to(x.dtype))


class Spatial(torch.autograd.Function):
    """`spatial_response_norm`, for any device and any float."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Take [b, maps, h, w]."""
        ctx.save_for_backward(x)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(_working(x))
            root = _spatial_root(wide)
            return root.sqrt().mul_(root).mul_(wide).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Take the gradient of the output."""
        (x,) = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(_working(x))
            root = _spatial_root(wide)
            direct = root.sqrt().mul_(root).mul_(gradient)
            others = _box_mean(root.square_().mul_(direct).mul_(wide))
            return direct.addcmul_(others, wide, value=-2 * LRN_BETA * SPATIAL_SCALE).to(x.dtype)


def _spatial_root(wide: Tensor) -> Tensor:
    """s^-.5"""
    return _box_mean(wide * wide).mul_(SPATIAL_SCALE).add_(1.0).rsqrt_()


def _box_mean(x: Tensor) -> Tensor:
    """The sum over the pixels around, divided by the full window's number of them."""
    return F.avg_pool2d(x, SPATIAL_SIZE, stride=1, padding=SPATIAL_SIZE // 2)


class _Window:
    """The sums over neighbouring maps, alpha/size times, on the cheapest view of x's layout.

    Channels last: rows [b * h * w * columns, maps]. Otherwise: matrices [b * columns, maps, h * w].
    """

    def __init__(self, x: Tensor, columns: int) -> None:
        self.maps = x.shape[1] // columns
        self.dtype = _working(x)
        self.rows = is_channels_last(x)
        place = torch.arange(self.maps, device=x.device)
        near = (place[:, None] - place).abs() <= LRN_SIZE // 2
        self.band = near.to(self.dtype) * (LRN_ALPHA / LRN_SIZE)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Views that together are x."""
        if self.rows:
            view = x.permute(0, 2, 3, 1).view(-1, self.maps)
        else:
            view = x.view(-1, self.maps, x.shape[2] * x.shape[3])
        if x.device.type != "cpu":
            return (view,)
        threads = torch.get_num_threads()
        chunk = _CHUNK if threads == 1 else _CHUNK_PER_THREAD * threads
        return view.split(max(1, chunk // max(1, view[0].numel() if len(view) else 1)))

    def widened(self, part: Tensor, relu: bool) -> Tensor:
        wide = part.to(self.dtype)
        return wide.relu() if relu else wide

    def sum(self, part: Tensor) -> Tensor:
        """Each number's sum over its window, alpha/size times."""
        return part @ self.band if self.rows else self.band @ part

    def inverse_root(self, part: Tensor) -> Tensor:
        """s^-.5"""
        return self.sum(part * part).add_(LRN_K).rsqrt_()


def _working(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """Whether the maps of a pixel lie side by side and nothing lies between pixels."""
    return x.is_contiguous(memory_format=torch.channels_last)


def dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous in one of the two memory formats, else a copy that is."""
    return x if is_channels_last(x) else x.contiguous()


def laid_out_as(x: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` in the memory format of x."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return gradient.contiguous(memory_format=layout)
