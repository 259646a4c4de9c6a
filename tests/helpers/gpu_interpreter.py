"""Triton's interpreter in the process of a test: the kernels of a GPU, on tensors of a CPU.

with interpret_kernels() as launched:
    y = net(images)
assert launched == ["norm_forward", "dropout"]
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from model import layers
from model.gpu_support import GPU_DTYPES
from model.norm import native, response


@contextmanager
def interpret_kernels(runs: bool = True) -> Iterator[list[str]]:
    """Have the network take the way of a GPU, and Triton's interpreter run its kernels.

    Kernels that call functions of Triton's own library (`tl.zeros`, `tl.sum`) can only be recorded:
    to run them takes a process with TRITON_INTERPRET=1.

    Args:
        runs: False: kernels are recorded only, and leave their results undefined.

    Yields:
        Names of the kernels launched so far, in their order.
    """
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from model import gpu_kernels

    launched: list[str] = []

    class RecordedKernel(InterpretedFunction):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            launched.append(self.__name__)
            return super().run(*args, **kwargs) if runs else None

    def is_launched(x: Tensor) -> bool:
        return x.device.type == "cpu" and x.dtype in GPU_DTYPES

    with pytest.MonkeyPatch.context() as patch:
        for name, kernel in list(vars(gpu_kernels).items()):
            if isinstance(kernel, JITFunction):
                patch.setattr(gpu_kernels, name, RecordedKernel(kernel.fn))
        for module in (layers, response):
            patch.setattr(module, "prepare_gpu_kernels", is_launched)
        patch.setattr(native, "prepare_kernels", lambda x: False)
        yield launched
