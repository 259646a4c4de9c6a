"""The GPU's kernels: on a GPU; without one in Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from itertools import product

import pytest
import torch

from model.norm import describe_backend, local_response_norm, norm_pool
from model.norm.response import GPU_DTYPES, launch_gpu_kernel
from tests.helpers.gpu_compiler import ARCHITECTURES, compile_launches, meta_maps
from tests.helpers.lrn import LAYOUTS, by_hand, maps

INTERPRETED = """
import torch
from model.norm.response import launch_gpu_kernel
from tests.helpers.lrn import LAYOUTS, by_hand, maps

for dtype, bound, columns in ((torch.float64, 1e-12, 2), (torch.float32, 1e-6, 1)):
    for layout in LAYOUTS:
            for relu in (False, True):
                x = maps(3, 14, 5, 7).contiguous(memory_format=layout).requires_grad_()
                above = maps(3, 14, 5, 7, seed=2).contiguous(memory_format=layout)
                expected = by_hand(x.relu() if relu else x, columns)
                expected.backward(above)
                own = x.detach().to(dtype)
                y = launch_gpu_kernel(own, None, columns, relu)
                dx = launch_gpu_kernel(own, above.to(dtype), columns, relu)
                torch.testing.assert_close(y.double(), expected, rtol=bound, atol=bound)
                torch.testing.assert_close(dx.double(), x.grad, rtol=8 * bound, atol=400 * bound)
x = torch.full((1, 6, 2, 2), float("nan"), dtype=torch.float32)
assert launch_gpu_kernel(x, None, 1, True).isnan().all()
assert launch_gpu_kernel(x[:0], None, 1, True).shape == (0, 6, 2, 2)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs them")
def test_the_kernels_are_the_formula_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True,
                          env=environment, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "equal\n"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_launch_compiles_for_a_gpu(architecture: int) -> None:
    pytest.importorskip("triton")
    with compile_launches(architecture) as compiled:
        for layout, dtype in product(LAYOUTS, GPU_DTYPES):
            x = meta_maps(2, 96, 55, 55, dtype=dtype, layout=layout)
            for gradient in (None, x):
                launch_gpu_kernel(x, gradient, 2, True)
    assert len(compiled) == 2 * 2 * len(GPU_DTYPES)


@pytest.mark.gpu
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gpu_computes_the_formula(layout: torch.memory_format, columns: int, relu: bool) -> None:
    assert describe_backend("cuda") == "Triton kernels"
    x = maps(5, 96, 13, 13).contiguous(memory_format=layout).requires_grad_()
    above = maps(5, 96, 13, 13, seed=2)
    expected = by_hand(x.relu() if relu else x, columns)
    expected.backward(above)
    assert x.grad is not None
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        own = x.detach().to("cuda", dtype).requires_grad_()
        y = local_response_norm(own, columns, relu)
        y.backward(above.to("cuda", dtype))
        assert own.grad is not None
        assert y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y.double().cpu(), expected, rtol=bound, atol=bound)
        torch.testing.assert_close(own.grad.double().cpu(), x.grad, rtol=bound, atol=400 * bound)


@pytest.mark.gpu
def test_a_gpu_pools() -> None:
    x = maps(3, 12, 11, 9).contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.max_pool2d(by_hand(x.relu(), 2), 3, 2, ceil_mode=True)
    y = norm_pool(x.cuda(), 2, relu=True)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.gpu
def test_a_gpu_compiles_the_normalisation_into_the_network() -> None:
    x = maps(3, 12, 11, 9, dtype=torch.float32).cuda().requires_grad_()
    y = torch.compile(local_response_norm)(x, 2, True)
    y.square().sum().backward()
    wide = x.detach().double().cpu().requires_grad_()
    expected = by_hand(wide.relu(), 2)
    expected.square().sum().backward()
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double().cpu(), wide.grad, rtol=1e-4, atol=1e-3)
