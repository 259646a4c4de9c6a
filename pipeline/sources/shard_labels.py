"""The label of a sample in a WebDataset shard: `.cls`, or a field of `.json`, or a bare `.txt`."""

from __future__ import annotations

import json
from typing import NamedTuple

LABEL_ENDINGS = ("cls", "json", "txt")
"""The better one comes first."""
MOST_BYTES = 1 << 16
"""A label that claims more bytes is none, and is not read."""
LONGEST_WORD = 200
NUMBER_FIELDS = ("label", "cls", "class", "class_id", "class_index", "target")
NAME_FIELDS = ("class_name", "classname", "label_name", "class_text", "label_text")


class Found(NamedTuple):
    """What a member says."""

    label: int | str | None
    """A number from 0, a word, or None."""
    title: str | None = None
    """Readable name of the class, where it stands beside the number."""


def parse(ending: str, body: bytes) -> Found:
    """Return the label in the body of a `.cls`, `.json` or `.txt` member."""
    if ending == "json":
        return _from_json(body)
    try:
        label = _from_text(body.decode())
    except UnicodeDecodeError:
        return Found(None)
    # A text may be anything, such as a caption; only a number is a label.
    return Found(None if ending == "txt" and isinstance(label, str) else label)


def _from_text(text: str) -> int | str | None:
    text = text.strip()
    number = text.removeprefix("-").removeprefix("+")
    if number.isascii() and number.isdigit():
        # Nine digits are more than there are classes; -1 stands for "not known".
        return int(number) if len(number) <= 9 and not text.startswith("-") else None
    return text if text and text.isprintable() and len(text) <= LONGEST_WORD else None


def _from_json(body: bytes) -> Found:
    try:
        table = json.loads(body)
    except (ValueError, RecursionError):
        return Found(None)
    if not isinstance(table, dict):
        return Found(None)
    labels = [_from_value(table.get(name)) for name in NUMBER_FIELDS]
    names = [_from_value(table.get(name)) for name in NAME_FIELDS]
    words = [value for value in (*names, *labels) if isinstance(value, str)]
    numbers = [value for value in labels if isinstance(value, int)]
    if numbers:
        return Found(numbers[0], words[0] if words else None)
    return Found(words[0] if words else None)


def _from_value(value: object) -> int | str | None:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    # Python refuses to print numbers of thousands of digits.
    if isinstance(value, int):
        return value if 0 <= value < 10**9 else None
    return _from_text(value)
