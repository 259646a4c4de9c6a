"""Commands that have a new name: `python -m OLD` says the new one in a line, and runs it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from typing import Any


class Renames:
    """Import hook that finds modules under their former names.

    It stands first in `sys.meta_path`: a folder that an older checkout left behind with nothing but
    `__pycache__` in it would be taken for the package otherwise.

    Args:
        names: the former name of each module or package, and its name now.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._said: set[str] = set()

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """Return where the module lies now; write its new name to standard error."""
        new = self._names.get(name)
        found = importlib.util.find_spec(new) if new else None
        if found is None:
            return None
        if name not in self._said:
            self._said.add(name)
            sys.stderr.write(f"note: {name} is called {new} now\n")
        return importlib.util.spec_from_file_location(
            name, found.origin, submodule_search_locations=found.submodule_search_locations
        )
