"""How large a picture may be before it is not even read."""

from __future__ import annotations

from pipeline.sources.listing import Unreadable

MOST_BYTES = 256 << 20
"""A picture larger than this is not read: memory must not depend on what a source claims."""


def refuse_if_too_large(size: int) -> None:
    """Raise `Unreadable` for a picture that is too large to be held in memory."""
    if size > MOST_BYTES:
        raise Unreadable(f"too large: {size:,} bytes, {MOST_BYTES:,} are read at most")
