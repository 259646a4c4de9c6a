"""First convolutions that read the image, dropout, and how operations after a layer are grouped.

Dropout masks are a pure function of a sample's position in the stream: a sample gets the same mask
in any number of replicas, cut into any micro-batches, after any restart, and on a CPU as on a GPU.
No generator has a state to lose. Position and keys are tensors: the host waits for no device, and a
compiled network or a CUDA graph computes with those of the next step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.gpu_support import prepare_gpu_kernels
from model.norm import pad_images

# Operations that one kernel computes faster, in one pass over memory, than one by one.
FUSED = (("relu", "norm", "pool"), ("norm", "pool"), ("relu", "pool"), ("relu", "norm"))
_BITS = 64  # units that share a random word
_GPU_WORDS = 32  # random words of a program on a GPU
_GOLDEN = 0x9E3779B97F4A7C15


class ImageConv(nn.Conv2d):
    """The first convolution: reads the image, with zeros on its right and at its bottom only.

    The original's convolutions rounded the size of their output up and read 0 outside the image
    (layer.py, cudaconv3/src/filter_acts.cu). That is what `edge` zeros do: 224 + 3 pixels, filters
    of 11 at a stride of 4, maps of 55 x 55. Without them it would be 54.

    Args:
        inputs: maps of the image.
        maps: output maps.
        kernel: side of the filters in pixels.
        stride: pixels between filters.
        edge: number of rows and columns of zeros added.
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

    def forward(self, images: Tensor) -> Tensor:
        """[b, inputs, h, w] -> [b, maps, (h + edge - kernel) // stride + 1, the same of w]."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        dtype = _find_compute_dtype(images, self.weight)
        if dtype not in (torch.bfloat16, torch.float16):
            return F.conv2d(self._pad(images, dtype, 0), self.weight, self.bias, stride)
        # The matrix units that bfloat16 is for (AMX, tensor cores) idle on 3 input maps. Here
        # `stride` neighboring pixels pass for maps (memory seen as [.., w / stride, stride * 3]):
        # the same sums, with filters filled up with zeros. A third off the time of the layer.
        more = -kernel % stride
        x = self._pad(images, dtype, more)
        b, c, h, w = x.shape
        x = x.permute(0, 2, 3, 1).view(b, h, w // stride, stride * c).permute(0, 3, 1, 2)
        weight = F.pad(self.weight, (0, more)).unflatten(3, (-1, stride))
        weight = weight.permute(0, 4, 1, 2, 3).flatten(1, 2)
        weight = weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, self.bias, (stride, 1))

    def _pad(self, images: Tensor, dtype: torch.dtype, more: int) -> Tensor:
        """Images cut or padded to what the filters cover, and `more` columns of zeros."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        height, width = (
            (n + self.edge - kernel) // stride * stride + kernel for n in images.shape[2:]
        )
        return pad_images(images, height, width + more, dtype)


class ShrunkConv(nn.Conv2d):
    """The first convolution of a network for small images: reads means of squares of pixels.

    Args:
        inputs: maps of the image.
        maps: output maps.
        kernel: side of the filters, in squares.
        stride: squares between filters.
        pad: zeros added on all sides, in squares.
        shrink: side of the squares, in pixels, 1 for the pixels themselves; what is left at the
            right and bottom is cut off.
    """

    def __init__(
        self,
        inputs: int,
        maps: int,
        kernel: int,
        stride: int,
        pad: int,
        shrink: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(inputs, maps, kernel, stride, padding=pad, device=device)
        self.shrink = shrink

    def forward(self, images: Tensor) -> Tensor:
        """[b, inputs, h, w] -> [b, maps, ...], channels last."""
        wide = images.to(torch.promote_types(images.dtype, self.weight.dtype))
        small = F.avg_pool2d(wide, self.shrink) if self.shrink > 1 else wide
        return super().forward(small.contiguous(memory_format=torch.channels_last))


class ColumnLinear(nn.Linear):
    """A fully connected layer of two columns, each of which reads its own units only.

    Args:
        inputs: units that a column reads.
        units: output units of both columns; `weight` is [units, inputs], column a's first.
    """

    def __init__(self, inputs: int, units: int, device: torch.device | str | None = None) -> None:
        super().__init__(inputs, units, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 2 * inputs] -> [b, units]."""
        parts = zip(x.chunk(2, dim=1), self.weight.chunk(2), self.bias.chunk(2), strict=True)
        return torch.cat([F.linear(*part) for part in parts], dim=1)


class LocalConv(nn.Module):
    """A locally connected layer: a convolution with filters of their own at each pixel.

    The original's layer `local`; its biases, too, are of each pixel. `weight` is [maps, inputs,
    kernel, kernel, side, side], `bias` [maps, side, side]; maps of a column read those of their
    column. A matrix product for each pixel: its filters times its neighborhood, of all images.

    Args:
        inputs: maps that a column reads.
        maps: output maps of all columns.
        kernel: side of the filters in pixels, odd; zeros around keep the size of the maps.
        side: side of the maps in pixels.
        columns: number of columns.
    """

    def __init__(
        self,
        inputs: int,
        maps: int,
        kernel: int,
        side: int,
        columns: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        shape = maps, inputs, kernel, kernel, side, side
        self.weight = nn.Parameter(torch.empty(shape, device=device))
        self.bias = nn.Parameter(torch.empty((maps, side, side), device=device))
        self.kernel, self.columns = kernel, columns

    def forward(self, x: Tensor) -> Tensor:
        """[b, columns * inputs, side, side] -> [b, maps, side, side], channels last."""
        weights, biases = (value.chunk(self.columns) for value in (self.weight, self.bias))
        parts = zip(x.chunk(self.columns, dim=1), weights, biases, strict=True)
        y = torch.cat([self._connect(*part) for part in parts], dim=3)
        return y.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)

    def _connect(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Connect one column: [b, inputs, side, side] -> [side, side, b, maps]."""
        side, pad = x.shape[2], self.kernel // 2
        dtype = _find_compute_dtype(x, weight)
        around = F.pad(x.to(dtype), (pad, pad, pad, pad)).permute(2, 3, 0, 1)
        around = around.unfold(0, self.kernel, 1).unfold(1, self.kernel, 1)
        around = around.reshape(side * side, len(x), -1)  # [pixels, b, inputs * kernel * kernel]
        filters = weight.to(dtype).flatten(4).flatten(1, 3).permute(2, 1, 0)
        offsets = bias.to(dtype).flatten(1).t()[:, None]
        y = torch.baddbmm(offsets, around, filters)
        return y.view(side, side, len(x), -1)


def _find_compute_dtype(images: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype or else that of the weights: what images are cast to, in the first pass."""
    device = images.device.type
    if torch.is_autocast_enabled(device) and images.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def group_operations(operations: Sequence[str]) -> list[tuple[str, ...]]:
    """Group the operations after a layer by what is computed in one pass; dropout is left out."""
    groups: list[tuple[str, ...]] = []
    rest = tuple(operation for operation in operations if operation != "dropout")
    while rest:
        group = next((fused for fused in FUSED if rest[: len(fused)] == fused), rest[:1])
        groups.append(group)
        rest = rest[len(group) :]
    return groups


class Dropout(nn.Module):
    """The dropout of the paper (section 4.2), which rescales at test time, not in training.

    Args:
        keys: 64 bits for each column in this process, derived from run, column and layer.
    """

    keys: Tensor
    """int64 [columns]; not part of the state."""

    def __init__(self, keys: Sequence[int]) -> None:
        super().__init__()
        keys_on_device = torch.tensor([_to_int64(key) for key in keys])
        self.register_buffer("keys", keys_on_device, persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """Units of training times their masks; at test time, half of every unit.

        Args:
            x: float [b, columns * units], or maps [b, columns * maps, h, w].
            position: int64 scalar, as in `draw_dropout_mask`.
        """
        if not self.training:
            return x * 0.5
        if x.dim() > 2:
            layout = torch.channels_last
            return self(x.flatten(1), position).view(x.shape).contiguous(memory_format=layout)
        if prepare_gpu_kernels(x) and not torch.compiler.is_compiling():
            return DropoutKernel.apply(x, position, self.keys)
        batch, units = x.shape
        mask = draw_dropout_mask(position, batch, units // len(self.keys), self.keys)
        return x * mask.to(x.dtype)


class DropoutKernel(torch.autograd.Function):
    """Dropout in training on a GPU, which draws a mask where it needs it, and stores none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor, keys: Tensor) -> Tensor:
        """Multiply x by its mask."""
        ctx.save_for_backward(position, keys)
        return launch_dropout(x, position, keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Multiply the gradient by the same mask."""
        return launch_dropout(gradient, *ctx.saved_tensors), None, None


def launch_dropout(x: Tensor, position: Tensor, keys: Tensor) -> Tensor:
    """Multiply x by `draw_dropout_mask` of the same position and keys, in one pass on a GPU.

    Args:
        x: float [b, columns * units].
        position: int64 scalar.
        keys: int64 [columns].
    """
    from model import gpu_kernels

    x = x.contiguous()
    y = torch.empty_like(x)
    batch, units = x.shape[0], x.shape[1] // len(keys)
    words = batch * len(keys) * -(-units // _BITS)
    if words:
        gpu_kernels.dropout[(-(-words // _GPU_WORDS),)](
            x, y, position, keys, words,
            UNITS=units, COLUMNS=len(keys), BLOCK=_GPU_WORDS, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def draw_dropout_mask(position: Tensor | int, batch: int, units: int, keys: Tensor) -> Tensor:
    """A dropout mask: the bits of SplitMix64 (Steele, Lea, Flood 2014) on a counter.

    Args:
        position: position of the first sample in the stream of the whole job, an int64 scalar; row
            i is position + i.
        batch: number of samples.
        units: number of units of the layer in a column.
        keys: int64 [columns], 64 bits derived from layer, column and run; its device is the mask's.

    Returns:
        uint8 [batch, columns * units], 0 or 1 with equal chance, one column after the other.
    """
    device, words = keys.device, -(-units // _BITS)
    samples = torch.arange(batch, device=device) + position
    counts = torch.arange(1, words + 1, device=device)
    # int64 wraps as uint64 does; only shifts to the right need care for the sign.
    start = _mix(samples[:, None] + keys)  # [batch, columns]
    bits = _mix(start[:, :, None] + counts * _to_int64(_GOLDEN))
    octets = bits.view(torch.uint8).long()  # [batch, columns, words * 8]
    # A copy of the octet every 7 bits: bit i is the lowest of byte i. Bit 7 would run into the next
    # copy and goes by itself. Half the time of eight shifts.
    spread = (octets & 0x7F) * 0x0002040810204081 | (octets & 0x80) << 49
    mask = (spread & 0x0101010101010101).view(torch.uint8)  # [batch, columns, words * 64]
    return mask[:, :, :units].flatten(1)


def _mix(word: Tensor) -> Tensor:
    """SplitMix64's finalizer: a bijection of 64-bit words in which every bit matters."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = (word ^ _shift_right(word, shift)) * _to_int64(factor)
    return word ^ _shift_right(word, 31)


def _shift_right(word: Tensor, shift: int) -> Tensor:
    """Shift to the right as if the words had no sign."""
    return (word >> shift) & ((1 << (_BITS - shift)) - 1)


def _to_int64(word: int) -> int:
    """The signed integer with the low 64 bits of `word`."""
    return (word + 2**63) % 2**64 - 2**63


def derive_seed(*key: object) -> int:
    """A 63-bit seed for `key`. Hashed, so that neighboring keys give unrelated streams."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
