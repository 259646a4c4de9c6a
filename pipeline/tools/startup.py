"""Before a command's imports: its former names, and a first line where they take seconds.

`import torch` alone takes two seconds on a quiet machine, ten when its files are not cached.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from typing import Any

from pipeline.tools.stdio import has_written
from pipeline.tools.text import clean

SLOW = frozenset({"torch", "ray"})
"""Top-level packages that are announced; where DALI is used, torch comes before it."""


class FirstLine:
    """Import hook that prints one line on stderr before the first import of a package in `SLOW`.

    A command that has printed something by then, or imports none of them, prints nothing here.

    Args:
        name: name of the command.
        words: its arguments; those before the first flag are printed.
    """

    def __init__(self, name: str, words: Sequence[str]) -> None:
        flags = [index for index, word in enumerate(words) if word.startswith("-")]
        self._what = " ".join([name, *words[: min(flags, default=len(words))]])

    def find_spec(self, name: str, *_: object) -> None:
        """Print the line if the module is one of those; leave the import to the other hooks."""
        if name not in SLOW or self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        if not has_written():
            with suppress(OSError, ValueError, AttributeError):  # stderr is closed
                sys.stderr.write(clean(f"{self._what}: loading {name} ...") + "\n")
                sys.stderr.flush()


def install_first_line(name: str, words: Sequence[str]) -> None:
    """Install the hook for a command, in place of one before; not if its help is wanted."""
    remove_first_line()
    if not {"-h", "--help"} & set(words):
        sys.meta_path.insert(0, FirstLine(name, words))


def remove_first_line() -> None:
    """Remove the hook, if there is one."""
    sys.meta_path[:] = [hook for hook in sys.meta_path if not isinstance(hook, FirstLine)]


def install_for_module() -> None:
    """Install the hook where `python -m MODULE` is about to import a command's module.

    Python sets `sys.argv[0]` to "-m" while it looks for the module, and only then: helper processes
    and programs that import a package have another word there.
    """
    if sys.argv[:1] == ["-m"]:
        module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
        install_first_line(module.rpartition(".")[2], sys.argv[1:])


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
