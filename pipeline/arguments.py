"""Whether the arguments of a public face can be right, told in one line that names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, get_args


def check_words(known: Mapping[str, Any], **given: str) -> None:
    """Refuse words that a `Literal` does not have.

    Args:
        known: the `Literal` of each argument, by name.
        given: values by name.

    Raises:
        ValueError: names argument, value and the words there are.
    """
    for name, value in given.items():
        if value not in (words := get_args(known[name])):
            raise ValueError(f"{name} is {value!r}; it takes {', '.join(words)}")


def check_ranges(**given: tuple[float, float, float]) -> None:
    """Refuse a value that is not between two others (a NaN is between none).

    Args:
        given: value, lowest and highest, by name.

    Raises:
        ValueError: names argument, value and borders.
    """
    for name, (value, low, high) in given.items():
        if not low <= value <= high:
            borders = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"out of range: {name}={value}; it takes {borders}")
