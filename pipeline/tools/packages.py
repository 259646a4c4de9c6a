"""Installed packages: releases, and the command that brings one that is missing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from pipeline.tools.errors import SetupError

DISTRIBUTION = "duet-stream"
"""Name of Duet as pip has it; the packages that it installs are pipeline, model and cluster."""
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
"""Builds of NVIDIA DALI, for CUDA 13 and 12; only one can be installed."""


def find_version(*distributions: str) -> str | None:
    """Return the release of the first of these distributions that is installed; None: none is."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def suggest_extra(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml.

    A checkout that is not installed gets the command for a checkout: pip would look for the name in
    its registry, where Duet may not be, and another project may.
    """
    if find_version(DISTRIBUTION):
        return f"pip install '{DISTRIBUTION}[{extra}]'"
    return f"pip install -e '.[{extra}]' in the folder of Duet's pyproject.toml"


def require_package(name: str, extra: str, purpose: str) -> None:
    """Raise unless a module can be found.

    Args:
        name: module to find; it is not imported.
        extra: extra of pyproject.toml that brings it.
        purpose: what needs it, for example a flag.

    Raises:
        SetupError: it is missing; names the extra.
    """
    if find_spec(name) is None:
        raise SetupError(f"{purpose} needs the package {name}; {suggest_extra(extra)}")
