"""Two reports side by side: what changed, and whether that is more than noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SURE = 3.0
"""Standard errors of a difference that are more than noise."""
LEAST = 0.03
"""Share below which no difference counts, however steady both were: machines drift."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One row then and now."""

    name: str
    before: float
    """Pictures a second."""
    after: float
    noise: float
    """Share of it that a difference has to exceed."""

    @property
    def ratio(self) -> float:
        """Now over then."""
        return self.after / self.before

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `same` within the noise."""
        if abs(self.ratio - 1) <= self.noise:
            return "same"
        return "faster" if self.ratio > 1 else "slower"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return the rows that both have, the whole stream last."""
    before = {row["name"]: row for row in (*old["stages"], old["whole"])}
    found = []
    for row in (*new["stages"], new["whole"]):
        if (then := before.get(row["name"])) is not None and then["img_s"] > 0:
            error = (then["error"] ** 2 + row["error"] ** 2) ** 0.5
            found.append(Change(name=row["name"], before=then["img_s"], after=row["img_s"],
                                noise=max(LEAST, SURE * error)))  # fmt: skip
    return found


def unlike(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the two besides their speed, in words."""
    found = []
    for part in ("machine", "setting", "data"):
        for name, value in new[part].items():
            if (then := old[part].get(name)) != value:
                found.append(f"{name}: {then} -> {value}")
    return found


def regressed(found: list[Change]) -> bool:
    """Whether the whole stream is slower beyond noise; a stage that does not matter may be."""
    return bool(found) and found[-1].verdict == "slower"
