"""Local response normalisation against a plain loop and torch's own; dropout masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.layers import dropout, dropout_mask, local_response_norm

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def maps(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Activations as large as real ones, so that the sum matters beside k = 2."""
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * 200).to(dtype)


def by_hand(x: Tensor) -> Tensor:
    """Section 3.3 of the paper with alpha/n, one map after the other."""
    b, c, h, w = x.shape
    y = torch.zeros_like(x)
    for i in range(c):
        total = torch.zeros(b, h, w, dtype=x.dtype)
        for j in range(max(0, i - 2), min(c - 1, i + 2) + 1):
            total += x[:, j] * x[:, j]
        y[:, i] = x[:, i] / (2.0 + 1e-4 / 5 * total) ** 0.75
    return y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 6, 5, 4), (3, 1, 3, 3), (2, 2, 1, 1), (9, 48, 55, 55)])
def test_norm_is_the_formula(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    x = maps(*shape).contiguous(memory_format=layout)
    y = local_response_norm(x)
    torch.testing.assert_close(y, by_hand(x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_and_its_gradient_equal_torchs(layout: torch.memory_format) -> None:
    x = maps(5, 12, 9, 9).contiguous(memory_format=layout).requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    above = maps(5, 12, 9, 9)
    local_response_norm(x).backward(above)
    reference = torch.nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)
    reference(theirs).backward(above)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_passes_gradcheck(columns: int, layout: torch.memory_format) -> None:
    x = maps(3, 6, 2, 3).contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, columns), (x,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_window_stays_inside_its_column(layout: torch.memory_format) -> None:
    x = maps(4, 8, 5, 5).contiguous(memory_format=layout)
    apart = torch.cat([by_hand(half) for half in x.chunk(2, 1)], 1)
    torch.testing.assert_close(local_response_norm(x, columns=2), apart, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(local_response_norm(x, columns=1), apart, rtol=1e-6)


def test_norm_takes_any_strides() -> None:
    x = maps(4, 12, 8, 8)[:, ::2, 1:, 1:]
    above = maps(4, 6, 7, 7).transpose(2, 3)
    own, copy = x.clone().requires_grad_(), x.contiguous().requires_grad_()
    local_response_norm(own[:, :, :, :]).backward(above)
    local_response_norm(copy).backward(above.contiguous())
    torch.testing.assert_close(local_response_norm(x), by_hand(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(own.grad, copy.grad, rtol=0, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_normalised_in_float32(layout: torch.memory_format) -> None:
    # Sums that bfloat16 cannot tell from nothing beside k = 2: its steps there are 1/64 = .016.
    x = torch.full((2, 8, 3, 3), 8.0, dtype=torch.bfloat16).contiguous(memory_format=layout)
    assert bool((torch.tensor(2.0, dtype=torch.bfloat16) + 5 * 64 * 2e-5 == 2.0).all())
    large = maps(2, 8, 3, 3, dtype=torch.bfloat16)
    for values in (x, large):
        values = values.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = local_response_norm(values)
        assert y.dtype == torch.bfloat16
        expected = by_hand(values.detach().double())
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)  # one rounding
        wide = values.detach().double().requires_grad_()
        by_hand(wide).sum().backward()
        y.sum().backward()
        assert values.grad is not None
        assert wide.grad is not None
        torch.testing.assert_close(values.grad.double(), wide.grad, rtol=2**-7, atol=2**-9)


def test_masks_are_half_ones_and_repeat() -> None:
    cpu = torch.device("cpu")
    mask = dropout_mask(64, 512, cpu, (0, 3, 0, 1, "fc6"))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert abs(mask.mean().item() - 0.5) < 0.01  # 3.6 standard deviations
    torch.testing.assert_close(mask, dropout_mask(64, 512, cpu, (0, 3, 0, 1, "fc6")))
    for other in [(1, 3, 0, 1, "fc6"), (0, 4, 0, 1, "fc6"), (0, 3, 1, 1, "fc6"),
                  (0, 3, 0, 0, "fc6"), (0, 3, 0, 1, "fc7")]:  # fmt: skip
        agreement = (mask == dropout_mask(64, 512, cpu, other)).float().mean().item()
        assert abs(agreement - 0.5) < 0.02


def test_masks_do_not_depend_on_threads_or_the_global_generator() -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    expected = dropout_mask(128, 1024, cpu, ("key",))
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        torch.manual_seed(99)
        before = torch.get_rng_state()
        torch.testing.assert_close(dropout_mask(128, 1024, cpu, ("key",)), expected)
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)


def test_dropout_is_not_inverted() -> None:
    x = torch.tensor([[2.0, 4.0, 6.0]])
    assert dropout(x, torch.tensor([[1.0, 0.0, 1.0]])).tolist() == [[2.0, 0.0, 6.0]]
    assert dropout(x, None).tolist() == [[1.0, 2.0, 3.0]]
