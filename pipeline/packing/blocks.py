"""By which bits to sort hashes so that every near pair comes side by side.

Why no pair is missed. With t the threshold, the 256 bits are cut into groups, and group i into
r_i + k blocks, where the sum of (r_i + 1) is t + 1. If each group held r_i + 1 or more of the bits
in which a pair differs, there would be t + 1 or more of them; so within distance t some group holds
at most r_i, and at least k of its r_i + k blocks are equal. Sorting by each choice of k blocks of
each group therefore brings every such pair side by side, next to few others. For 14 million rows
and 16 bits that is, for example, 4 groups of 5 and 6 blocks of 12 bits, of which 2 are equal: 45
sorts. `best_cut` chooses.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise, product
from math import comb
from typing import NamedTuple

BITS = 256
KEY_BITS = 32
EQUAL = (2, 3, 4)
"""Blocks that a sort looks at."""
SORT, CHECK = 50, 80
"""Nanoseconds to sort a row by a key, and to compare a pair (measured): only their ratio counts."""


class Block(NamedTuple):
    """Some neighbouring bits of a hash; 16 at most."""

    start: int
    width: int


class Cut(NamedTuple):
    """Groups of blocks; near pairs have `equal` blocks of a group in common."""

    equal: int
    groups: list[list[Block]]
    tables: int
    """Choices of so many blocks of a group."""
    width: int
    """Least bits of a choice."""

    def cost(self, rows: int) -> float:
        """Return about how long a search takes, in nanoseconds."""
        return self.tables * (rows * SORT + rows * rows / 2 / 2.0**self.width * CHECK)


def best_cut(threshold: int, rows: int, bits: int = BITS) -> Cut:
    """Return the groups of blocks (module docstring) that are cheapest for so many rows."""
    return min(possible_cuts(threshold, bits), key=lambda cut: cut.cost(rows))


@lru_cache
def possible_cuts(threshold: int, bits: int) -> list[Cut]:
    """Return a cut for every possible number of groups and of equal blocks, as even as can be."""
    cuts = []
    for equal, groups in product(EQUAL, range(1, threshold + 2)):
        each, more = divmod(threshold + 1, groups)
        sizes = [each + (place < more) - 1 + equal for place in range(groups)]
        if (count := sum(sizes)) > bits:
            continue
        borders = [bits * place // count for place in range(count + 1)]
        most = KEY_BITS // equal
        blocks = iter(Block(a, min(most, b - a)) for a, b in pairwise(borders))
        members = [[next(blocks) for _ in range(size)] for size in sizes]
        tables = sum(comb(size, equal) for size in sizes)
        cuts.append(Cut(equal, members, tables, equal * min(most, bits // count)))
    return cuts
