"""Checks of Python, packages and driver: what is installed, and whether it fits together."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cluster.doctor.finding import Finding, fail, ok, warn
from cluster.launch.gpus import GpuState, find_driver_fault, find_gpu_fault, gather_gpu_state
from pipeline.tools.errors import summarize_error
from pipeline.tools.files import read_text
from pipeline.tools.packages import DALI, DISTRIBUTION, find_version, suggest_extra

REPOSITORY = Path(__file__).resolve().parent.parent.parent
OWN_LINES = ("torch", "ray", *DALI)
"""Packages with a finding of their own; the others share one."""
INSTALL = "make install   # CUDA=12 for a driver before 580"


@dataclass(frozen=True, kw_only=True)
class Software(GpuState):
    """Facts about the software on this machine, and about its GPUs."""

    python: tuple[int, ...] = sys.version_info[:3]
    packages: dict[str, str] = field(default_factory=dict)
    """Releases of the installed distributions."""
    ranges: dict[str, str] = field(default_factory=dict)
    """Version ranges of pyproject.toml, such as {"numpy": ">=2"}."""
    pins: dict[str, str] = field(default_factory=dict)
    """Releases in constraints.txt; empty if there is no such file."""
    broken: dict[str, str] = field(default_factory=dict)
    """Modules that are installed but cannot be imported -> error message."""


def gather() -> Software:
    """Collect facts; imports torch and DALI."""
    ranges = read_ranges(REPOSITORY / "pyproject.toml")
    packages = {name: release for name in ranges if (release := find_version(name))}
    broken = {name: why for name in ("torch", "nvidia.dali") if (why := _try_import(name))}
    gpus = GpuState() if "torch" in broken else gather_gpu_state()
    pins = re.findall(r"^([\w-]+)==(\S+)$", read_text(REPOSITORY / "constraints.txt"), re.MULTILINE)
    return Software(
        packages=packages,
        ranges=ranges,
        pins=dict(pins),
        broken=broken,
        **vars(gpus),
    )


def _try_import(name: str) -> str:
    """Return the error of importing an installed module; empty if it imports, or is missing."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "" if error.name and name.startswith(error.name) else summarize_error(error)
    except Exception as error:
        return summarize_error(error)
    return ""


def read_ranges(path: Path) -> dict[str, str]:
    """Read the version ranges of a pyproject.toml, including both builds of DALI.

    Without such a file, as in a wheel, they are those of the installed package.
    """
    if text := read_text(path):
        project = tomllib.loads(text)["project"]
        extras = project["optional-dependencies"]
        lines = [*project["dependencies"], *extras["cuda13"], *extras["cuda12"]]
    elif find_version(DISTRIBUTION):
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    else:
        lines = list(OWN_LINES)
    found = map(Requirement, lines)
    return {one.name: str(one.specifier) for one in found if not one.marker or one.name in DALI}


def judge(have: Software) -> Iterator[Finding]:
    """Judge Python, torch, DALI, Ray and the other packages."""
    version = ".".join(map(str, have.python))
    if have.python < (3, 11):
        mend = "rm -r .venv; make PYTHON=python3.11 install"
        yield fail("Python", f"{version} is too old, 3.11 is needed", mend)
    else:
        yield ok("Python", version)
    yield _judge_torch(have)
    yield _judge_dali(have)
    ray = have.packages.get("ray", "")
    text = f"{ray}; Duet uses parts that move between minors"
    yield _find_fault(have, "ray", "Ray's package", text, "ray") or ok("Ray's package", ray)
    yield _judge_others(have)


def _judge_torch(have: Software) -> Finding:
    release = have.packages.get("torch", "")
    if found := _find_fault(have, "torch", "torch", release, "torch"):
        return found
    if have.driver is None:
        return ok("torch", f"{release}, no NVIDIA driver here: computes on the CPU")
    text = f"{release} for CUDA {have.cuda}, driver {have.driver}" if have.cuda else release
    if fault := find_gpu_fault(have):
        status = fail if fault.is_broken else warn
        return status("torch", f"{text}; {fault.text}", fault.mend)
    return ok("torch", text)


def _find_fault(have: Software, package: str, label: str, text: str, module: str) -> Finding | None:
    """Judge whether a package is there, loads and fits; None: it does."""
    if package not in have.packages:
        return fail(label, "is missing", _suggest_all(have))
    if module in have.broken:
        mend = _suggest_install(have, "--force-reinstall", "--no-deps", package)
        return fail(label, f"{text} does not load: {have.broken[module]}", mend)
    if not _is_in_range(have, package):
        needed = f"{text}; {have.ranges[package]} is needed"
        return fail(label, needed, _suggest_install(have, package))
    return None


def _judge_dali(have: Software) -> Finding:
    installed = [name for name in DALI if name in have.packages]
    if len(installed) > 1:
        mend = f"pip uninstall -y {' '.join(installed)}; {_suggest_all(have)}"
        return fail("DALI", f"{' and '.join(installed)} overwrite each other", mend)
    name = installed[0] if installed else DALI[0]
    cuda = name[-3:-1]
    text = f"{have.packages.get(name)} for CUDA {cuda}"
    if found := _find_fault(have, name, "DALI", text, "nvidia.dali"):
        return found
    if have.driver is None:
        return ok("DALI", text)
    text = f"{text}, driver {have.driver}"
    if fault := find_driver_fault(cuda, have.driver):
        return fail("DALI", f"{text}; {fault.text}", fault.mend)
    return ok("DALI", text)


def _judge_others(have: Software) -> Finding:
    names = [name for name in have.ranges if name not in OWN_LINES]
    if missing := [name for name in names if name not in have.packages]:
        return fail("packages", f"missing: {', '.join(missing)}", _suggest_all(have))
    if old := [name for name in names if not _is_in_range(have, name)]:
        text = ", ".join(f"{name} {have.packages[name]} ({have.ranges[name]})" for name in old)
        return fail(
            "packages", f"not what pyproject.toml asks for: {text}", _suggest_install(have, *old)
        )
    packages = have.packages
    drifted = [n for n, pin in have.pins.items() if packages.get(n, pin).split("+")[0] != pin]
    if drifted:
        text = ", ".join(f"{n} {packages[n]} (tested with {have.pins[n]})" for n in drifted)
        return warn("packages", f"not as tested: {text}", _suggest_install(have, *drifted))
    tested = "as constraints.txt has them" if have.pins else "no constraints.txt to compare with"
    return ok("packages", f"{len(names)} there, {tested}")


def _is_in_range(have: Software, name: str) -> bool:
    allowed = SpecifierSet(have.ranges.get(name, ""))
    return allowed.contains(have.packages[name], prereleases=True)


def _suggest_all(have: Software) -> str:
    """Return the command that installs all that is needed: in a checkout, make's."""
    return INSTALL if have.pins else f"{suggest_extra('cuda13')}   # cuda12 for a driver before 580"


def _suggest_install(have: Software, *words: str) -> str:
    parts = {"ray": "'ray[default,train]'"}
    pins = ["-c", "constraints.txt"] if have.pins else []
    return " ".join(["pip", "install", *pins, *(parts.get(word, word) for word in words)])
