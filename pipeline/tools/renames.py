"""Import hook for renamed commands: `python -m OLD` prints the new name and runs it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from typing import Any


class Renames:
    """Import hook that finds modules under their former names.

    It must be first in `sys.meta_path`: otherwise a folder of an older checkout that holds nothing
    but `__pycache__` would be imported as a package.

    Args:
        names: new name of each module or package, by former name.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names
        self._said: set[str] = set()

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        """Return the spec of the renamed module; print its new name on stderr."""
        new = self._names.get(name)
        found = importlib.util.find_spec(new) if new else None
        if found is None:
            return None
        import multiprocessing  # only now: every command imports this module

        # A spawned process imports the command again before its work: `_inheriting` marks it.
        is_helper = getattr(multiprocessing.current_process(), "_inheriting", False)
        if not is_helper and name not in self._said:
            self._said.add(name)
            sys.stderr.write(f"note: {name} is called {new} now\n")
        return importlib.util.spec_from_file_location(
            name, found.origin, submodule_search_locations=found.submodule_search_locations
        )
