"""Activations for the tests of the normalizations, the formula as a plain loop, and checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.norm import native

LAYOUTS = [torch.contiguous_format, torch.channels_last]
Norm = Callable[[Tensor], Tensor]


def maps(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Activations as large as real ones, so that the sum matters beside k = 2."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 200).to(dtype)


def by_hand(x: Tensor, columns: int = 1) -> Tensor:
    """Section 3.3 of the paper with alpha/n, one map after the other; autograd can follow."""
    found = []
    for own in x.chunk(columns, 1):
        for i in range(own.shape[1]):
            near = own[:, max(0, i - 2) : i + 3]
            found.append(own[:, i] / (2.0 + 1e-4 / 5 * near.square().sum(1)) ** 0.75)
    return torch.stack(found, 1)


def check_strides(norm: Norm, formula: Norm) -> None:
    """Check values and gradients where input and gradient are contiguous in no memory format."""
    leaf = maps(4, 12, 8, 8).requires_grad_()
    x = leaf[:, ::2, 1:, 1:]
    dy = maps(4, 6, 7, 7).transpose(2, 3)
    copy = x.detach().contiguous().requires_grad_()
    y = norm(x)
    torch.testing.assert_close(y, formula(x), rtol=1e-12, atol=1e-12)
    y.backward(dy)
    norm(copy).backward(dy.contiguous())
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad[:, ::2, 1:, 1:], copy.grad, rtol=0, atol=0)
    assert norm(x[:0]).shape == (0, 6, 7, 7)


def check_float32(
    norm: Norm, formula: Norm, x: Tensor, layout: torch.memory_format, bounds: tuple[int, int]
) -> None:
    """Bound the errors of float32 in units of its rounding: of values, and of gradients.

    Args:
        norm: the normalization.
        formula: the same in float64.
        x: float64 [64, maps, h, w]; scaled so that sums go from vanishing beside k to dwarfing it.
        layout: memory format of the input.
        bounds: the largest errors of values and of gradients.
    """
    scales = torch.logspace(-3, 6, 64, dtype=torch.float64)[:, None, None, None]
    own = (x * scales).float().contiguous(memory_format=layout).requires_grad_()
    wide = own.detach().double().requires_grad_()
    y, expected = norm(own), formula(wide)
    torch.testing.assert_close(y.double(), expected, rtol=bounds[0] * 2**-23, atol=0)
    dy = maps(*x.shape, seed=2).float().contiguous(memory_format=layout)
    y.backward(dy)
    expected.backward(dy.double())
    # The gradient is a difference: bound by its larger part, not by itself.
    assert own.grad is not None
    assert wide.grad is not None
    largest = (dy.double() * expected / wide).abs().detach().amax((1, 2, 3), keepdim=True)
    assert float(((own.grad.double() - wide.grad).abs() / largest).max()) < bounds[1] * 2**-23


@pytest.fixture(name="form", params=["native", "reference"], autouse=True)
def each_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compiled kernels, or torch's operations."""
    if request.param == "reference":
        monkeypatch.setattr(native, "prepare_kernels", lambda x: False)
    elif not native.prepare_kernels(torch.empty(0)):
        pytest.skip(native.describe())
    return str(request.param)
