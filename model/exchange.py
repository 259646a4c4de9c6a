"""What crosses between the two columns of a pair, and how its gradient comes back.

All of it is one move, a swap with the peer. Point to point, because under gloo that is the quickest
(measured: `all_gather` takes 2 to 3 times as long for a batch of pictures, `reduce_scatter` 2 to 3
times for a gradient), and because its name, unlike those of the collectives, is the same in torch
2.11 and 2.13.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """The link between column a (rank 0 of the group) and column b (rank 1).

    Both ranks must make the same calls in the same order, with equal shapes and dtypes.

    Args:
        group: process group of the two ranks of one pair; None is the default group of the job.

    Raises:
        ValueError: the group does not have exactly 2 ranks, or this process is not one of them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.index = dist.get_rank(group)
        if self.size != 2 or self.index not in (0, 1):
            raise ValueError(
                f"a pair is 2 processes, one a column; this group has {self.size} "
                f"and this process is rank {self.index} in it"
            )
        whole = dist.group.WORLD if group is None else group
        assert whole is not None
        self._peer = dist.get_global_rank(whole, 1 - self.index)

    def gather(self, x: Tensor) -> Tensor:
        """Both columns' maps, for a layer that reads both.

        Args:
            x: float [b, c] or [b, c, h, w], this column's maps.

        Returns:
            [b, 2c, ...], column a first, in the dtype and memory format of x. Each column feeds it
            to its own weights: the backward pass adds up both columns' gradients of the own maps.
        """
        return cast(Tensor, _Gather.apply(x, self))

    def gather_replicated(self, x: Tensor) -> Tensor:
        """As `gather`, for values from which both ranks compute the same (logits, then loss).

        The gradient that arrives is then the whole gradient on both ranks already: the backward
        pass keeps the own slice and sends nothing.
        """
        return cast(Tensor, _GatherReplicated.apply(x, self))

    def batch(self, *halves: Tensor) -> tuple[Tensor, ...]:
        """Join the two halves of a batch along dim 0, column a's half first; no gradient.

        Args:
            halves: tensors [b/2, ...] of any dtype: images, labels, weights.

        Returns:
            the tensors [b, ...] in the order given, each in its dtype and memory format.
        """
        return tuple(self._join(half.detach(), dim=0) for half in halves)

    def _join(self, x: Tensor, dim: int) -> Tensor:
        """x of column a, then x of column b, along `dim`."""
        peer = _unwire(self.swap(_wire(x)), like=x)
        return torch.cat((x, peer) if self.index == 0 else (peer, x), dim=dim)

    def swap(self, sent: Tensor) -> Tensor:
        """Send a contiguous tensor to the peer and return the one it sent; no gradient."""
        received = torch.empty_like(sent)
        moves = [
            dist.P2POp(dist.isend, sent, self._peer, self.group),
            dist.P2POp(dist.irecv, received, self._peer, self.group),
        ]
        for move in dist.batch_isend_irecv(moves):
            move.wait()
        return received


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange._join(x, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange
        halves = gradient.chunk(2, dim=1)
        own, others = halves[exchange.index], halves[1 - exchange.index]
        return _unwire(exchange.swap(_wire(others)), like=others) + own, None


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.index = exchange.index
        return exchange._join(x, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(2, dim=1)[ctx.index].contiguous(), None


def _wire(x: Tensor) -> Tensor:
    """x as it travels: densely packed, its channels last if they are last in x's memory."""
    return (x.permute(0, 2, 3, 1) if _is_channels_last(x) else x).contiguous()


def _unwire(received: Tensor, like: Tensor) -> Tensor:
    """Undo `_wire`, for a tensor received in exchange for `like`."""
    return received.permute(0, 3, 1, 2) if _is_channels_last(like) else received


def _is_channels_last(x: Tensor) -> bool:
    # by strides, not is_contiguous: half of the maps of a tensor is not contiguous in any format
    return x.dim() == 4 and x.shape[1] > 1 and x.stride(1) == 1
