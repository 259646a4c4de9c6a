"""Which sample stands at which place of the stream: a pure function of numbers.

`position` counts the samples consumed by the whole job since step 0. Over N samples, position p
lies in epoch e = p // N and holds sample `permutation(seed, e)[p % N]`. Nothing else decides the
order: not the number of workers or threads, not the batch a rank gets, not a restart.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Slots(NamedTuple):
    """A run of places in the stream: epoch and sample id of each, both int64 [count]."""

    epochs: Ids
    ids: Ids


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, samples: int) -> Ids:
    """Return the order of one epoch: int64 [samples], each of 0..samples-1 once (read-only).

    The generator is NumPy's PCG64 on `SeedSequence([seed, epoch])`, so that neighbouring seeds
    and epochs have nothing in common (a sum of the two would).
    """
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    order = generator.permutation(samples)
    order.flags.writeable = False
    return order


def shuffled(samples: int, seed: int, position: int, count: int) -> Slots:
    """Return the slots [position, position + count) of the endless shuffled stream.

    Args:
        samples: N, at least 1.
        seed: of the whole run, 0 or more.
        position: of the first slot, 0 or more.
        count: how many slots; the run may cross any number of epoch borders.
    """
    if samples < 1 or seed < 0 or position < 0 or count < 0:
        raise ValueError(
            f"no order for samples={samples}, seed={seed}, position={position}, count={count}"
        )
    epochs = np.empty(count, np.int64)
    ids = np.empty(count, np.int64)
    done = 0
    while done < count:
        epoch, place = divmod(position + done, samples)
        run = min(count - done, samples - place)
        epochs[done : done + run] = epoch
        ids[done : done + run] = permutation(seed, epoch, samples)[place : place + run]
        done += run
    return Slots(epochs, ids)


def share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the half-open range of a global batch of `count` that rank `rank` gets.

    The ranges of all ranks are disjoint, in rank order, cover the batch, and differ in length by
    at most one.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in a world of {world_size}")
    return count * rank // world_size, count * (rank + 1) // world_size
