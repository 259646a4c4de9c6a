"""The layers of the 2012 network that torch lacks, or has in another form."""

from __future__ import annotations

import hashlib
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LRN_SIZE = 5
LRN_ALPHA = 1e-4
LRN_BETA = 0.75
LRN_K = 2.0

# Numbers worked on at a time on a CPU. One thread: few enough that all intermediate values stay in
# its cache, which makes the layer 2 to 3 times as fast as going over the whole batch operation by
# operation. Several threads: enough for each to outweigh waking it for every operation (with two
# threads a whole evaluation is 1.7 times as fast as with the small chunk).
_CHUNK = 150_000
_CHUNK_PER_THREAD = 600_000


def local_response_norm(x: Tensor, columns: int = 1) -> Tensor:
    """Local response normalisation across the maps of a column (paper section 3.3).

        y_i = x_i / (k + alpha/size * sum of x_j^2 over the 5 maps j = i-2 .. i+2)^0.75

    The window is cut off at the first and the last map of its column and never reaches into the
    other one. alpha is divided by the window size, as in the original source (layer.py) and in
    `torch.nn.LocalResponseNorm`; the formula printed in the paper leaves the division out.

    Computed in float32 even where x is bfloat16: k + alpha/size * sum is 2 and a little, and
    bfloat16 has steps of 1/64 there, more than most sums are worth: the layer would do nothing.

    Args:
        x: float [b, columns * c, h, w].
        columns: how many columns' maps x holds, one column after the other.

    Returns:
        as x, in its dtype and memory format.
    """
    return cast(Tensor, _LocalResponseNorm.apply(x, columns))


class _LocalResponseNorm(torch.autograd.Function):
    """With s = k + alpha/size * sum, s^-.75 is two square roots and the sum a product with a band
    matrix: no power, no transposition. Only x is kept: to compute s again is quicker than to store.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, columns: int) -> Tensor:
        if not _is_channels_last(x):
            x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.columns = columns
        y = torch.empty_like(x)
        window = _Window(x, columns)
        with torch.autocast(x.device.type, enabled=False):
            for part, out in zip(window.parts(x), window.parts(y), strict=True):
                wide = part.to(window.dtype)
                root = window.inverse_root(wide)
                out.copy_(root.sqrt().mul_(root).mul_(wide))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
        gradient = gradient.contiguous(memory_format=layout)
        result = torch.empty_like(x)
        window = _Window(x, ctx.columns)
        with torch.autocast(x.device.type, enabled=False):
            for part, above, out in zip(
                window.parts(x), window.parts(gradient), window.parts(result), strict=True
            ):
                wide = part.to(window.dtype)
                root = window.inverse_root(wide)
                direct = root.sqrt().mul_(root).mul_(above)
                others = window.sum((direct * wide).mul_(root).mul_(root))
                out.copy_(direct.addcmul_(others, wide, value=-2 * LRN_BETA))
        return result, None


class _Window:
    """The sums over neighbouring maps, alpha/size times, on the cheapest view of x's layout.

    Channels last: rows [b * h * w * columns, c]. Otherwise: matrices [b * columns, c, h * w].
    """

    def __init__(self, x: Tensor, columns: int) -> None:
        self.columns = columns
        self.maps = x.shape[1] // columns
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.rows = _is_channels_last(x)
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
        return view.split(max(1, chunk // max(1, view[0].numel())))

    def sum(self, part: Tensor) -> Tensor:
        """Each number's sum over its window, alpha/size times."""
        return part @ self.band if self.rows else self.band @ part

    def inverse_root(self, part: Tensor) -> Tensor:
        """s^-.5"""
        return self.sum(part * part).add_(LRN_K).rsqrt_()


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1


class PictureConv(nn.Conv2d):
    """The first convolution: reads the picture, with zeros on its right and at its bottom only.

    The original's convolutions rounded the size of their output up and read 0 outside the picture
    (layer.py, cudaconv3/src/filter_acts.cu). That is what `edge` zeros do: 224 + 3 pixels, filters
    of 11 at a stride of 4, maps of 55 x 55. Without them it would be 54.

    Args:
        maps: output maps.
        kernel: side of the filters in pixels.
        stride: of the filters, in pixels.
        edge: zeros added, in pixels.
    """

    def __init__(
        self,
        inputs: int,
        maps: int,
        kernel: int,
        stride: int,
        edge: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(inputs, maps, kernel, stride=stride, device=device)
        self.edge = edge

    def forward(self, pictures: Tensor) -> Tensor:
        """[b, inputs, h, w] -> [b, maps, (h + edge - kernel) // stride + 1, the same of w]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        dtype = _working_dtype(pictures)
        if dtype not in (torch.bfloat16, torch.float16):
            return F.conv2d(self._padded(pictures, dtype, 0), self.weight, self.bias, stride)
        # The matrix units that bfloat16 is for (AMX, tensor cores) idle on 3 input maps. Here
        # `stride` neighbouring pixels pass for maps (memory seen as [.., w / stride, stride * 3]):
        # the same sums, with filters filled up with zeros. A third off the time of the layer.
        more = -kernel % stride
        x = self._padded(pictures, dtype, more)
        b, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).view(b, h, w // stride, stride * c).permute(0, 3, 1, 2)
        weight = F.pad(self.weight, (0, more)).unflatten(3, (-1, stride))
        weight = weight.permute(0, 4, 1, 2, 3).flatten(1, 2)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias, (stride, 1))

    def _padded(self, pictures: Tensor, dtype: torch.dtype, more: int) -> Tensor:
        """Pictures of just the size the filters cover, channels last, in one pass over memory.

        Args:
            pictures: float [b, c, h, w].
            dtype: of the result.
            more: columns of zeros beyond the edge.
        """
        b, c, h, w = pictures.shape
        kernel, stride = self.kernel_size[0], self.stride[0]
        covered = [(n + self.edge - kernel) // stride * stride + kernel for n in (h, w)]
        x = pictures.new_empty((b, covered[0], covered[1] + more, c), dtype=dtype)
        x[:, h:] = 0
        x[:, :h, w:] = 0
        x[:, :h, :w] = pictures.permute(0, 2, 3, 1)[:, : covered[0], : covered[1]]
        return x.permute(0, 3, 1, 2)


def _working_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def dropout(x: Tensor, mask: Tensor | None) -> Tensor:
    """The dropout of the paper (section 4.2), which rescales at test time, not in training.

    Args:
        x: float [b, units].
        mask: [b, units] of 0 and 1 in training; None at test time, when every unit is halved.
    """
    return x * 0.5 if mask is None else x * mask.to(x.dtype)


def dropout_mask(batch: int, units: int, device: torch.device, key: tuple[object, ...]) -> Tensor:
    """The float32 mask [batch, units], 0 or 1 with equal chance, that belongs to `key`.

    The same key gives the same mask on every machine of the same device type, in every process.
    """
    generator = torch.Generator(device).manual_seed(seed_of(*key))
    return torch.empty(batch, units, device=device).bernoulli_(0.5, generator=generator)


def seed_of(*key: object) -> int:
    """A 64-bit seed for `key`. Hashed, so that neighbouring keys give unrelated streams."""
    return (
        int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()[:8], "little")
        >> 1
    )
