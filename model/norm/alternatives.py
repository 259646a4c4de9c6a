"""Local contrast normalisation (Jarrett, Kavukcuoglu, Ranzato, LeCun 2009), per column.

Batch normalisation (Ioffe and Szegedy 2015), its running statistics moved once a step.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BATCH_MOMENTUM = 0.1
"""Share of a step's statistics in the running ones, as torch has it."""


class BatchNorm(nn.BatchNorm2d):
    """torch's, but a forward pass only notes the statistics; `update_running_stats` applies them.

    torch moves the running ones in each forward pass. Here a step may be several passes, of
    micro-batches and in several replicas: all are averaged, and move them once. So they are the
    same however a batch is shared out, as long as the images that are normalised together are.
    What is normalised together is a micro-batch, in the process that computes it: training asks no
    other replica for its statistics.

    Each map has its own numbers, and so two columns in one process are what they are in two.

    Args:
        maps: of the columns here.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, maps: int) -> None:
        super().__init__(maps, momentum=BATCH_MOMENTUM)
        self.num_batches_tracked = None
        self._noted: Tensor | None = None
        self._pictures = 0

    def forward(self, x: Tensor) -> Tensor:
        """[b, maps, h, w]: with the statistics of x in training, else with the running ones."""
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        noted = torch.zeros_like(torch.stack((self.running_mean, self.running_var)))
        y = F.batch_norm(
            x, noted[0], noted[1], self.weight, self.bias, True, momentum=1.0, eps=self.eps
        )
        noted = noted * len(x)  # not in place: the backward pass keeps it
        self._noted = noted if self._noted is None else self._noted + noted
        self._pictures += len(x)
        return y

    def take(self) -> Tensor | None:
        """Mean and variance of each map, [2, maps], over what was seen since the last call.

        Means over the passes, each with the weight of its images; the variance is that within
        a pass (unbiased, as torch has it). None if nothing was seen in training.
        """
        if self._noted is None:
            return None
        found = self._noted / self._pictures
        self._noted, self._pictures = None, 0
        return found

    @torch.no_grad()
    def update_running_stats(self, statistics: Tensor) -> None:
        """Move the running statistics towards those of a step, [2, maps]."""
        self.running_mean.lerp_(statistics[0], BATCH_MOMENTUM)
        self.running_var.lerp_(statistics[1], BATCH_MOMENTUM)


LCN_SIZE = 9
LCN_DEVIATION = LCN_SIZE / 4
"""Of the Gaussian, in pixels. The paper gives none; this is Torch7's, from the same laboratory."""
LCN_FLOOR = 1e-4
"""Smallest divisor: where an image has no contrast at all, there is nothing to raise it to."""


def local_contrast_norm(x: Tensor, columns: int = 1) -> Tensor:
    """Local contrast normalisation: subtractive, then divisive.

        v_ijk = x_ijk - sum over i, p, q of w_pq * x_i,j+p,k+q
        y_ijk = v_ijk / max(c, s_jk)    s_jk^2 = sum over i, p, q of w_pq * v_i,j+p,k+q^2

    The sums run over all maps i of a column and 9x9 pixels; the Gaussian w has a sum of 1 over
    both. c is the mean of s over the pixels of an image (of its column), and has its part in the
    gradient. At the borders w is divided by what of it lies inside, so that a constant is taken to
    0 there, too. In float32 even where x is bfloat16. Besides x only numbers of a pixel are kept
    for the backward pass, none of a map.

    Args:
        x: float [b, columns * maps, h, w], any strides.
        columns: how many columns' maps x holds, one column after the other.

    Returns:
        as x, in its dtype and memory format.

    Raises:
        ValueError: x has another number of dimensions, or maps that do not divide by `columns`.
    """
    if x.dim() != 4 or columns < 1 or x.shape[1] % columns:
        raise ValueError(
            f"x is {list(x.shape)}; it must be [b, columns * maps, h, w] with {columns} columns"
        )
    return cast(Tensor, _Contrast.apply(x, columns))


class _Contrast(torch.autograd.Function):
    """Over maps there are sums and one multiply-add each way; all else is done per pixel.

    With m the weighted mean: v = x - m, and mean v^2 = mean x^2 - 2 m mean x + m^2 would save a
    pass, but loses its digits where the contrast is low; so v is made and squared.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            wide = _columns(x, columns)
            rows, across = _weights(x.shape[2], wide), _weights(x.shape[3], wide)
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
            wide, above = _columns(x, ctx.columns), _columns(gradient, ctx.columns)
            rows, across = _weights(x.shape[2], wide), _weights(x.shape[3], wide)
            maps = wide.shape[2]
            least = sigma.mean((3, 4), keepdim=True)
            divisor = torch.maximum(sigma, least)
            v = wide - mean
            # dL/d(divisor), then of sigma: its own, or by way of the mean of all.
            slope = -_dot(above, v) / divisor.square()
            own = sigma >= least
            shared = slope.masked_fill(own, 0).mean((3, 4), keepdim=True)
            slope = torch.where(own, slope, torch.zeros_like(slope)) + shared
            slope = slope.masked_fill(sigma <= LCN_FLOOR, 0) / (2 * sigma)
            factor = _blur(slope, rows.t(), across.t()) * (2 / maps)
            # dL/dv = above / divisor + factor * v; of x, less what its mean had of it.
            total = above.sum(2, keepdim=True) / divisor + factor * v.sum(2, keepdim=True)
            back = _blur(total, rows.t(), across.t()) / maps
            found = v.mul_(factor).addcdiv_(above, divisor).sub_(back)
            return found.flatten(1, 2).to(x.dtype), None


def _columns(x: Tensor, columns: int) -> Tensor:
    """[b, columns, maps, h, w] in the float that is computed in."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(dtype).unflatten(1, (columns, -1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum of products over the maps, [b, columns, 1, h, w]."""
    return (a * b).sum(2, keepdim=True)


def _blur(x: Tensor, rows: Tensor, across: Tensor) -> Tensor:
    """Weighted means over pixels of [..., h, w]; the Gaussian is one of rows times one across."""
    return rows @ x.contiguous() @ across.t()


def _weights(size: int, like: Tensor) -> Tensor:
    return _gauss(size, like.dtype, like.device)


@lru_cache(maxsize=16)
def _gauss(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[size, size]: each pixel's weights for those around, with a sum of 1."""
    place = torch.arange(size, dtype=torch.float64)
    far = (place[:, None] - place).abs()
    weights = torch.exp(-0.5 * (far / LCN_DEVIATION).square())
    weights = weights.masked_fill(far > LCN_SIZE // 2, 0)
    return (weights / weights.sum(1, keepdim=True)).to(dtype=dtype, device=device)
