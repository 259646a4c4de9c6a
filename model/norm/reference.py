"""Response normalizations in torch's own operations, for any device: fallback and oracle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Response:
    """Constants of the local response normalization; the defaults are the paper's (section 3.3)."""

    size: int = 5
    """n: maps in the window, an odd number."""
    k: float = 2.0
    alpha: float = 1e-4
    """Divided by `size`, as in the original source (layer.py)."""
    beta: float = 0.75

    @property
    def scale(self) -> float:
        """Factor on the sum of the squares in a window."""
        return self.alpha / self.size

    @property
    def has_kernels(self) -> bool:
        """True if compiled kernels take the constants: any k and alpha, the paper's n and beta."""
        return (self.size, self.beta) == (5, 0.75)


PAPER = Response()
LRN_SIZE, LRN_K, LRN_ALPHA, LRN_BETA = PAPER.size, PAPER.k, PAPER.alpha, PAPER.beta

# cnorm2 of the original (layer-params-145.cfg): scale and pow; k is 1, minDiv came later.
SPATIAL_SIZE = 5
SPATIAL_SCALE = 1e-3

# Numbers worked on at a time on a CPU. One thread: few enough that all intermediate values stay in
# its cache, which makes the layer 2 to 3 times as fast as going over the whole batch operation by
# operation. Several threads: enough for each to outweigh waking it for every operation (with two
# threads a whole evaluation is 1.7 times as fast as with the small chunk).
_CHUNK = 150_000
_CHUNK_PER_THREAD = 600_000


def count_windows(side: int, window: int, stride: int) -> int:
    """Number of pooling windows along a side; the last one may stick out (layer.py rounds up)."""
    return -(-(side - window) // stride) + 1


def normalize(
    x: Tensor, gradient: Tensor | None, columns: int, relu: bool, response: Response = PAPER
) -> Tensor:
    """Arguments and result as in `model.norm.native.normalize`, on any device, in any float dtype.

    With s = k + alpha/size * sum, s^-.75 is two square roots and the sum a product with a band
    matrix: no power (unless beta is another), no transposition. The backward pass computes s again:
    that is faster than storing it.
    """
    result = torch.empty_like(x)
    maps, is_last = x.shape[1] // columns, is_channels_last(x)
    index = torch.arange(maps, device=x.device)
    near = (index[:, None] - index).abs() <= response.size // 2
    band = near.to(compute_dtype(x)) * response.scale

    def sum_window(part: Tensor) -> Tensor:
        """Each number's sum over its window, alpha/size times."""
        return part @ band if is_last else band @ part

    slopes = x if gradient is None else gradient
    with torch.autocast(x.device.type, enabled=False):
        parts = (_split(tensor, maps) for tensor in (x, slopes, result))
        for part, dy, out in zip(*parts, strict=True):
            wide = part.to(band.dtype)
            wide = wide.relu() if relu else wide
            root = sum_window(wide * wide).add_(response.k).rsqrt_()  # s^-.5
            power = _raise_root(root, response.beta)
            if gradient is None:
                out.copy_(power.mul_(wide))
                continue
            direct = power.mul_(dy)
            others = sum_window((direct * wide).mul_(root).mul_(root))
            dx = direct.addcmul_(others, wide, value=-2 * response.beta)
            out.copy_(dx.masked_fill_(part <= 0, 0) if relu else dx)
    return result


def _raise_root(root: Tensor, beta: float) -> Tensor:
    """s^-beta of s^-.5, in new memory."""
    return root.sqrt().mul_(root) if beta == LRN_BETA else root.pow(2 * beta)


def _split(x: Tensor, maps: int) -> tuple[Tensor, ...]:
    """Views that together are x, in the form in which sums over maps are cheapest.

    Channels last: rows [b * h * w * columns, maps]. Otherwise: matrices [b * columns, maps, h * w].
    """
    if is_channels_last(x):
        view = x.permute(0, 2, 3, 1).view(-1, maps)
    else:
        view = x.view(-1, maps, x.shape[2] * x.shape[3])
    if x.device.type != "cpu":
        return (view,)
    threads = torch.get_num_threads()
    chunk = _CHUNK if threads == 1 else _CHUNK_PER_THREAD * threads
    return view.split(max(1, chunk // max(1, view[0].numel() if len(view) else 1)))


def traceable_norm(x: Tensor, columns: int, relu: bool, response: Response = PAPER) -> Tensor:
    """`local_response_norm` as one expression, from which `torch.compile` makes a kernel."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(compute_dtype(x)).unflatten(1, (columns, -1))
        if relu:
            wide = wide.relu()
        maps, edge = wide.shape[2], response.size // 2
        squares = F.pad(wide * wide, (0, 0, 0, 0, edge, edge))
        total = squares[:, :, :maps]
        for i in range(1, response.size):
            total = total + squares[:, :, i : i + maps]
        root = (response.k + response.scale * total).rsqrt()
        if response.beta != LRN_BETA:
            return (wide * root ** (2 * response.beta)).flatten(1, 2).to(x.dtype)
        return (wide * root * root.sqrt()).flatten(1, 2).to(x.dtype)


def normalize_spatial(x: Tensor, gradient: Tensor | None) -> Tensor:
    """Arguments and result as in `native.normalize_spatial`, on any device, in any float dtype."""
    with torch.autocast(x.device.type, enabled=False):
        wide = x.to(compute_dtype(x))
        root = _average_box(wide * wide).mul_(SPATIAL_SCALE).add_(1.0).rsqrt_()
        if gradient is None:
            return root.sqrt().mul_(root).mul_(wide).to(x.dtype)
        direct = root.sqrt().mul_(root).mul_(gradient)
        others = _average_box(root.square_().mul_(direct).mul_(wide))
        return direct.addcmul_(others, wide, value=-2 * LRN_BETA * SPATIAL_SCALE).to(x.dtype)


def _average_box(x: Tensor) -> Tensor:
    """Sum over the pixels around, divided by the number of pixels of a full window."""
    return F.avg_pool2d(x, SPATIAL_SIZE, stride=1, padding=SPATIAL_SIZE // 2)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type to compute in: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_channels_last(x: Tensor) -> bool:
    """True if the maps of a pixel are adjacent in memory, and nothing lies between pixels."""
    return x.is_contiguous(memory_format=torch.channels_last)


def to_dense(x: Tensor) -> Tensor:
    """x itself if it is contiguous in one of the two memory formats, else a copy that is."""
    return x if is_channels_last(x) else x.contiguous()


def match_layout(x: Tensor, gradient: Tensor) -> Tensor:
    """`gradient` in the memory format of x."""
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return gradient.contiguous(memory_format=layout)


def check_shape(x: Tensor, columns: int) -> None:
    """Refuse anything but the maps of whole columns.

    Raises:
        ValueError: x has another number of dimensions, or maps that do not divide by `columns`.
    """
    if x.dim() != 4 or columns < 1 or x.shape[1] % columns:
        raise ValueError(
            f"x is {list(x.shape)}; it must be [b, columns * maps, h, w] with {columns} columns"
        )
