"""First line of a command, before it imports a library that takes seconds.

`import torch` alone takes two seconds on a quiet machine, ten when its files are not cached.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

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
