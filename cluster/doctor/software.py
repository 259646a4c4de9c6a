"""Python, packages and driver: what is installed, and whether it goes together."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.doctor.finding import Finding, fail, ok, warn

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
PACKAGES = ("numpy", "webdataset", "safetensors", "fsspec", "pillow", "simplejpeg", "isal")
OLDEST_DRIVER = {12: 525, 13: 580}
"""CUDA's release -> the oldest driver for its minor releases (CUDA Compatibility, table 2)."""


@dataclass(frozen=True, kw_only=True)
class Software:
    """What is installed here."""

    python: tuple[int, ...] = sys.version_info[:3]
    packages: dict[str, str] = field(default_factory=dict)
    """Releases of the distributions that are there."""
    cuda: str | None = None
    """That torch was built for; None: a CPU build."""
    driver: str | None = None
    """Release of NVIDIA's driver; None: there is none."""
    pins: dict[str, str] = field(default_factory=dict)
    """What constraints.txt says."""


def gather() -> Software:
    """Look."""
    import torch

    found = {}
    for name in ("torch", "ray", *DALI, *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    pins = REPOSITORY / "constraints.txt"
    text = pins.read_text(encoding="utf-8") if pins.exists() else ""
    return Software(
        packages=found,
        cuda=torch.version.cuda,
        driver=driver_in(Path("/proc/driver/nvidia/version")),
        pins=dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE)),
    )


def driver_in(path: Path) -> str | None:
    """Read the release of NVIDIA's driver from what it says of itself in /proc."""
    try:
        found = re.search(r"Module[^\n]*?\s(\d+\.\d+[.\d]*)", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def judge(have: Software) -> Iterator[Finding]:
    """Yield what there is to say."""
    version = ".".join(map(str, have.python))
    if have.python < (3, 11):
        yield fail("Python", version, "make clean; make PYTHON=python3.11 install")
    else:
        yield ok("Python", version)
    yield _torch(have)
    yield _dali(have)
    yield _ray(have)
    if missing := [name for name in PACKAGES if name not in have.packages]:
        yield fail("packages", f"missing: {', '.join(missing)}", "make install")
    elif drifted := _drifted(have):
        mend = "pip install -c constraints.txt -e '.[cuda13]'"
        yield warn("packages", f"not as tested: {', '.join(drifted)}", mend)
    else:
        yield ok("packages", f"{len(PACKAGES)} there, as constraints.txt has them")


def _torch(have: Software) -> Finding:
    name = have.packages.get("torch", "missing")
    if have.driver is None:
        return ok("torch", f"{name}, no NVIDIA driver here: computes on the CPU")
    if have.cuda is None:
        mend = "pip uninstall -y torch; pip install -c constraints.txt torch   # a CUDA build"
        return fail("torch", f"{name} is a CPU build, and there is a driver {have.driver}", mend)
    return _goes_with("torch", f"{name} for CUDA {have.cuda}", int(have.cuda.split(".")[0]), have)


def _goes_with(name: str, what: str, cuda: int, have: Software) -> Finding:
    """Judge whether the driver is new enough for a release of CUDA."""
    oldest = OLDEST_DRIVER.get(cuda)
    if have.driver is None or oldest is None:
        return ok(name, what)
    if int(have.driver.split(".")[0]) < oldest:
        older = "install a build for CUDA 12 (make install CUDA=12), or " if cuda > 12 else ""
        return fail(
            name, f"{what} needs a driver from {oldest} on, here is {have.driver}",
            f"{older}update the driver",
        )  # fmt: skip
    return ok(name, f"{what}, driver {have.driver}")


def _dali(have: Software) -> Finding:
    there = [name for name in DALI if name in have.packages]
    if not there:
        return fail("DALI", "missing", "make install   # CUDA=12 for an older driver")
    if len(there) > 1:
        mend = f"pip uninstall -y {' '.join(there)}; make install"
        return fail("DALI", f"{' and '.join(there)} overwrite each other", mend)
    (name,) = there
    what = f"{have.packages[name]} for CUDA {name[-3:-1]}"
    return _goes_with("DALI", what, int(name[-3:-1]), have)


def _ray(have: Software) -> Finding:
    found = have.packages.get("ray")
    if found is None:
        return fail("Ray", "missing", "make install")
    if not found.startswith("2.60."):
        mend = "pip install -c constraints.txt 'ray[default,train]'"
        return fail("Ray", f"{found}; Duet uses parts that move between minors: 2.60", mend)
    return ok("Ray", found)


def _drifted(have: Software) -> list[str]:
    return [
        f"{name} {have.packages[name]} (tested with {pin})"
        for name, pin in have.pins.items()
        if name in have.packages and have.packages[name].split("+")[0] != pin
    ]
