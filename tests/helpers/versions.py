"""Made-up versions of a data set: their identities, without any file."""

from __future__ import annotations


def make_identity(number: int) -> str:
    """Return what might be the SHA-256 of a manifest, another one for each number."""
    return f"{number:064x}"
