"""The spatial normalisation of the source against a plain loop, in each form that runs here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.norm import spatial_response_norm
from tests.helpers.lrn import (
    LAYOUTS,
    check_float32,
    check_strides,
    each_form,  # noqa: F401 - a fixture
    maps,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def loop(x: Tensor) -> Tensor:
    """Pixel after pixel: scale .001/25, window 5x5 cut off at the borders, k = 1."""
    rows = []
    for i in range(x.shape[2]):
        row = []
        for j in range(x.shape[3]):
            near = x[:, :, max(0, i - 2) : i + 3, max(0, j - 2) : j + 3]
            row.append(x[:, :, i, j] / (1 + 0.001 / 25 * near.square().sum((2, 3))) ** 0.75)
        rows.append(torch.stack(row, 2))
    return torch.stack(rows, 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 64, 27, 27),
        (2, 70, 9, 6),  # more maps than the kernels take at once, the last of them few
        (3, 33, 6, 9),
        (2, 5, 9, 7),
        (2, 3, 3, 2),  # smaller than the window, as are all below
        (1, 40, 1, 8),
        (2, 1, 4, 1),
        (1, 1, 1, 1),
    ],
)
def test_it_is_the_formula(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = maps(*shape).contiguous(memory_format=layout).requires_grad_()
    before, theirs = x.detach().clone(), x.detach().clone().requires_grad_()
    y, expected = spatial_response_norm(x), loop(theirs)
    torch.testing.assert_close(y, expected, **EXACT)
    assert y.is_contiguous(memory_format=layout)
    above = maps(*shape, seed=2)
    y.backward(above)
    expected.backward(above)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-11, atol=1e-11)
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_passes_gradcheck(layout: torch.memory_format) -> None:
    x = maps(2, 2, 7, 6).contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(spatial_response_norm, (x,))


def test_it_takes_any_strides() -> None:
    check_strides(spatial_response_norm, loop)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_is_within_a_few_roundings(layout: torch.memory_format) -> None:
    check_float32(spatial_response_norm, loop, maps(64, 24, 7, 7), layout, (6, 16))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_normalised_in_float32(layout: torch.memory_format) -> None:
    # The former have sums that bfloat16 hardly tells from nothing beside k = 1: steps of 1/128.
    for values in (maps(2, 40, 8, 8) * 0.01, maps(2, 40, 8, 8)):
        x = values.bfloat16().contiguous(memory_format=layout).requires_grad_()
        wide = x.detach().double().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = spatial_response_norm(x)
        assert y.dtype == torch.bfloat16
        expected = loop(wide)
        once = expected.bfloat16()  # the only rounding that shows
        assert float((y != once).double().mean()) < 0.002
        torch.testing.assert_close(y, once, rtol=2**-7, atol=0)
        y.sum().backward()
        expected.sum().backward()
        assert x.grad is not None
        assert wide.grad is not None
        torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_no_number_stays_visible_where_it_is(dtype: torch.dtype) -> None:
    x = maps(1, 40, 8, 8, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 7] = float("nan")
    reached = torch.zeros(1, 40, 8, 8, dtype=torch.bool)
    reached[0, 3, :4, 5:] = True
    assert torch.equal(spatial_response_norm(x).isnan(), reached)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    x = maps(5, 40, 9, 9, dtype=dtype).contiguous(memory_format=torch.channels_last)
    found = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        try:
            leaf = x.clone().requires_grad_()
            y = spatial_response_norm(leaf)
            y.square().sum().backward()
            assert leaf.grad is not None
            found.append((y.detach(), leaf.grad))
        finally:
            torch.set_num_threads(threads)
    for y, gradient in found[1:]:
        assert torch.equal(y, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_only_the_input_is_kept() -> None:
    x = maps(2, 6, 3, 3).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        spatial_response_norm(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 6, 3\]"):
        spatial_response_norm(maps(2, 6, 3))
