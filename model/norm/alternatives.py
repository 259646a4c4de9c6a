"""Alternatives to response normalization: batch normalization (Ioffe and Szegedy 2015), and
local contrast normalization (Jarrett, Kavukcuoglu, Ranzato, LeCun 2009).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.norm.reference import check_shape, compute_dtype

BATCH_MOMENTUM = 0.1
"""Weight of a step's statistics in the running ones; torch's default."""
LCN_SIZE = 9
LCN_DEVIATION = LCN_SIZE / 4
"""Standard deviation of the Gaussian, in pixels. The paper gives none; this is Torch7's, from the
same laboratory."""
LCN_FLOOR = 1e-4
"""Smallest divisor, for images without any contrast."""


class BatchNorm(nn.BatchNorm2d):
    """torch's `BatchNorm2d`, except that its running statistics are updated once a step.

    torch updates them in each forward pass. Here a step may be several passes, of micro-batches and
    in several replicas: a pass only collects its statistics, and `update_running_stats` applies
    their average. So they do not depend on how a batch is split, as long as the same images are
    normalized together. Those are a micro-batch, in the process that computes it: no statistics are
    exchanged between replicas in training.

    Statistics are per map: two columns give the same numbers in one process as in two.

    Args:
        maps: number of maps of the columns in this process.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, maps: int) -> None:
        super().__init__(maps, momentum=BATCH_MOMENTUM)
        self.num_batches_tracked = None
        self._sums: Tensor | None = None
        self._images = 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x, [b, maps, h, w]: in training by its own statistics, else by running ones."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        found = torch.zeros_like(torch.stack((self.running_mean, self.running_var)))
        y = F.batch_norm(
            x, found[0], found[1], self.weight, self.bias, True, momentum=1.0, eps=self.eps
        )
        found = found * len(x)  # not in place: the backward pass keeps it
        self._sums = found if self._sums is None else self._sums + found
        self._images += len(x)
        return y

    def take_statistics(self) -> Tensor | None:
        """Mean and variance of each map, [2, maps], over the passes since the last call.

        Each pass is weighted by its number of images; the variance is that within a pass
        (unbiased, as in torch). None without a pass in training mode.
        """
        if self._sums is None:
            return None
        found = self._sums / self._images
        self._sums, self._images = None, 0
        return found

    @torch.no_grad()
    def update_running_stats(self, statistics: Tensor) -> None:
        """Move the running statistics towards those of a step, float [2, maps]."""
        self.running_mean.lerp_(statistics[0], BATCH_MOMENTUM)
        self.running_var.lerp_(statistics[1], BATCH_MOMENTUM)


def local_contrast_norm(x: Tensor, columns: int = 1) -> Tensor:
    """Local contrast normalization: subtractive, then divisive.

        v_ijk = x_ijk - sum over i, p, q of w_pq * x_i,j+p,k+q
        y_ijk = v_ijk / max(c, s_jk)    s_jk^2 = sum over i, p, q of w_pq * v_i,j+p,k+q^2

    The sums run over all maps i of a column and 9x9 pixels; the Gaussian w has a sum of 1 over
    both. c is the mean of s over the pixels of an image (of its column), and the gradient includes
    it. At the borders w is divided by its sum inside the image, so that a constant becomes 0 there,
    too. Computed in float32 even where x is bfloat16. Besides x only numbers per pixel are kept for
    the backward pass, none per map.

    Args:
        x: float [b, columns * maps, h, w], any strides.
        columns: number of columns whose maps x holds, one column after the other.

    Returns:
        As x, in its dtype and memory format.

    Raises:
        ValueError: x has another number of dimensions, or maps that do not divide by `columns`.
    """
    check_shape(x, columns)
    return _Contrast.apply(x, columns)


class _Contrast(torch.autograd.Function):
    """Each pass makes sums and one multiply-add over the maps; the rest is computed per pixel.

    With m the weighted mean: v = x - m, and mean v^2 = mean x^2 - 2 m mean x + m^2 would save a
    pass, but cancels where the contrast is low; so v is computed and squared.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = _split_columns(x, columns)
            rows, across = (_make_gaussian(side, wide.dtype, wide.device) for side in x.shape[2:])
            mean = _blur(wide.mean(2, keepdim=True), rows, across)
            v = wide - mean
            squares = _blur(_dot(v, v) / v.shape[2], rows, across)
            sigma = squares.clamp_min(LCN_FLOOR**2).sqrt()
            least = sigma.mean((3, 4), keepdim=True)
            ctx.save_for_backward(x, mean, sigma)
            ctx.columns = columns
            return v.div_(torch.maximum(sigma, least)).flatten(1, 2).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, mean, sigma = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            wide, dy = _split_columns(x, ctx.columns), _split_columns(gradient, ctx.columns)
            rows, across = (_make_gaussian(side, wide.dtype, wide.device) for side in x.shape[2:])
            maps = wide.shape[2]
            least = sigma.mean((3, 4), keepdim=True)
            divisor = torch.maximum(sigma, least)
            v = wide - mean
            # dL/d(divisor), then dL/d(sigma): directly, or through the mean of all.
            slope = -_dot(dy, v) / divisor.square()
            own = sigma >= least
            shared = slope.masked_fill(own, 0).mean((3, 4), keepdim=True)
            slope = torch.where(own, slope, torch.zeros_like(slope)) + shared
            slope = slope.masked_fill(sigma <= LCN_FLOOR, 0) / (2 * sigma)
            factor = _blur(slope, rows.t(), across.t()) * (2 / maps)
            # dL/dv = dy / divisor + factor * v; dL/dx subtracts the part through the mean.
            total = dy.sum(2, keepdim=True) / divisor + factor * v.sum(2, keepdim=True)
            back = _blur(total, rows.t(), across.t()) / maps
            dx = v.mul_(factor).addcdiv_(dy, divisor).sub_(back)
            return dx.flatten(1, 2).to(x.dtype), None


def _split_columns(x: Tensor, columns: int) -> Tensor:
    """[b, columns, maps, h, w] in the dtype to compute in."""
    return x.to(compute_dtype(x)).unflatten(1, (columns, -1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over the maps, [b, columns, 1, h, w]."""
    return (a * b).sum(2, keepdim=True)


def _blur(x: Tensor, rows: Tensor, across: Tensor) -> Tensor:
    """Weighted means over pixels of [..., h, w]; the Gaussian is one of rows times one across."""
    return rows @ x.contiguous() @ across.t()


@lru_cache(maxsize=16)
def _make_gaussian(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size]: each pixel's weights for the pixels around, with a sum of 1."""
    index = torch.arange(size, dtype=torch.float64)
    distance = (index[:, None] - index).abs()
    weights = torch.exp(-0.5 * (distance / LCN_DEVIATION).square())
    weights = weights.masked_fill(distance > LCN_SIZE // 2, 0)
    return (weights / weights.sum(1, keepdim=True)).to(dtype=dtype, device=device)
