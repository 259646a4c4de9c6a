"""Triton's compiler without a GPU: registers, spills, memory and instructions of launched kernels.

A test launches a kernel as the network does, on tensors without storage:

    with compile_launches(90) as compiled:
        x = torch.empty(2, 96, 55, 55, dtype=torch.bfloat16, device="meta")
        gpu.normalize(x, None, 2, True)
    (kernel,) = compiled
    assert kernel.spills == 0
    assert kernel.count_instructions(x.numel()) < 60

Inside the block `kernel[grid](...)` compiles for that architecture, to machine code, and runs
nothing. Types, alignment and constants are those of the launch; a kernel that Triton or ptxas
refuses raises there. Compiled kernels stay in Triton's cache (TRITON_CACHE_DIR).
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities to compile for, times ten: A100, H100 and H200, B200."""


@dataclass(frozen=True)
class CompiledLaunch:
    """One launch, compiled."""

    name: str
    """Name of the kernel."""
    types: tuple[str, ...]
    """Triton's types of the arguments that are no constants."""
    constants: dict[str, Any]
    """Values of the arguments that are, by name."""
    architecture: int
    programs: int
    """Number of programs in the grid."""
    threads: int
    """Threads of a program."""
    registers: int
    """Registers of a thread."""
    spills: int
    """Bytes of a thread's stack: registers that did not fit, or arrays."""
    shared: int
    """Bytes of shared memory of a program."""
    instructions: int
    """Machine instructions of the kernel; padding after its end is left out."""
    ptx: str = field(repr=False)
    """The code that ptxas turned into them."""

    def count_instructions(self, numbers: int) -> float:
        """Return the instructions of all threads divided by `numbers`, for a kernel without loops.

        Args:
            numbers: the numbers that the launch computes or reads, whichever is to be judged.
        """
        return self.instructions * self.threads * self.programs / numbers


class ClaimedDevice:
    """A driver for Triton with a current device and nothing behind it.

    Triton keeps what it compiled by the number of the device: here that is the architecture.
    """

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture
        # The limits of an H100; Triton's compiler asks for them, and no kernel here comes near.
        limits = {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536}
        self.utils = SimpleNamespace(get_device_properties=lambda device: limits | {"warpSize": 32})

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_launches(architecture: int) -> Iterator[list[CompiledLaunch]]:
    """Compile every launch in the block for an architecture, and run none.

    Args:
        architecture: ten times the compute capability, as in `ARCHITECTURES`.

    Yields:
        The launches so far, in their order.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: list[CompiledLaunch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append(_describe(kernel, math.prod(grid), architecture))
        return kernel

    before = driver._active
    driver.set_active(ClaimedDevice(architecture))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        try:
            yield found
        finally:
            driver._active = before


def _describe(kernel: Any, programs: int, architecture: int) -> CompiledLaunch:
    """Read a kernel's machine code with the disassembler that triton's wheel brings."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout))
    operations = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(\S[^;]*);", done.stdout, re.M)
    while operations[-1].startswith(
        ("NOP", "BRA")
    ):  # the last of them, a jump to itself, is the end
        operations.pop()
    return CompiledLaunch(
        name=kernel.name,
        types=tuple(str(kind) for kind in kernel.src.signature.values() if kind != "constexpr"),
        constants={
            kernel.src.fn.arg_names[at[0]]: value for at, value in kernel.src.constants.items()
        },
        architecture=architecture,
        programs=programs,
        threads=32 * kernel.metadata.num_warps,
        registers=int(usage["REG"]),
        spills=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared=kernel.metadata.shared,
        instructions=len(operations),
        ptx=kernel.asm["ptx"],
    )


def meta_maps(*shape: int, dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    """Return a tensor [b, maps, h, w] without storage, to launch kernels on."""
    return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)
