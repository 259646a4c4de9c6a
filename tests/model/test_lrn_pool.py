"""ReLU, normalisation and max pooling in one pass, against the three of torch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.norm import local_response_norm, native, norm_pool
from tests.helpers.lrn import LAYOUTS, by_hand, maps


@pytest.fixture(params=["native", "reference"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels, or torch's operations."""
    if request.param == "reference":
        monkeypatch.setattr(native, "prepare_kernels", lambda x: False)
    elif not native.prepare_kernels(torch.empty(0)):
        pytest.skip(native.describe())


def pool_by_hand(x: Tensor, columns: int, relu: bool, norm: bool, window: int) -> Tensor:
    x = F.relu(x) if relu else x
    x = by_hand(x, columns) if norm else x
    return F.max_pool2d(x, window, 2, ceil_mode=True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "columns", "window"),
    [
        ((3, 12, 11, 9), 1, 3),
        ((2, 96, 7, 13), 2, 3),
        ((2, 40, 8, 10), 2, 3),  # windows that stick out
        ((2, 12, 9, 7), 2, 2),
        ((1, 260, 4, 4), 1, 4),
        ((2, 5, 3, 3), 1, 3),  # one window
    ],
)
def test_values_and_gradients_are_those_of_the_three(
    shape: tuple[int, ...], columns: int, window: int, relu: bool, norm: bool
) -> None:
    for layout in LAYOUTS:
        x = maps(*shape).contiguous(memory_format=layout).requires_grad_()
        theirs = x.detach().clone().requires_grad_()
        y = norm_pool(x, columns, relu, norm, window)
        expected = pool_by_hand(theirs, columns, relu, norm, window)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert y.is_contiguous(memory_format=layout)
        above = maps(*y.shape, seed=2)
        y.backward(above)
        expected.backward(above)
        torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-11, atol=1e-11)


def test_it_passes_gradcheck() -> None:
    x = maps(2, 6, 5, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: norm_pool(x, 2, relu=True), (x,))


def test_the_first_of_equals_gets_the_gradient() -> None:
    x = torch.ones(1, 4, 5, 5, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    norm_pool(x, norm=False).sum().backward()
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[::2, ::2][:2, :2] = 1.0
    torch.testing.assert_close(x.grad, expected.expand(1, 4, 5, 5))


def test_bfloat16_is_compared_before_it_is_rounded(request: pytest.FixtureRequest) -> None:
    x = maps(8, 48, 27, 27, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x = x.requires_grad_()
    wide = x.detach().double().requires_grad_()
    y, expected = norm_pool(x, relu=True), pool_by_hand(wide, 1, True, True, 3)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)
    above = maps(*y.shape, seed=2).bfloat16()
    y.backward(above)
    expected.backward(above.double())
    assert x.grad is not None
    assert wide.grad is not None
    error = (x.grad.double() - wide.grad).norm() / wide.grad.norm()
    # One rounding of each; with torch's operations also windows whose largest two round to equals.
    assert float(error) < (2**-8 if "native" in request.node.name else 0.2)


def test_what_is_no_number_comes_through() -> None:
    x = maps(1, 4, 7, 7, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    x[0, 1, 3, 3] = float("nan")
    y = norm_pool(x, relu=True)
    assert y[0, 1, 1, 1].isnan()
    assert y[0, :, 2, 2].isfinite().all()


@pytest.mark.parametrize(("window", "stride"), [(2, 3), (6, 2), (0, 0)])
def test_windows_that_do_not_fit_are_refused(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match=f"window {window} with stride {stride} on maps of 5x5"):
        norm_pool(maps(1, 4, 5, 5), window=window, stride=stride)


def test_threads_do_not_change_a_bit(request: pytest.FixtureRequest) -> None:
    if "native" not in request.node.name:
        pytest.skip("chunks of torch's operations depend on the threads")
    threads = torch.get_num_threads()
    x = maps(5, 20, 9, 9, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    found = []
    for number in (1, 2, 3, 6):  # with more than there are images, columns are worked on apart
        torch.set_num_threads(number)
        try:
            for run in (partial(norm_pool, columns=2), partial(local_response_norm, columns=2)):
                leaf = x.clone().requires_grad_()
                y = run(leaf, relu=True)
                y.square().sum().backward()
                found.append((number, y.detach(), leaf.grad))
        finally:
            torch.set_num_threads(threads)
    for (_, y, gradient), (_, same, as_well) in zip(found, found[2:], strict=False):
        assert torch.equal(y, same)
        assert torch.equal(gradient, as_well)
