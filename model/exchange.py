"""Exchange of activations and gradients between the two columns of a pair, overlapped with compute.

A layer that reads both columns takes one swap with the peer forward and one backward. The layer is
split along its inputs, and computes what needs no data from the peer while a swap is under way:

    forward     send the own maps                      compute the own maps' part of the output
                receive the peer's maps                add their part
    backward    send the gradient of the peer's maps   compute the gradients of own maps and weights
                receive the gradient of the own maps   add it

The swap is point to point, because under gloo that is the fastest (measured: `all_gather` takes 2
to 3 times as long for a batch of images, `reduce_scatter` 2 to 3 times for a gradient), and
because its name, unlike those of the collectives, is the same in torch 2.11 and 2.13. Shared memory
between two columns on one machine would take a third to a half of gloo's time for conv3's maps (2
ms of 6); but that is less than a hundredth of a step, and most of it is hidden anyway.

The backward pass of a split layer does not use autograd, because autograd returns the gradients of
a layer all at once: here the one that the peer waits for comes first. On a CPU core the two halves
of conv3, fc6, fc7 or fc8 take as long as the whole (measured at batch 128, forward and backward:
within 2 %; but conv3 forward in bfloat16 3 ms more, in a step of 780).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.timing import Stopwatch

HALF_SCALE = 128.0
"""Factor on gradients that cross in float16, whose smallest number is 6e-8: the original's were
sums over the 128 images of a batch, and are means here. A power of two: it rounds nothing."""


class _SplitLinear:
    """The arithmetic of a layer on one half of its inputs, x, and the weights of that half.

    x is [b, units], the weights are [outputs, units].
    """

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The part of the layer's output that comes from x, and the bias."""
        return F.linear(x, weight, bias)

    def add_product(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """y, with the part of the output that comes from x added in place."""
        return y.addmm_(x, weight.t())

    def compute_input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of x, given that of the output."""
        return gradient @ weight

    def compute_parameter_gradients(
        self, gradient: Tensor, first: Tensor, second: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the whole weight and of the bias, given both halves of the inputs."""
        # Joins inputs, not gradients: the weights are far larger.
        return gradient.t() @ torch.cat((first, second), dim=1), gradient.sum(0)


@dataclass(frozen=True)
class _SplitConv:
    """The same for a convolution: x [b, maps, h, w], weights [outputs, maps, kernel, kernel]."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def add_product(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return y.add_(self.multiply(x, weight, None))

    def compute_input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(gradient, x, weight, (True, False, False))[0]

    def compute_parameter_gradients(
        self, gradient: Tensor, first: Tensor, second: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Joins gradients, not inputs: the maps are far larger.
        weights = weight.chunk(2, dim=1)
        _, one, bias = self._backward(gradient, first, weights[0], (False, True, True))
        _, two, _ = self._backward(gradient, second, weights[1], (False, True, False))
        return torch.cat((one, two), dim=1), bias

    def _backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, weight and bias; those not wanted are None."""
        return torch.ops.aten.convolution_backward(
            gradient, x, weight, [weight.shape[0]], self.stride, self.padding, self.dilation,
            False, (0, 0), 1, wanted,
        )  # fmt: skip


def split_layer(module: nn.Module) -> _SplitLinear | _SplitConv:
    """The split arithmetic of a layer.

    Args:
        module: an `nn.Linear`, or an `nn.Conv2d` of one group whose padding is given in numbers.

    Raises:
        TypeError: any other layer.
    """
    if isinstance(module, nn.Linear):
        return _SplitLinear()
    if type(module) is nn.Conv2d and module.groups == 1 and not isinstance(module.padding, str):
        return _SplitConv(module.stride, module.padding, module.dilation)
    raise TypeError(f"only Linear, and Conv2d of one group, can read both columns, not {module}")


@dataclass
class Traffic:
    """Amount of data that this column has sent to the other one for one layer."""

    forward: int = 0
    """Bytes of activations."""
    backward: int = 0
    """Bytes of gradients."""
    swaps: int = 0
    """Number of messages sent, forward and backward."""


class Exchange:
    """The link between column a (rank 0 of the group) and column b (rank 1).

    Both ranks must make the same calls in the same order, with equal shapes and dtypes.

    Args:
        group: process group of the two ranks of one pair; None is the default group of the job.
        wire: torch.bfloat16 or torch.float16: float32 activations and gradients are sent as that,
            which takes half the bytes, and leaves 8 or 11 bits of precision in values from the
            other column (the own half is not rounded). Gradients in float16 are sent times
            `HALF_SCALE`. None: they are sent as they are. Other dtypes, the logits and `join_batch`
            are never rounded.

    Raises:
        ValueError: the group does not have exactly 2 ranks, or this process is not one of them; or
            another wire.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, wire: torch.dtype | None = None
    ) -> None:
        size, index = dist.get_world_size(group), dist.get_rank(group)
        if size != 2 or index not in (0, 1):
            raise ValueError(
                f"a pair is 2 processes, one a column; this group has {size} "
                f"and this process is rank {index} in it"
            )
        whole = cast(dist.ProcessGroup, dist.group.WORLD if group is None else group)
        self.group, self._peer = group, dist.get_global_rank(whole, 1 - index)
        self._prepare(index, wire)

    def _prepare(self, index: int, wire: torch.dtype | None) -> None:
        """Set what does not depend on the way that tensors take."""
        if wire not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"wire is {wire}; it is None, torch.bfloat16 or torch.float16")
        self.index = index
        """Column of this end, 0 or 1."""
        self.wire = wire
        self.traffic: dict[str, Traffic] = {}
        """Traffic by the `name` that the caller gave; whoever reads it empties it."""
        self.waits = Stopwatch()
        """Spans that layers waited for the peer or the network. The host never waits for a GPU's:
        there they are spans of its work."""

    def apply_layer(self, layer: nn.Module, x: Tensor, name: str = "") -> Tensor:
        """The output of a layer that reads both columns.

        The sum over the inputs is taken in two parts, so that the last bit may differ from that of
        the layer itself. Autocast applies as there.

        Args:
            layer: `nn.Linear` or `nn.Conv2d` whose inputs are column a's maps, then column b's.
            x: float [b, c] or [b, c, h, w], this column's maps.
            name: the key in `traffic`.

        Raises:
            TypeError: another kind of layer.
        """
        weight, bias = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return _ApplySplit.apply(x, weight, bias, split_layer(layer), self, name)

    def gather_replicated(self, x: Tensor, name: str = "") -> Tensor:
        """Both columns' values, from which both ranks compute the same result (logits, loss).

        Values are never rounded, as both ranks must see the same. The gradient of the output is
        the whole gradient on both ranks: the backward pass keeps the own slice and sends nothing.

        Args:
            x: float [b, c] or [b, c, h, w], this column's values.
            name: the key in `traffic`.

        Returns:
            [b, 2c, ...], column a first, in the dtype and memory format of x.
        """
        return _GatherReplicated.apply(x, self, name)

    def join_batch(self, *halves: Tensor) -> tuple[Tensor, ...]:
        """Join the two halves of a batch along dim 0, column a's half first; no gradient.

        Args:
            halves: tensors [b/2, ...] of any dtype: images, labels, weights.

        Returns:
            The tensors [b, ...] in the order given, each in its dtype and memory format.
        """
        return tuple(
            self._join(half.detach(), _Swap(self, half.detach()).wait(), dim=0) for half in halves
        )

    def _send(self, x: Tensor, name: str, back: bool = False, exact: bool = False) -> _Swap:
        """Start to send activations, or gradients if `back`; rounded to `wire` unless `exact`."""
        traffic = self.traffic.setdefault(name, Traffic())
        wire = None if exact else self.wire
        scale = HALF_SCALE if back and wire == torch.float16 else 1.0
        swap = _Swap(self, x, wire, self.waits, scale)
        traffic.swaps += 1
        if back:
            traffic.backward += swap.bytes
        else:
            traffic.forward += swap.bytes
        return swap

    def _transfer(self, sent: Tensor) -> Callable[[], Tensor]:
        """Start to send a contiguous tensor; the result waits for the peer's of the same shape."""
        received = torch.empty_like(sent)
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, sent, self._peer, self.group),
                dist.P2POp(dist.irecv, received, self._peer, self.group),
            ]
        )

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return wait

    def _join(self, own: Tensor, peer: Tensor, dim: int = 1) -> Tensor:
        """Both columns' tensors concatenated along `dim`, column a's first."""
        return torch.cat((own, peer) if self.index == 0 else (peer, own), dim=dim)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slices of x along dim 1 that belong to this column and to the other one."""
        halves = x.chunk(2, dim=1)
        return halves[self.index], halves[1 - self.index]


class _Swap:
    """Pair of transfers: a tensor sent to the peer, and the peer's received; no gradient.

    On a GPU the copies run on the streams of NCCL, after work launched before `__init__` and before
    work launched after `wait`. Both buffers are kept until then.
    """

    def __init__(
        self,
        exchange: Exchange,
        x: Tensor,
        wire: torch.dtype | None = None,
        waits: Stopwatch | None = None,
        scale: float = 1.0,
    ) -> None:
        self._dtype = x.dtype
        self._scale = scale if x.dtype == torch.float32 else 1.0
        # By strides, not is_contiguous: half of the maps is not contiguous in any format.
        self._is_channels_last = x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1
        self._waits = waits or Stopwatch()
        x = x * self._scale if self._scale != 1.0 else x
        sent = x.to(wire) if wire and x.dtype == torch.float32 else x
        self._sent = (sent.permute(0, 2, 3, 1) if self._is_channels_last else sent).contiguous()
        self._receive = exchange._transfer(self._sent)
        self.bytes = self._sent.nbytes

    def wait(self) -> Tensor:
        """The peer's tensor, in the dtype and memory format of the own."""
        with self._waits.running(self._sent.device):
            received = self._receive()
        if self._is_channels_last:
            received = received.permute(0, 3, 1, 2)
        received = received.to(self._dtype)
        return received / self._scale if self._scale != 1.0 else received


class _ApplySplit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        layer: _SplitLinear | _SplitConv,
        link: Exchange,
        name: str,
    ) -> Tensor:
        swap = link._send(x, name)
        own, others = link._split(weight)
        y = layer.multiply(x, own, bias)
        peer = swap.wait()
        ctx.save_for_backward(x, peer, weight)
        ctx.layer, ctx.link, ctx.name = layer, link, name
        return layer.add_product(y, peer, others)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, peer, weight = ctx.saved_tensors
        layer, link = ctx.layer, ctx.link
        own, others = link._split(weight)
        swap = result = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            needed = layer.compute_input_gradient(gradient, peer, others)
            swap = link._send(needed, ctx.name, back=True)
            result = layer.compute_input_gradient(gradient, x, own)
        if any(ctx.needs_input_grad[1:3]):
            first, second = (x, peer) if link.index == 0 else (peer, x)
            weight_gradient, bias_gradient = layer.compute_parameter_gradients(
                gradient, first, second, weight
            )
        if swap is not None and result is not None:
            result = result.add_(swap.wait())
        return result, weight_gradient, bias_gradient, None, None, None


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Exchange, name: str) -> Tensor:
        ctx.link = link
        return link._join(x, link._send(x, name, exact=True).wait())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.link._split(gradient)[0].contiguous(), None, None
