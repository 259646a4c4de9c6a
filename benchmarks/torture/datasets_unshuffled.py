"""Hugging Face datasets as in `datasets_stateful`, but never shuffled: as the images were packed.

Its page says that the samples in a shuffle buffer are lost at a resume, and `shuffle` always has
one: here is none to lose.
"""

from __future__ import annotations

from torture import datasets_stateful
from torture.datasets_stateful import prepare

__all__ = ["open_loader", "prepare"]


class Images(datasets_stateful.Images):
    """The loader without `shuffle`."""

    buffer = 0


open_loader = Images
