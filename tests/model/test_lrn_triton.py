"""The GPU's kernels: on a GPU; without one in Triton's interpreter, and compiled for GPUs."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from model import gpu_support
from model.gpu_support import GPU_DTYPES
from model.norm import (
    describe_backend,
    gpu,
    local_response_norm,
    native,
    norm_pool,
    reference,
)
from model.norm.reference import LRN_ALPHA, LRN_SIZE
from model.norm.response import NormKernel
from tests.helpers.gpu_compiler import (
    CompiledLaunch,
    compile_launches,
    meta_maps,
)
from tests.helpers.gpu_interpreter import interpret_kernels
from tests.helpers.lrn import LAYOUTS, Norm, by_hand, maps

without_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
# Most instructions a number, forward and backward: of a column's maps 8, 4 or 2 are computed
# together. It was 86 and 217 in bfloat16 when each number was computed for itself.
MOST_NORM = {
    torch.bfloat16: (26, 50),
    torch.float16: (26, 50),
    torch.float32: (30, 60),
    torch.float64: (180, 370),
}
# The same a number of the input, with pooling of 3x3 windows: with and without normalization.
MOST_POOL = {True: (38, 62), False: (17, 17)}
# The interpreter cuts off the bits of bfloat16 where a GPU rounds.
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}
MOST_REGISTERS = 168
"""Three programs of four warps on a multiprocessor, which has 65536 registers."""


def check_resources(kernel: CompiledLaunch) -> None:
    """Check that everything is in registers, and those few enough for three programs."""
    assert (kernel.spills, kernel.shared) == (0, 0), kernel
    assert kernel.registers <= MOST_REGISTERS, kernel


TRAINED = (torch.bfloat16, torch.float32)
"""The types that a training launches."""
COMPILED = [
    (90, TRAINED),
    *(
        pytest.param(architecture, types, marks=pytest.mark.slow)
        for architecture, types in (
            (90, tuple(dtype for dtype in GPU_DTYPES if dtype not in TRAINED)),
            (80, TRAINED),
            (100, TRAINED),
        )
    ),
]
"""Architectures and types to compile for: one takes ten seconds."""


@without_triton
@pytest.mark.parametrize(("architecture", "types"), COMPILED)
def test_normalization_compiles_to_few_instructions(
    architecture: int, types: tuple[torch.dtype, ...]
) -> None:
    for layout, dtype in product(LAYOUTS, types):
        x = meta_maps(2, 96, 55, 55, dtype=dtype, layout=layout)
        with compile_launches(architecture) as kernels:
            gpu.normalize(x, None, 2, True)
            gpu.normalize(x, x, 2, True)
        assert [kernel.name for kernel in kernels] == ["norm_forward", "norm_backward"]
        for kernel, most in zip(kernels, MOST_NORM[dtype], strict=True):
            check_resources(kernel)
            assert kernel.count_instructions(x.numel()) < most, (kernel, layout)


@without_triton
@pytest.mark.parametrize(("architecture", "types"), COMPILED)
@pytest.mark.parametrize("norm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pooling_compiles_to_few_instructions(
    norm: bool, architecture: int, types: tuple[torch.dtype, ...]
) -> None:
    for dtype in types:
        x = meta_maps(2, 96, 55, 55, dtype=dtype, layout=torch.channels_last)
        with compile_launches(architecture) as kernels:
            y, origin = gpu.pool(x, 2, True, norm, 3, 2, True)
            gpu.pool_gradient(x, y, origin, x.shape[2:], 2, True, norm, 3, 2)
        assert [kernel.name for kernel in kernels] == ["pool_forward", "pool_backward"]
        for kernel, most in zip(kernels, MOST_POOL[norm], strict=True):
            check_resources(kernel)
            if dtype.itemsize == 2:
                assert kernel.count_instructions(x.numel()) < most, kernel


@without_triton
def test_offsets_have_64_bits_only_beyond_two_billion_numbers() -> None:
    found = []
    for images in (64, 8192):
        x = meta_maps(images, 96, 55, 55, dtype=torch.bfloat16, layout=torch.channels_last)
        with compile_launches(90) as kernels:
            gpu.normalize(x, None, 2, True)
        found += [(kernel.constants["LONG"], kernel.count_instructions(x.numel()))
                  for kernel in kernels]  # fmt: skip
    (is_long, few), (is_longer, more) = found
    assert (is_long, is_longer) == (False, True)
    assert few < more < 1.5 * few


@without_triton
def test_constants_of_float64_are_not_rounded_to_float32() -> None:
    x = meta_maps(2, 4, 3, 3, dtype=torch.float64, layout=torch.channels_last)
    with compile_launches(90) as kernels:
        gpu.normalize(x, x, 2, True)
    exact = struct.pack(">d", LRN_ALPHA / LRN_SIZE).hex().upper()
    assert f"0d{exact}" in kernels[0].ptx


def compare(x: Tensor, own: Norm, other: Norm, wide: torch.dtype) -> None:
    """Compare values and gradients of a form in x's dtype with those of another one in `wide`."""
    leaf, leaf2 = x.clone().requires_grad_(), x.to(wide).requires_grad_()
    y, expected = own(leaf), other(leaf2)
    above = maps(*y.shape, dtype=x.dtype, seed=2)
    y.backward(above)
    expected.backward(above.to(wide))
    assert leaf.grad is not None
    assert leaf2.grad is not None
    assert y.dtype == x.dtype
    if x.is_contiguous(memory_format=torch.channels_last):
        assert y.is_contiguous(memory_format=torch.channels_last)
    bound = BOUNDS[x.dtype]
    torch.testing.assert_close(y.to(wide), expected, rtol=2 * bound, atol=bound)
    torch.testing.assert_close(leaf.grad.to(wide), leaf2.grad, rtol=4 * bound, atol=200 * bound)


@pytest.mark.parametrize("dtype", GPU_DTYPES)
def test_normalization_is_the_formula(dtype: torch.dtype) -> None:
    # 24 maps in a column: a lane has 8, 4 or 2; 7 maps: it has one.
    with interpret_kernels() as launched:
        for layout, (count, columns, relu) in product(LAYOUTS, ((48, 2, True), (7, 1, False))):
            compare(
                maps(2, count, 3, 5, dtype=dtype).contiguous(memory_format=layout),
                partial(local_response_norm, columns=columns, relu=relu),
                partial(formula, columns=columns, relu=relu),
                torch.float64,
            )
    assert launched == ["norm_forward", "norm_backward"] * 4


def formula(x: Tensor, columns: int, relu: bool) -> Tensor:
    return by_hand(x.relu() if relu else x, columns)


@pytest.mark.parametrize(
    ("dtype", "shape", "settings"),
    [
        (torch.bfloat16, (2, 24, 8, 6), (2, True, True, 3, 2)),  # windows that stick out
        (torch.float64, (2, 24, 8, 6), (2, True, True, 3, 2)),
        (torch.float64, (1, 8, 7, 7), (1, False, True, 3, 2)),  # an odd number of rows of windows
        (torch.float64, (2, 8, 8, 6), (2, True, False, 3, 2)),
        (torch.float64, (1, 3, 5, 4), (1, False, False, 2, 2)),
        (torch.float64, (1, 6, 9, 7), (1, True, True, 4, 3)),
        (torch.float64, (1, 2, 3, 3), (2, True, True, 3, 1)),  # nine windows over a pixel
    ],
)
def test_pooling_is_that_of_a_cpu(
    dtype: torch.dtype, shape: tuple[int, ...], settings: tuple[Any, ...]
) -> None:
    x = maps(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with interpret_kernels() as launched:
        if native.describe().startswith("kernels"):
            compare(x, lambda x: norm_pool(x, *settings),
                    lambda x: NormKernel.apply(x, native.pool, *settings), dtype)  # fmt: skip
        columns, relu, norm, window, stride = settings
        wide = x.double()
        expected = formula(wide, columns, relu) if norm else wide.relu() if relu else wide
        expected = F.max_pool2d(expected, window, stride, ceil_mode=True)
        bound = BOUNDS[dtype]
        torch.testing.assert_close(
            norm_pool(x, *settings).double(), expected, rtol=bound, atol=bound
        )
    assert launched[-1] == "pool_forward"


def test_the_first_of_equals_gets_the_gradient_and_none_what_relu_cut() -> None:
    x = torch.ones(1, 4, 5, 5)
    x[:, 1] = -1.0
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with interpret_kernels():
        y = norm_pool(x, relu=True, norm=False)
        assert y.grad_fn is not None
        saved = [kept for kept in y.grad_fn.saved_tensors if kept is not None]  # type: ignore[attr-defined]
        assert [(kept.dtype, kept.numel()) for kept in saved] == [(torch.uint8, y.numel())]
        y.sum().backward()
    expected = torch.zeros(4, 5, 5)
    expected[:, ::2, ::2][:, :2, :2] = 1.0
    expected[1] = 0.0
    assert x.grad is not None
    assert torch.equal(x.grad[0], expected)


def test_what_is_no_number_comes_through_and_nothing_stays_nothing() -> None:
    x = torch.full((1, 6, 3, 3), torch.nan).contiguous(memory_format=torch.channels_last)
    with interpret_kernels():
        for form in (local_response_norm, norm_pool):
            assert form(x, relu=True).isnan().all()
            assert len(form(x[:0], relu=True)) == 0


def test_offsets_of_64_bits_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = maps(1, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    found = []
    for numbers in (gpu.LONG_NUMBERS, 1):
        monkeypatch.setattr(gpu, "LONG_NUMBERS", numbers)
        leaf = x.clone().requires_grad_()
        with interpret_kernels():
            y, z = local_response_norm(leaf, relu=True), norm_pool(leaf, relu=True)
            (y.sum() + z.sum()).backward()
        found.append((y, z, leaf.grad))
    assert all(torch.equal(short, long) for short, long in zip(*found, strict=True))


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The forms that were called, with a GPU that is claimed; whether kernels run is tried anew."""
    calls: list[str] = []

    def record(name: str, result: Callable[..., object]) -> Callable[..., object]:
        return lambda x, *settings: (calls.append(name), result(x))[1]

    monkeypatch.setattr(reference, "normalize", record("torch", lambda x: x))
    monkeypatch.setattr(gpu, "normalize", record("normalize", lambda x: x))
    monkeypatch.setattr(gpu, "pool", record("pool", lambda x: (x.new_empty(2, 8, 2, 2), x)))
    gpu_support.explain_no_kernels.cache_clear()
    yield calls
    gpu_support.explain_no_kernels.cache_clear()


def normalize_claimed() -> None:
    """Normalize and pool a tensor without storage that says that it is on a GPU."""
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 5, 5, 8, device="cuda").permute(0, 3, 1, 2)
        for _ in range(2):
            assert local_response_norm(x, 2, relu=True).shape == x.shape
            assert norm_pool(x, 2, relu=True).shape == (2, 8, 2, 2)


def test_torch_takes_over_where_kernels_do_not_run(
    chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def find_no_compiler() -> None:
        tries.append(1)
        raise RuntimeError("Traceback\nFailed to find C compiler. Please specify via CC")

    monkeypatch.setattr(gpu_support, "_launch_trial", find_no_compiler)
    with pytest.warns(UserWarning, match="torch operations replace") as seen:
        normalize_claimed()
    assert chosen == ["torch"] * 4
    assert (len(seen), len(tries)) == (1, 1)
    reason = "RuntimeError: Failed to find C compiler. Please specify via CC"
    expected = f"torch operations, as Triton's kernels do not run here: {reason}"
    assert describe_backend("cuda") == expected


def test_kernels_that_run_are_launched(
    chosen: list[str], monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(gpu_support, "_launch_trial", lambda: None)
    normalize_claimed()
    assert chosen == ["normalize", "pool"] * 2
    assert describe_backend("cuda") == "Triton kernels"
    assert not recwarn.list


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
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("relu", [False, True])
def test_a_gpu_pools(relu: bool, norm: bool) -> None:
    x = maps(3, 96, 12, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    own = x.detach().cuda().requires_grad_()
    y, expected = norm_pool(own, 2, relu, norm), norm_pool(x, 2, relu, norm)
    above = maps(*y.shape, seed=2)
    y.backward(above.cuda())
    expected.backward(above)
    assert own.grad is not None
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.grad.cpu(), x.grad, rtol=1e-11, atol=1e-11)


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
