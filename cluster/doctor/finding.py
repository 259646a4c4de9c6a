"""A line of the doctor's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

GB = 10**9


@dataclass(frozen=True)
class Finding:
    """Result of one check: subject, status, facts, and the way to mend it."""

    name: str
    status: Literal["ok", "warn", "FAIL"]
    value: str
    mend: str = ""
    """A command or a setting; empty if nothing has to be mended."""


def ok(name: str, value: str) -> Finding:
    """Return a finding with nothing to mend."""
    return Finding(name, "ok", value)


def warn(name: str, value: str, mend: str, *, unless: object = False) -> Finding:
    """Return a finding with which training runs, but slower or at risk; `unless`: it is well."""
    return ok(name, value) if unless else Finding(name, "warn", value, mend)


def fail(name: str, value: str, mend: str, *, unless: object = False) -> Finding:
    """Return a finding with which training fails or does not start; `unless`: it is well."""
    return ok(name, value) if unless else Finding(name, "FAIL", value, mend)
