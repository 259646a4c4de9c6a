"""What is damaged, and where."""

from __future__ import annotations

from typing import Any

Damage = dict[str, Any]
"""One finding: `file`, `reason`, and for a damaged sample `sample` (its id in the split) and `key`
(its WebDataset key)."""

DIFFERS = "SHA-256 differs from the manifest"
MISSING = "missing"


def damage(file: str, reason: str, sample: int | None = None, key: str | None = None) -> Damage:
    """Return a finding."""
    found: Damage = {"file": file}
    if sample is not None:
        found["sample"] = sample
    if key is not None:
        found["key"] = key
    return found | {"reason": reason}
