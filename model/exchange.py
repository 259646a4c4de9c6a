"""What crosses between the two columns of a pair, and how its gradient comes back.

A layer that reads both columns costs one swap with the peer forward and one backward, and each
swap travels while the layer computes what needs no waiting:

    forward     the own maps set off      meanwhile the own maps' part of the output
                the peer's arrive         their part is added
    backward    the gradient of the       meanwhile the gradients of the own maps and of the weights
                peer's maps sets off
                that of the own arrives   it is added

The swap is point to point, because under gloo that is the quickest (measured: `all_gather` takes 2
to 3 times as long for a batch of images, `reduce_scatter` 2 to 3 times for a gradient), and
because its name, unlike those of the collectives, is the same in torch 2.11 and 2.13. Memory that
two columns on one machine share would take a third to a half of gloo's time for conv3's maps (2 ms
of 6); but that is less than a hundredth of a step, and most of it is hidden as it is.

A convolution or a matrix product cut along its inputs: the half at hand first, then the other.

Own arithmetic rather than autograd's, because autograd hands out the gradients of a layer only all
at once: here the one that the other column waits for comes first. On a CPU core the two halves of
conv3, fc6, fc7 or fc8 take as long as the whole (measured at batch 128, forward and backward:
within 2 %; but conv3 forward in bfloat16 3 ms more, in a step of 780).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Halves(Protocol):
    """What a layer does with a half of its inputs, x, and the weights of that half."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output, as far as it comes from x."""
        ...

    def add(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """y, with what comes from x added in place."""
        ...

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of x, given that of the output."""
        ...

    def parameter_gradients(
        self, gradient: Tensor, first: Tensor, second: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the whole weight and of the bias, given both halves of the inputs."""
        ...


def halves_of(module: nn.Module) -> Halves:
    """The arithmetic of a layer.

    Args:
        module: an `nn.Linear`, or an `nn.Conv2d` of one group with zeros around, in numbers.

    Raises:
        TypeError: any other.
    """
    if isinstance(module, nn.Linear):
        return LinearHalves()
    if type(module) is nn.Conv2d and module.groups == 1 and not isinstance(module.padding, str):
        return ConvHalves(module.stride, module.padding, module.dilation)
    raise TypeError(f"only Linear, and Conv2d of one group, can read both columns, not {module}")


class LinearHalves:
    """[b, units] times [outputs, units]."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Halves`."""
        return F.linear(x, weight, bias)

    def add(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See `Halves`."""
        return y.addmm_(x, weight.t())

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See `Halves`."""
        return gradient @ weight

    def parameter_gradients(
        self, gradient: Tensor, first: Tensor, second: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Halves`. Joins inputs, not gradients: the weights are far larger."""
        return gradient.t() @ torch.cat((first, second), dim=1), gradient.sum(0)


@dataclass(frozen=True)
class ConvHalves:
    """[b, maps, h, w] under filters [outputs, maps, kernel, kernel]."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Halves`."""
        return torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def add(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See `Halves`."""
        return y.add_(self.product(x, weight, None))

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See `Halves`."""
        return self._backward(gradient, x, weight, (True, False, False))[0]

    def parameter_gradients(
        self, gradient: Tensor, first: Tensor, second: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Halves`. Joins gradients, not inputs: the maps are far larger."""
        weights = weight.chunk(2, dim=1)
        _, one, bias = self._backward(gradient, first, weights[0], (False, True, True))
        _, two, _ = self._backward(gradient, second, weights[1], (False, True, False))
        return torch.cat((one, two), dim=1), bias

    def _backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, weight and bias; only those wanted are tensors."""
        biases = [weight.shape[0]]
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            gradient, x, weight, biases, self.stride, self.padding, self.dilation,
            False, (0, 0), 1, wanted,
        )  # fmt: skip
        return found


@dataclass
class Traffic:
    """What this column has sent to the other one at one place of the network."""

    forward: int = 0
    """Bytes of activations."""
    backward: int = 0
    """Bytes of gradients."""
    swaps: int = 0
    """Messages sent, either way."""
    waited: float = 0.0
    """Seconds this process stood still for the peer or the wire. On a GPU the host never does."""


class Exchange:
    """The link between column a (rank 0 of the group) and column b (rank 1).

    Both ranks must make the same calls in the same order, with equal shapes and dtypes.

    Args:
        group: process group of the two ranks of one pair; None is the default group of the job.
        wire: torch.bfloat16: what is float32 between layers, activations and gradients, travels as
            bfloat16: half the bytes, and 8 bits of precision for what comes from the other column
            (the own half stays as it is). None: as it is, as do other dtypes, the logits and
            `batch` in any case.

    Raises:
        ValueError: the group does not have exactly 2 ranks, or this process is not one of them; or
            another wire than None or bfloat16.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, wire: torch.dtype | None = None
    ) -> None:
        self.group = group
        self.wire = wire
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        if self.size != 2 or self.index not in (0, 1):
            raise ValueError(
                f"a pair is 2 processes, one a column; this group has {self.size} "
                f"and this process is rank {self.index} in it"
            )
        if wire not in (None, torch.bfloat16):
            raise ValueError(f"wire is {wire}; it is None or torch.bfloat16")
        whole = dist.group.WORLD if group is None else group
        assert whole is not None
        self._peer = dist.get_global_rank(whole, 1 - self.index)
        self.traffic: dict[str, Traffic] = {}
        """By the name that the caller gave the place; emptied by whoever counts."""

    def apply_layer(self, layer: nn.Module, x: Tensor, name: str = "") -> Tensor:
        """The output of a layer that reads both columns: `layer(gather(x))`, waiting less.

        The sum over the inputs is taken in two parts, so that it may differ from that in the last
        bit. Autocast is heeded as the layer itself would.

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
        return cast(Tensor, _Through.apply(x, weight, bias, halves_of(layer), self, name))

    def gather(self, x: Tensor, name: str = "") -> Tensor:
        """Both columns' maps, for a layer that reads both; `through` does the same sooner.

        Args:
            x: float [b, c] or [b, c, h, w], this column's maps.
            name: the key in `traffic`.

        Returns:
            [b, 2c, ...], column a first, in the dtype and memory format of x. Each column feeds it
            to its own weights: the backward pass adds up both columns' gradients of the own maps.
        """
        return cast(Tensor, _Gather.apply(x, self, name))

    def gather_replicated(self, x: Tensor, name: str = "") -> Tensor:
        """As `gather`, for values from which both ranks compute the same (logits, then loss).

        The gradient that arrives is then the whole gradient on both ranks already: the backward
        pass keeps the own slice and sends nothing. Never rounded for the wire: both ranks have to
        see the same.
        """
        return cast(Tensor, _GatherReplicated.apply(x, self, name))

    def join_batch(self, *halves: Tensor) -> tuple[Tensor, ...]:
        """Join the two halves of a batch along dim 0, column a's half first; no gradient.

        Args:
            halves: tensors [b/2, ...] of any dtype: images, labels, weights.

        Returns:
            the tensors [b, ...] in the order given, each in its dtype and memory format.
        """
        return tuple(
            self._in_order(half.detach(), _Swap(self, half.detach()).wait(), dim=0)
            for half in halves
        )

    def _send(self, x: Tensor, name: str, back: bool = False, exact: bool = False) -> _Swap:
        """Set off activations, or gradients on their way back; rounded for the wire or exact."""
        traffic = self.traffic.setdefault(name, Traffic())
        swap = _Swap(self, x, None if exact else self.wire, traffic)
        traffic.swaps += 1
        if back:
            traffic.backward += swap.bytes
        else:
            traffic.forward += swap.bytes
        return swap

    def _in_order(self, own: Tensor, peer: Tensor, dim: int = 1) -> Tensor:
        """The two joined along `dim`, column a's first."""
        return torch.cat((own, peer) if self.index == 0 else (peer, own), dim=dim)

    def _own_and_peer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slices of x along dim 1 that belong to this column and to the other one."""
        halves = x.chunk(2, dim=1)
        return halves[self.index], halves[1 - self.index]

    def _moves(self, sent: Tensor, received: Tensor) -> list[dist.P2POp]:
        """The two directions of a swap of contiguous tensors, for `dist.batch_isend_irecv`."""
        return [
            dist.P2POp(dist.isend, sent, self._peer, self.group),
            dist.P2POp(dist.irecv, received, self._peer, self.group),
        ]


class _Swap:
    """A tensor on its way to the peer, and the peer's on its way here; no gradient.

    On a GPU the copies run on the streams of NCCL, after what is launched before `__init__` and
    before what is launched after `wait`. Both buffers are kept until then.
    """

    def __init__(
        self,
        exchange: Exchange,
        x: Tensor,
        wire: torch.dtype | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self._like = x
        self._traffic = traffic or Traffic()
        self._sent = _wire(x.to(wire) if wire and x.dtype == torch.float32 else x)
        self._received = torch.empty_like(self._sent)
        self._works = dist.batch_isend_irecv(exchange._moves(self._sent, self._received))
        self.bytes = self._sent.nbytes

    def wait(self) -> Tensor:
        """The peer's tensor, in the dtype and memory format of the own."""
        start = time.perf_counter()
        for work in self._works:
            work.wait()
        self._traffic.waited += time.perf_counter() - start
        return _unwire(self._received, self._like).to(self._like.dtype)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, halves: Halves, link: Exchange, name: str
    ) -> Tensor:
        swap = link._send(x, name)
        own, others = link._own_and_peer(weight)
        y = halves.product(x, own, bias)
        peer = swap.wait()
        ctx.save_for_backward(x, peer, weight)
        ctx.halves, ctx.link, ctx.name = halves, link, name
        return halves.add(y, peer, others)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, peer, weight = ctx.saved_tensors
        halves, link = ctx.halves, ctx.link
        own, others = link._own_and_peer(weight)
        swap = result = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            needed = halves.input_gradient(gradient, peer, others)
            swap = link._send(needed, ctx.name, back=True)
            result = halves.input_gradient(gradient, x, own)
        if any(ctx.needs_input_grad[1:3]):
            first, second = (x, peer) if link.index == 0 else (peer, x)
            weight_gradient, bias_gradient = halves.parameter_gradients(
                gradient, first, second, weight
            )
        if swap is not None and result is not None:
            result = result.add_(swap.wait())
        return result, weight_gradient, bias_gradient, None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Exchange, name: str) -> Tensor:
        ctx.link, ctx.name = link, name
        return link._in_order(x, link._send(x, name).wait())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own, others = ctx.link._own_and_peer(gradient)
        return ctx.link._send(others, ctx.name, back=True).wait() + own, None, None


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Exchange, name: str) -> Tensor:
        ctx.link = link
        return link._in_order(x, link._send(x, name, exact=True).wait())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.link._own_and_peer(gradient)[0].contiguous(), None, None


def _wire(x: Tensor) -> Tensor:
    """x as it travels: densely packed, its channels last if they are last in x's memory."""
    return (x.permute(0, 2, 3, 1) if _is_channels_last(x) else x).contiguous()


def _unwire(received: Tensor, like: Tensor) -> Tensor:
    """Undo `_wire`, for a tensor received in exchange for `like`."""
    return received.permute(0, 3, 1, 2) if _is_channels_last(like) else received


def _is_channels_last(x: Tensor) -> bool:
    # by strides, not is_contiguous: half of the maps of a tensor is not contiguous in any format
    return x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1
