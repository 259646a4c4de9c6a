"""The dropout of the paper, its masks a pure function of where a sample stands in the stream.

The same sample gets the same mask in any number of replicas, cut into any micro-batches, after any
restart, and on a CPU as on a GPU: no generator has a state to lose.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
