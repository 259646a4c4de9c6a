"""Python, packages and driver: what is installed, and whether it goes together."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement

from cluster.doctor.finding import Finding, fail, first_line, ok, warn

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
OWN_LINES = ("torch", "ray", *DALI)
"""Packages with a finding of their own; the others share one."""
OLDEST_DRIVER = {12: 525, 13: 580}
"""CUDA's release -> oldest driver for all its minor releases (CUDA Compatibility, table 2)."""
INSTALL = "make install   # CUDA=12 for a driver before 580"


@dataclass(frozen=True, kw_only=True)
class Software:
    """What is installed here."""

    python: tuple[int, ...] = sys.version_info[:3]
    packages: dict[str, str] = field(default_factory=dict)
    """Releases of the distributions that are there."""
    ranges: dict[str, str] = field(default_factory=dict)
    """What pyproject.toml asks for, such as {"numpy": ">=2"}."""
    pins: dict[str, str] = field(default_factory=dict)
    """What constraints.txt says; empty where there is none."""
    cuda: str | None = None
    """That torch was built for; None: a CPU build."""
    driver: str | None = None
    """Release of NVIDIA's driver; None: there is none."""
    devices: int = 0
    """GPUs that this process has device files of."""
    hidden: bool = False
    """CUDA_VISIBLE_DEVICES keeps all GPUs from this process."""
    blind: str = ""
    """Why torch sees no GPU; empty if it does, or if there is no driver."""
    broken: dict[str, str] = field(default_factory=dict)
    """Modules that are installed and cannot be loaded, and why."""


def gather() -> Software:
    """Look."""
    ranges = ranges_in(REPOSITORY / "pyproject.toml")
    broken = {name: why for name in ("torch", "nvidia.dali") if (why := _loads(name))}
    cuda, driver = None, driver_in(Path("/proc/driver/nvidia/version"))
    blind = ""
    if "torch" not in broken:
        import torch

        cuda = torch.version.cuda
        if driver and cuda and not torch.cuda.is_available():
            try:
                torch.cuda.init()
            except Exception as error:
                blind = first_line(error)
            blind = blind or "it does not say why"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    pins = REPOSITORY / "constraints.txt"
    return Software(
        packages={name: found for name in ranges if (found := release(name))},
        ranges=ranges,
        pins=pins_in(pins.read_text(encoding="utf-8")) if pins.exists() else {},
        cuda=cuda,
        driver=driver,
        devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        hidden=visible is not None and visible.strip() in ("", "-1", "NoDevFiles"),
        blind=blind,
        broken=broken,
    )


def release(name: str) -> str | None:
    """Release of an installed distribution; None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _loads(name: str) -> str:
    """Why a module cannot be loaded though it is installed; empty if it can be, or is missing."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "" if error.name and name.startswith(error.name) else first_line(error)
    except Exception as error:
        return first_line(error)
    return ""


def ranges_in(path: Path) -> dict[str, str]:
    """Read what a pyproject.toml asks for, both builds of DALI included."""
    if not path.exists():  # installed as a wheel
        return dict.fromkeys(OWN_LINES, "")
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["cuda13"], *extras["cuda12"]]
    return {found.name: str(found.specifier) for found in map(Requirement, lines)}


def pins_in(text: str) -> dict[str, str]:
    """Read a constraints file."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


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
        yield fail(
            "Python", f"{version} is too old, 3.11 is needed",
            "rm -r .venv; make PYTHON=python3.11 install",
        )  # fmt: skip
    else:
        yield ok("Python", version)
    yield _torch(have)
    yield _dali(have)
    yield _ray(have)
    yield _others(have)


def _torch(have: Software) -> Finding:
    name = have.packages.get("torch")
    if name is None:
        return fail("torch", "is missing", INSTALL)
    if "torch" in have.broken:
        return fail("torch", f"{name} does not load: {have.broken['torch']}", _again("torch"))
    if not _fits(have, "torch"):
        return fail("torch", f"{name}; {have.ranges['torch']} is needed", _pip("torch"))
    if have.driver is None:
        return ok("torch", f"{name}, no NVIDIA driver here: computes on the CPU")
    if have.cuda is None:
        mend = f"pip uninstall -y torch; {_pip('torch')}   # a CUDA build"
        return fail("torch", f"{name} is a CPU build, and there is a driver {have.driver}", mend)
    found = _goes_with("torch", f"{name} for CUDA {have.cuda}", int(have.cuda.split(".")[0]), have)
    if found.status != "ok" or not have.blind:
        return found
    if have.hidden:
        return warn("torch", f"{found.value}; CUDA_VISIBLE_DEVICES hides all GPUs",
                    "unset CUDA_VISIBLE_DEVICES")  # fmt: skip
    if not have.devices:
        return warn("torch", f"{found.value}; the GPUs of this machine are not given to us",
                    "docker run --gpus all, or nvidia.com/gpu in the pod's limits")  # fmt: skip
    return fail("torch", f"{found.value}; sees no GPU: {have.blind}",
                "nvidia-smi   # and `dmesg | grep -i nvrm`; on NVSwitch machines: "
                "systemctl start nvidia-fabricmanager")  # fmt: skip


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
        return fail("DALI", "is missing", INSTALL)
    if len(there) > 1:
        mend = f"pip uninstall -y {' '.join(there)}; make install"
        return fail("DALI", f"{' and '.join(there)} overwrite each other", mend)
    (name,) = there
    what = f"{have.packages[name]} for CUDA {name[-3:-1]}"
    if "nvidia.dali" in have.broken:
        return fail("DALI", f"{what} does not load: {have.broken['nvidia.dali']}", _again(name))
    if not _fits(have, name):
        return fail("DALI", f"{what}; {have.ranges[name]} is needed", _pip(name))
    return _goes_with("DALI", what, int(name[-3:-1]), have)


def _ray(have: Software) -> Finding:
    found = have.packages.get("ray")
    if found is None:
        return fail("Ray's package", "is missing", INSTALL)
    if not _fits(have, "ray"):
        why = f"{found}; Duet uses parts that move between minors: {have.ranges['ray']}"
        return fail("Ray's package", why, _pip("'ray[default,train]'"))
    return ok("Ray's package", found)


def _others(have: Software) -> Finding:
    names = [name for name in have.ranges if name not in OWN_LINES]
    if missing := [name for name in names if name not in have.packages]:
        return fail("packages", f"missing: {', '.join(missing)}", INSTALL)
    if old := [name for name in names if not _fits(have, name)]:
        told = ", ".join(f"{name} {have.packages[name]} ({have.ranges[name]})" for name in old)
        return fail("packages", f"not what pyproject.toml asks for: {told}", _pip(*old))
    drifted = {
        name: pin
        for name, pin in have.pins.items()
        if name in have.packages and have.packages[name].split("+")[0] != pin
    }
    if drifted:
        told = ", ".join(
            f"{name} {have.packages[name]} (tested with {pin})" for name, pin in drifted.items()
        )
        return warn("packages", f"not as tested: {told}", _pip(*drifted))
    tested = (
        ", as constraints.txt has them" if have.pins else ", no constraints.txt to compare with"
    )
    return ok("packages", f"{len(names)} there{tested}")


def _fits(have: Software, name: str) -> bool:
    return Requirement(f"{name}{have.ranges.get(name, '')}").specifier.contains(
        have.packages[name], prereleases=True
    )


def _pip(*names: str) -> str:
    return f"pip install -c constraints.txt {' '.join(names)}"


def _again(name: str) -> str:
    return f"pip install --force-reinstall --no-deps -c constraints.txt {name}"
