"""DALI's `.idx`: where each file of each sample of a tar lies, as its `wds2idx` writes it.

v1.2 2
cls 512 1 000.cls jpg 1536 1000 000.jpg
cls 3072 1 001.cls jpg 4096 990 001.jpg
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.dataset.samples import Sample

_COLUMNS = {"v1.1": 3, "v1.2": 4}
"""Words a file; the fourth is its name."""

Places = list[tuple[str, int, int]]
"""Ending, offset and size of the files of a sample."""


def idx_text(samples: Sequence[Sample]) -> bytes:
    """Return the `.idx` that lists these samples."""
    lines = [f"v1.2 {len(samples)}"]
    for sample in samples:
        # Words are told apart by blanks; of a name with some, DALI needs no more than a word.
        words = (
            f"{_word(part.ending)} {part.offset} {part.size} {_word(part.name)}"
            for part in sample.parts
        )
        lines.append(" ".join(words))
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def places_of(samples: Sequence[Sample]) -> list[Places]:
    """Return what `read_idx` finds in `idx_text(samples)`."""
    return [[(_word(p.ending), p.offset, p.size) for p in sample.parts] for sample in samples]


def read_idx(content: bytes) -> list[Places]:
    """Return what an `.idx` lists.

    Raises:
        ValueError: it is none; the message says why.
    """
    head, *lines = content.decode("utf-8", "surrogateescape").splitlines() or [""]
    version, _, count = head.partition(" ")
    if version not in _COLUMNS:
        raise ValueError("it does not begin with v1.1 or v1.2")
    if count.strip() != str(len(lines)):
        raise ValueError(f"it has {len(lines)} lines, and says {count.strip()!r}")
    return [_places(line.split(), _COLUMNS[version], number) for number, line in enumerate(lines)]


def _places(words: list[str], columns: int, number: int) -> Places:
    groups = [words[start : start + columns] for start in range(0, len(words), columns)]
    try:
        return [(group[0], int(group[1]), int(group[2])) for group in groups]
    except (IndexError, ValueError) as error:
        raise ValueError(f"line {number + 2} is not of endings, offsets and sizes") from error


def _word(text: str) -> str:
    return re.sub(r"\s", "_", text)
