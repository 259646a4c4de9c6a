"""What crosses between the two columns of a pair, and how its gradient comes back.

A layer that reads both columns costs one swap with the peer forward and one backward, and each
swap travels while the layer computes what needs no waiting:

    forward     the own maps set off      meanwhile the own maps' part of the output
                the peer's arrive         their part is added
    backward    the gradient of the       meanwhile the gradients of the own maps and of the weights
                peer's maps sets off
                that of the own arrives   it is added

The swap is point to point, because under gloo that is the quickest (measured: `all_gather` takes 2
to 3 times as long for a batch of pictures, `reduce_scatter` 2 to 3 times for a gradient), and
because its name, unlike those of the collectives, is the same in torch 2.11 and 2.13. Memory that
two columns on one machine share would take a third to a half of gloo's time for conv3's maps (2 ms
of 6); but that is less than a hundredth of a step, and most of it is hidden as it is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.halves import Halves, halves_of


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

    def through(self, layer: nn.Module, x: Tensor, name: str = "") -> Tensor:
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

    def batch(self, *halves: Tensor) -> tuple[Tensor, ...]:
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
