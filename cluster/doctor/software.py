"""Checks of Python, packages and driver: what is installed, and whether it fits together."""

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

from cluster.doctor.finding import Finding, fail, ok, warn
from pipeline.tools.errors import summarize_error

REPOSITORY = Path(__file__).resolve().parent.parent.parent
DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
OWN_LINES = ("torch", "ray", *DALI)
"""Packages with a finding of their own; the others share one."""
OLDEST_DRIVER = {12: 525, 13: 580}
"""Major release of CUDA -> oldest driver for its minor releases (CUDA Compatibility, table 2)."""
INSTALL = "make install   # CUDA=12 for a driver before 580"


@dataclass(frozen=True, kw_only=True)
class Software:
    """Facts about the software on this machine."""

    python: tuple[int, ...] = sys.version_info[:3]
    packages: dict[str, str] = field(default_factory=dict)
    """Releases of the installed distributions."""
    ranges: dict[str, str] = field(default_factory=dict)
    """Version ranges of pyproject.toml, such as {"numpy": ">=2"}."""
    pins: dict[str, str] = field(default_factory=dict)
    """Releases in constraints.txt; empty if there is no such file."""
    cuda: str | None = None
    """Release of CUDA that torch was built for; None: a CPU build."""
    driver: str | None = None
    """Release of NVIDIA's driver; None: there is none."""
    devices: int = 0
    """Number of GPUs with device files."""
    are_gpus_hidden: bool = False
    """Whether CUDA_VISIBLE_DEVICES hides all GPUs from this process."""
    gpu_error: str = ""
    """Why torch sees no GPU; empty if it does, or if there is no driver."""
    broken: dict[str, str] = field(default_factory=dict)
    """Modules that are installed but cannot be imported -> error message."""


def gather() -> Software:
    """Collect facts; imports torch and DALI."""
    ranges = read_ranges(REPOSITORY / "pyproject.toml")
    broken = {name: why for name in ("torch", "nvidia.dali") if (why := _try_import(name))}
    cuda, driver = None, read_driver_release(Path("/proc/driver/nvidia/version"))
    gpu_error = ""
    if "torch" not in broken:
        import torch

        cuda = torch.version.cuda
        if driver and cuda and not torch.cuda.is_available():
            try:
                torch.cuda.init()
            except Exception as error:
                gpu_error = summarize_error(error)
            gpu_error = gpu_error or "it does not say why"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    pins = REPOSITORY / "constraints.txt"
    return Software(
        packages={name: found for name in ranges if (found := find_release(name))},
        ranges=ranges,
        pins=parse_pins(pins.read_text(encoding="utf-8")) if pins.exists() else {},
        cuda=cuda,
        driver=driver,
        devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        are_gpus_hidden=visible is not None and visible.strip() in ("", "-1", "NoDevFiles"),
        gpu_error=gpu_error,
        broken=broken,
    )


def find_release(name: str) -> str | None:
    """Release of a distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try_import(name: str) -> str:
    """Error message of importing an installed module; empty if it imports, or is missing."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "" if error.name and name.startswith(error.name) else summarize_error(error)
    except Exception as error:
        return summarize_error(error)
    return ""


def read_ranges(path: Path) -> dict[str, str]:
    """Read the version ranges of a pyproject.toml, including both builds of DALI."""
    if not path.exists():  # installed as a wheel
        return dict.fromkeys(OWN_LINES, "")
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["cuda13"], *extras["cuda12"]]
    return {found.name: str(found.specifier) for found in map(Requirement, lines)}


def parse_pins(text: str) -> dict[str, str]:
    """Parse a constraints file."""
    return dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))


def read_driver_release(path: Path) -> str | None:
    """Read the release of NVIDIA's driver from its file in /proc; None without one."""
    try:
        found = re.search(r"Module[^\n]*?\s(\d+\.\d+[.\d]*)", path.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found[1] if found else None


def judge(have: Software) -> Iterator[Finding]:
    """Judge Python, torch, DALI, Ray and the other packages."""
    version = ".".join(map(str, have.python))
    if have.python < (3, 11):
        yield fail(
            "Python", f"{version} is too old, 3.11 is needed",
            "rm -r .venv; make PYTHON=python3.11 install",
        )  # fmt: skip
    else:
        yield ok("Python", version)
    yield _judge_torch(have)
    yield _judge_dali(have)
    yield _judge_ray(have)
    yield _judge_others(have)


def _judge_torch(have: Software) -> Finding:
    name = have.packages.get("torch")
    if name is None:
        return fail("torch", "is missing", INSTALL)
    if "torch" in have.broken:
        return fail(
            "torch", f"{name} does not load: {have.broken['torch']}", _suggest_reinstall("torch")
        )
    if not _is_in_range(have, "torch"):
        return fail("torch", f"{name}; {have.ranges['torch']} is needed", _suggest_install("torch"))
    if have.driver is None:
        return ok("torch", f"{name}, no NVIDIA driver here: computes on the CPU")
    if have.cuda is None:
        mend = f"pip uninstall -y torch; {_suggest_install('torch')}   # a CUDA build"
        return fail("torch", f"{name} is a CPU build, and there is a driver {have.driver}", mend)
    found = _judge_driver(
        "torch", f"{name} for CUDA {have.cuda}", int(have.cuda.split(".")[0]), have
    )
    if found.status != "ok" or not have.gpu_error:
        return found
    if have.are_gpus_hidden:
        return warn("torch", f"{found.value}; CUDA_VISIBLE_DEVICES hides all GPUs",
                    "unset CUDA_VISIBLE_DEVICES")  # fmt: skip
    if not have.devices:
        return warn("torch", f"{found.value}; this process has no access to the GPUs",
                    "docker run --gpus all, or nvidia.com/gpu in the pod's limits")  # fmt: skip
    return fail("torch", f"{found.value}; sees no GPU: {have.gpu_error}",
                "nvidia-smi   # and `dmesg | grep -i nvrm`; on NVSwitch machines: "
                "systemctl start nvidia-fabricmanager")  # fmt: skip


def _judge_driver(name: str, what: str, cuda: int, have: Software) -> Finding:
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


def _judge_dali(have: Software) -> Finding:
    installed = [name for name in DALI if name in have.packages]
    if not installed:
        return fail("DALI", "is missing", INSTALL)
    if len(installed) > 1:
        mend = f"pip uninstall -y {' '.join(installed)}; make install"
        return fail("DALI", f"{' and '.join(installed)} overwrite each other", mend)
    (name,) = installed
    what = f"{have.packages[name]} for CUDA {name[-3:-1]}"
    if "nvidia.dali" in have.broken:
        return fail(
            "DALI", f"{what} does not load: {have.broken['nvidia.dali']}", _suggest_reinstall(name)
        )
    if not _is_in_range(have, name):
        return fail("DALI", f"{what}; {have.ranges[name]} is needed", _suggest_install(name))
    return _judge_driver("DALI", what, int(name[-3:-1]), have)


def _judge_ray(have: Software) -> Finding:
    found = have.packages.get("ray")
    if found is None:
        return fail("Ray's package", "is missing", INSTALL)
    if not _is_in_range(have, "ray"):
        why = f"{found}; Duet uses parts that move between minors: {have.ranges['ray']}"
        return fail("Ray's package", why, _suggest_install("'ray[default,train]'"))
    return ok("Ray's package", found)


def _judge_others(have: Software) -> Finding:
    names = [name for name in have.ranges if name not in OWN_LINES]
    if missing := [name for name in names if name not in have.packages]:
        return fail("packages", f"missing: {', '.join(missing)}", INSTALL)
    if old := [name for name in names if not _is_in_range(have, name)]:
        text = ", ".join(f"{name} {have.packages[name]} ({have.ranges[name]})" for name in old)
        return fail("packages", f"not what pyproject.toml asks for: {text}", _suggest_install(*old))
    drifted = {
        name: pin
        for name, pin in have.pins.items()
        if name in have.packages and have.packages[name].split("+")[0] != pin
    }
    if drifted:
        text = ", ".join(
            f"{name} {have.packages[name]} (tested with {pin})" for name, pin in drifted.items()
        )
        return warn("packages", f"not as tested: {text}", _suggest_install(*drifted))
    tested = (
        ", as constraints.txt has them" if have.pins else ", no constraints.txt to compare with"
    )
    return ok("packages", f"{len(names)} there{tested}")


def _is_in_range(have: Software, name: str) -> bool:
    return Requirement(f"{name}{have.ranges.get(name, '')}").specifier.contains(
        have.packages[name], prereleases=True
    )


def _suggest_install(*names: str) -> str:
    return f"pip install -c constraints.txt {' '.join(names)}"


def _suggest_reinstall(name: str) -> str:
    return f"pip install --force-reinstall --no-deps -c constraints.txt {name}"
