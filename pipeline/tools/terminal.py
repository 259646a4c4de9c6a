"""Terminal: rich's console for text that comes from files, names and other people's messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from pipeline.tools.text import escape_controls


class Terminal(Console):
    """A console that shows text as it is: no markup, no emoji codes, control characters escaped."""

    def __init__(self, file: IO[str], **options: Any) -> None:
        """Set the stream, such as `sys.stdout`, and options of rich's console."""
        super().__init__(file=file, markup=False, emoji=False, highlight=False, **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render an object; every text of tables, bars and lines comes by here."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield segment._replace(text=escape_controls(segment.text, keep="\n"))

    def on_broken_pipe(self) -> None:
        """Leave a reader that has gone to the caller; rich would end the process with code 1."""
        raise BrokenPipeError
