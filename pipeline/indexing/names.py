"""Labels as they are written -> numbers from 0, and the names of the classes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.tools.errors import UsageError

MOST = 1_000_000
"""Classes that a set may have; a label beyond is an id of something else."""


@dataclass(frozen=True)
class Classes:
    """The classes of a set; a label is a place in `names`."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, labels: Sequence[Sequence[int | str]]) -> Classes:
        """Return the classes that the labels of the training samples show.

        Numbers count from 0, and the class of a number is called by it; names are sorted.

        Raises:
            UsageError: there are numbers and names, no label 0, or fewer than two classes.
        """
        seen = {label for part in labels for label in part}
        numbers = [label for label in seen if isinstance(label, int)]
        words = sorted(label for label in seen if isinstance(label, str))
        if words and numbers:
            raise UsageError(
                f"some labels are numbers ({min(numbers)}) and some names ({words[0]!r}); "
                "give the list of all classes with --classes FILE"
            )
        if len(words) > 1:
            return cls(tuple(words))
        if numbers and min(numbers) > 0:
            raise UsageError(
                f"labels run from {min(numbers)} to {max(numbers)}, and Duet counts from 0; if "
                "they do, too, give the list of all classes with --classes FILE, else repack"
            )
        if max(numbers, default=0) < 1:
            raise UsageError("the training samples are of one class; it needs two or more")
        return cls(tuple(map(str, range(max(numbers) + 1))))

    def number(self, label: int | str) -> int | str:
        """Return the number of a label, or the reason (a text) why it has none."""
        if isinstance(label, str):
            place = self._places.get(label)
            return f"label {label!r} is no class of this set" if place is None else place
        if 0 <= label < len(self.names):
            return label
        return f"label {str(label)[:40]} is outside the classes, 0 to {len(self.names) - 1}"

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.names)}


def read_classes(path: Path) -> tuple[str, ...]:
    """Read class names: a JSON list, or a name a line, in the order of the labels.

    Raises:
        UsageError: it cannot be read, is empty, or has a name twice.
    """
    try:
        text = path.read_text("utf-8")
        names = json.loads(text) if text.lstrip().startswith("[") else text.splitlines()
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "no UTF-8 text or JSON list"
        raise UsageError(f"--classes {path} cannot be read ({why}); name another file") from error
    names = [name.strip() if isinstance(name, str) else name for name in names]
    while names and names[-1] == "":
        names.pop()
    for name in names:
        if not isinstance(name, str) or not name or not name.isprintable():
            raise UsageError(f"--classes {path} has {name!r}, which is no name; one a line")
    if len(names) < 2:
        raise UsageError(f"--classes {path} names {len(names)} classes; it needs two or more")
    if len(set(names)) < len(names):
        twice = Counter(names).most_common(1)[0][0]
        raise UsageError(f"--classes {path} has {twice!r} more than once; a label needs one name")
    return tuple(names)
