"""Resources of the GPU kernels as Triton compiles them, without a GPU: a table.

    python benchmarks/gpu/kernels.py [80 90 100]

Each launch of normalization and pooling in each type and layout: registers of a thread, bytes that
spilled, and machine instructions a number of the input. Needs triton and pytest, whose helper
compiles for an architecture that is claimed; some minutes for all three, and then Triton's cache.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model.gpu_support import GPU_DTYPES
from model.norm import gpu
from tests.helpers.gpu_compiler import (
    ARCHITECTURES,
    compile_launches,
    meta_maps,
)
from tests.helpers.lrn import LAYOUTS


def print_launches(architecture: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Compile the launches of the first layer in one type and layout, and print a row for each."""
    x = meta_maps(2, 96, 55, 55, dtype=dtype, layout=layout)
    with compile_launches(architecture) as kernels:
        gpu.normalize(x, None, 2, True)
        gpu.normalize(x, x, 2, True)
        for norm in (True, False) if layout == torch.channels_last else ():
            y, origin = gpu.pool(x, 2, True, norm, 3, 2, True)
            gpu.pool_gradient(x, y, origin, x.shape[2:], 2, True, norm, 3, 2)
    for kernel in kernels:
        name = kernel.name + ("" if kernel.constants.get("norm", True) else ", no norm")
        row = (name, str(dtype)[6:], str(layout)[6:], architecture)
        numbers = (kernel.registers, kernel.spills, f"{kernel.count_instructions(x.numel()):.1f}")
        print("| " + " | ".join(str(value) for value in row + numbers) + " |", flush=True)


if __name__ == "__main__":
    print("| kernel | type | layout | sm | registers | spilled bytes | instructions a number |")
    print("|---|---|---|---|---|---|---|")
    wanted = [int(word) for word in sys.argv[1:]] or ARCHITECTURES
    for settings in product(wanted, GPU_DTYPES, LAYOUTS):
        print_launches(*settings)
