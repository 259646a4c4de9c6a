"""What the network has in another form than torch, what follows its layers, and seeds.

The dropout of the paper, its masks a pure function of where a sample stands in the stream.

The same sample gets the same mask in any number of replicas, cut into any micro-batches, after any
restart, and on a CPU as on a GPU: no generator has a state to lose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.norm import (
    local_contrast_norm,
    local_response_norm,
    norm_pool,
    padded_images,
    spatial_response_norm,
)

BITS = 64
"""Units that share a word."""
_GOLDEN = 0x9E3779B97F4A7C15
_MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def dropout(x: Tensor, mask: Tensor | None) -> Tensor:
    """The dropout of the paper (section 4.2), which rescales at test time, not in training.

    Args:
        x: float [b, units].
        mask: [b, units] of 0 and 1 in training; None at test time, when every unit is halved.
    """
    return x * 0.5 if mask is None else x * mask.to(x.dtype)


def dropout_mask(position: int, batch: int, units: int, device: torch.device, key: int) -> Tensor:
    """The mask of some samples: a bit each of SplitMix64 (Steele, Lea, Flood 2014) on a counter.

    Args:
        position: of the first sample in the stream of the whole job; row i is position + i.
        batch: samples.
        units: of the layer in this column.
        device: for the mask.
        key: of layer, column and run, any 64 bits.

    Returns:
        uint8 [batch, units], 0 or 1 with equal chance.
    """
    words = -(-units // BITS)
    samples = torch.arange(position, position + batch, device=device)
    columns = torch.arange(1, words + 1, device=device)
    # int64 wraps as uint64 does; only shifts to the right have to be told about the sign.
    start = _mix(samples + _signed(key))
    drawn = _mix(start[:, None] + columns * _signed(_GOLDEN))
    octets = drawn.view(torch.uint8)  # [batch, words * 8]
    shifts = torch.arange(8, device=device, dtype=torch.uint8)
    return ((octets[:, :, None] >> shifts) & 1).flatten(1)[:, :units]


def _mix(word: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of 64-bit words in which every bit matters."""
    for shift, factor in _MIXERS:
        word = (word ^ _right(word, shift)) * _signed(factor)
    return word ^ _right(word, 31)


def _right(word: Tensor, shift: int) -> Tensor:
    """Shift to the right as if the words had no sign."""
    return (word >> shift) & ((1 << (BITS - shift)) - 1)


def _signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63


# What is quicker in one pass over memory than in several.
PASSES = (("relu", "norm", "pool"), ("norm", "pool"), ("relu", "pool"), ("relu", "norm"))

__all__ = [
    "ImageConv",
    "ShrunkConv",
    "local_contrast_norm",
    "local_response_norm",
    "norm_pool",
    "seed_of",
    "spatial_response_norm",
    "together",
]


class ImageConv(nn.Conv2d):
    """The first convolution: reads the image, with zeros on its right and at its bottom only.

    The original's convolutions rounded the size of their output up and read 0 outside the image
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
        """Images of just the size the filters cover, channels last.

        Args:
            images: float [b, c, h, w].
            dtype: of the result.
            more: columns of zeros beyond the edge.
        """
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (
            (n + self.edge - kernel) // stride * stride + kernel for n in pictures.shape[2:]
        )
        return padded_images(pictures, height, width + more, dtype)


class ShrunkConv(nn.Conv2d):
    """The first convolution of a network for small images: reads means of squares of pixels.

    Args:
        maps: output maps.
        kernel: side of the filters, in squares.
        pad: zeros added on all sides, in squares.
        shrink: side of the squares, in pixels; what is left at the right and bottom is cut off.
    """

    def __init__(
        self,
        inputs: int,
        maps: int,
        kernel: int,
        pad: int,
        shrink: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(inputs, maps, kernel, padding=pad, device=device)
        self.shrink = shrink

    def forward(self, pictures: Tensor) -> Tensor:
        """[b, inputs, h, w] -> [b, maps, ...], channels last."""
        small = F.avg_pool2d(pictures, self.shrink)
        return super().forward(small.contiguous(memory_format=torch.channels_last))


def _working_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def seed_of(*key: object) -> int:
    """A 64-bit seed for `key`. Hashed, so that neighbouring keys give unrelated streams."""
    return (
        int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest()[:8], "little")
        >> 1
    )


def together(operations: Sequence[str]) -> list[tuple[str, ...]]:
    """Cut operations that follow each other into those that one pass does; dropout is left out."""
    found: list[tuple[str, ...]] = []
    rest = tuple(operation for operation in operations if operation != "dropout")
    while rest:
        taken = next((p for p in PASSES if rest[: len(p)] == p), rest[:1])
        found.append(taken)
        rest = rest[len(taken) :]
    return found
