"""The pages that people read, README and docs/, and the fenced blocks in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
README = REPOSITORY / "README.md"
DOCS = sorted((REPOSITORY / "docs").rglob("*.md"))
ROOT_PAGES = [
    REPOSITORY / f"{name}.md"
    for name in ("AGENTS", "CHANGELOG", "CONTRIBUTING", "SECURITY", "examples/README")
]
"""Pages outside docs/ that are pages of the site, too."""
PAGES = [README, *DOCS]

_FENCED = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Line of its opening fence, counted from 1."""
    language: str
    mark: str
    """Text of the comment on the line above; "" if there is none."""
    text: str

    @property
    def place(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.name}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """Words of each line of a shell block, continued lines joined, comments removed."""
        joined = re.sub(r"[ \t]*\\\n[ \t]*", " ", self.text)
        words = (shlex.split(line, comments=True) for line in joined.splitlines())
        return [line for line in words if line]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text("utf-8")
    return [
        Block(
            page=page,
            line=text.count("\n", 0, found.start(2)) + 1,
            language=found[2],
            mark=found[1] or "",
            text=found[3],
        )
        for found in _FENCED.finditer(text)
    ]
