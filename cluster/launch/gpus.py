"""GPUs of this machine: whether torch can use them, and what mends it where it cannot."""

from __future__ import annotations

import ctypes
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from pipeline.tools.errors import SetupError, summarize_error
from pipeline.tools.files import read_text

DRIVER_FILE = Path("/proc/driver/nvidia/version")
OLDEST_DRIVER = {12: 525, 13: 580}
"""Major release of CUDA -> oldest driver for its minor releases (CUDA Compatibility, table 2)."""
HIDING = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs."""
NONE_NAMED = "No CUDA GPUs are available"
"""Error of torch where CUDA_VISIBLE_DEVICES names no GPU that is there."""


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """Facts that decide whether torch can use the GPUs of this machine."""

    cuda: str | None = None
    """Release of CUDA that torch was built for; None: a CPU build."""
    driver: str | None = None
    """Release of NVIDIA's driver; None: there is none."""
    devices: int = 0
    """Number of GPUs with device files."""
    visible: str | None = None
    """Value of CUDA_VISIBLE_DEVICES; None: not set."""
    gpu_error: str = ""
    """Reason why torch sees no GPU; empty if it does, or if there is no driver."""


@dataclass(frozen=True)
class GpuFault:
    """Reason why torch cannot use the GPUs of this machine."""

    text: str
    mend: str
    is_broken: bool = True
    """False if this process is not meant to see them."""


def gather_gpu_state() -> GpuState:
    """Collect facts; imports torch."""
    import torch

    driver, error = read_driver_release(DRIVER_FILE), ""
    with warnings.catch_warnings():  # torch warns of what is told here
        warnings.simplefilter("ignore")
        if driver and torch.version.cuda and not torch.cuda.is_available():
            error = "it does not say why"
            try:
                torch.cuda.init()
            except Exception as why:
                error = summarize_error(why)
    return GpuState(
        cuda=torch.version.cuda,
        driver=driver,
        devices=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        gpu_error=error,
    )


def has_driver() -> bool:
    """Return whether NVIDIA's driver is here; without its library torch sees no GPU either.

    It spares a machine without GPUs the seconds that torch takes to import. In WSL 2 the library
    is there, and the file in /proc is not.
    """
    if DRIVER_FILE.exists():
        return True
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def read_driver_release(path: Path) -> str | None:
    """Read the release of NVIDIA's driver from its file in /proc; None without one."""
    found = re.search(r"Module[^\n]*?\s(\d+\.\d+[.\d]*)", read_text(path))
    return found[1] if found else None


def find_gpu_fault(have: GpuState) -> GpuFault | None:
    """Return why torch cannot use the GPUs; None: it can, or there is no driver."""
    if have.driver is None:
        return None
    if have.cuda is None:
        newest = "pip uninstall -y torch; pip install -c constraints.txt torch   # for CUDA"
        mend = suggest_build(have.driver) or newest
        return GpuFault(f"torch is a CPU build, and there is a driver {have.driver}", mend)
    if fault := find_driver_fault(have.cuda, have.driver):
        return fault
    if not have.gpu_error:
        return None
    if have.visible is not None and have.visible.strip() in HIDING:
        mend = "unset CUDA_VISIBLE_DEVICES"
        return GpuFault("CUDA_VISIBLE_DEVICES hides all GPUs", mend, is_broken=False)
    if not have.devices:
        mend = "docker run --gpus all, or nvidia.com/gpu in the pod's limits"
        return GpuFault("this process has no access to the GPUs", mend, is_broken=False)
    if have.visible and NONE_NAMED in have.gpu_error:
        text = f"CUDA_VISIBLE_DEVICES={have.visible} names none of the {have.devices} GPUs"
        return GpuFault(text, "unset CUDA_VISIBLE_DEVICES   # `nvidia-smi -L` lists their ids")
    mend = "nvidia-smi   # and `dmesg | grep -i nvrm`; on NVSwitch machines: "
    mend += "systemctl start nvidia-fabricmanager"
    return GpuFault(f"torch sees no GPU: {have.gpu_error}", mend)


def find_driver_fault(cuda: str, driver: str) -> GpuFault | None:
    """Return why a driver does not do for a build for a release of CUDA; None: it does."""
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]))
    if oldest is None or read_major(driver) >= oldest:
        return None
    mend = suggest_build(driver)
    mend = f"{mend}   # or update the driver" if mend else "update the driver"
    text = f"CUDA {cuda} needs a driver from {oldest} on, here is {driver}"
    return GpuFault(text, mend)


def suggest_build(driver: str) -> str:
    """Return the command that installs for a driver that is too old for the newest CUDA.

    Empty for a driver that is new enough for it, or too old for every build.
    """
    fitting = [cuda for cuda, oldest in OLDEST_DRIVER.items() if read_major(driver) >= oldest]
    is_older = fitting and max(fitting) < max(OLDEST_DRIVER)
    return f"make install CUDA={max(fitting)}" if is_older else ""


def read_major(release: str) -> int:
    """Return the first number of a release."""
    return int(release.split(".")[0])


def count_gpus(device: str) -> int:
    """Return the GPUs of this machine for a run that starts a Ray of its own.

    Args:
        device: setting of the run: auto, cpu or gpu.

    Raises:
        SetupError: there are GPUs that the run may use, and torch cannot.
    """
    if device == "cpu" or not has_driver():
        return 0
    import torch

    state = gather_gpu_state()
    fault = find_gpu_fault(state)
    if fault and (fault.is_broken or device == "gpu"):
        raise SetupError(describe_fault(fault))
    return 0 if fault else torch.cuda.device_count()


def describe_fault(fault: GpuFault) -> str:
    """Describe a fault and the ways out in one line."""
    return f"{fault.text}; {fault.mend.partition('   #')[0]}, or use --device cpu"
