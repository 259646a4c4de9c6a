"""Local response normalisation against a plain loop and torch's own, each form that runs here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.norm import Response, local_response_norm, native, norm_pool, reference
from tests.helpers.lrn import (
    LAYOUTS,
    by_hand,
    check_float32,
    check_strides,
    each_form,  # noqa: F401 - a fixture
    maps,
)

TORCHS = torch.nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 6, 5, 4), (3, 1, 3, 3), (2, 2, 1, 1), (2, 48, 55, 55)])
def test_it_is_the_formula(shape: tuple[int, ...], layout: torch.memory_format, relu: bool) -> None:
    x = maps(*shape).contiguous(memory_format=layout)
    before = x.clone()
    y = local_response_norm(x, relu=relu)
    torch.testing.assert_close(y, by_hand(x.relu() if relu else x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=layout)
    assert torch.equal(x, before)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_and_its_gradient_equal_torchs(layout: torch.memory_format, relu: bool) -> None:
    # 130 maps of 11 x 9: more than one block of the kernels, and no whole number of vectors.
    x = maps(3, 130, 11, 9).contiguous(memory_format=layout).requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    above = maps(3, 130, 11, 9, seed=2)
    y = local_response_norm(x, relu=relu)
    expected = TORCHS(F.relu(theirs) if relu else theirs)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.backward(above)
    expected.backward(above)
    torch.testing.assert_close(x.grad, theirs.grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_passes_gradcheck(columns: int, layout: torch.memory_format, relu: bool) -> None:
    x = maps(2, 6, 1, 2).contiguous(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, columns, relu), (x,))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_window_stays_inside_its_column(layout: torch.memory_format) -> None:
    x = maps(4, 8, 5, 5).contiguous(memory_format=layout).requires_grad_()
    above, copy = maps(4, 8, 5, 5, seed=2), x.detach().clone().requires_grad_()
    y, apart = local_response_norm(x, columns=2), by_hand(copy, columns=2)
    torch.testing.assert_close(y, apart, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(local_response_norm(x, columns=1), apart, rtol=1e-6)
    y.backward(above)
    apart.backward(above)
    torch.testing.assert_close(x.grad, copy.grad, rtol=1e-11, atol=1e-11)


def test_it_takes_any_strides() -> None:
    check_strides(local_response_norm, by_hand)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_is_within_a_few_roundings(layout: torch.memory_format) -> None:
    check_float32(local_response_norm, by_hand, maps(64, 48, 5, 5), layout, (4, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_normalised_in_float32(layout: torch.memory_format) -> None:
    # Sums that bfloat16 cannot tell from nothing beside k = 2: its steps there are 1/64 = .016.
    x = torch.full((2, 8, 3, 3), 8.0, dtype=torch.bfloat16).contiguous(memory_format=layout)
    assert bool((torch.tensor(2.0, dtype=torch.bfloat16) + 5 * 64 * 2e-5 == 2.0).all())
    large = maps(2, 8, 3, 3, dtype=torch.bfloat16).contiguous(memory_format=layout)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_what_is_no_number_stays_visible(dtype: torch.dtype, form: str) -> None:
    x = maps(1, 8, 2, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    x[0, 3, 1, 1] = float("nan")
    for relu in (False, True):
        y = local_response_norm(x, relu=relu)
        assert y[0, 3, 1, 1].isnan()
        assert y[0, :, 0].isfinite().all()
        if form == "native":  # a product with a band matrix spreads it over the column
            assert y[0, 6:, 1, 1].isfinite().all()


def test_half_precision_works_too() -> None:
    x = maps(2, 6, 3, 3).half()
    y = local_response_norm(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), by_hand(x.double()), rtol=2**-10, atol=0)


def test_only_the_input_is_kept() -> None:
    x = maps(2, 6, 3, 3).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        local_response_norm(x, relu=True)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x is \[2, 7, 3, 3\].*2 columns"):
        local_response_norm(maps(2, 7, 3, 3), columns=2)
    with pytest.raises(ValueError, match="x is"):
        local_response_norm(maps(2, 6, 3))


def test_the_form_for_compilers_is_the_same(form: str) -> None:
    if form == "native":  # once is enough
        x = maps(3, 12, 5, 5).requires_grad_()
        y, expected = reference.traceable_norm(x, 2, True), by_hand(x.relu(), 2)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert reference.traceable_norm(x.bfloat16(), 2, True).dtype == torch.bfloat16


CONSTANTS = {
    "k and alpha": Response(k=1.0, alpha=5e-4),
    "cuda-convnet2's for CIFAR-10": Response(9, 1.0, 1e-3),
    "beta": Response(k=0.5, beta=0.5),
    "one map": Response(1, 1.0, 0.1, 1.0),
    "more maps than there are": Response(31, 3.0, 0.1),
}


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("response", CONSTANTS.values(), ids=CONSTANTS)
def test_with_other_constants_it_and_its_gradient_equal_torchs(
    response: Response, layout: torch.memory_format, relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def theirs(x: torch.Tensor) -> torch.Tensor:
        x = (x.relu() if relu else x).unflatten(1, (2, -1)).flatten(0, 1)
        size, k, alpha, beta = response.size, response.k, response.alpha, response.beta
        return F.local_response_norm(x, size, alpha, beta, k).unflatten(0, (-1, 2)).flatten(1, 2)

    def pool(x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(theirs(x), 3, 2, ceil_mode=True)

    x = maps(3, 26, 6, 5).contiguous(memory_format=layout)
    for norm, formula in (
        (lambda x: local_response_norm(x, 2, relu, response), theirs),
        (lambda x: norm_pool(x, 2, relu, response=response), pool),
    ):
        own, copy = (x.clone().requires_grad_() for _ in range(2))
        y, expected = norm(own), formula(copy)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        above = maps(*y.shape, seed=2)
        y.backward(above)
        expected.backward(above)
        torch.testing.assert_close(own.grad, copy.grad, rtol=1e-11, atol=1e-11)
    traced = reference.traceable_norm(x, 2, relu, response)
    torch.testing.assert_close(traced, theirs(x), rtol=1e-12, atol=1e-12)


def test_the_kernels_take_any_k_and_alpha_but_no_other_window_or_exponent(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    for name in ("normalize", "pool"):
        kernel = getattr(native, name)
        monkeypatch.setattr(
            native, name, lambda *a, name=name, kernel=kernel: called.append(name) or kernel(*a)
        )
    x = maps(1, 6, 4, 4).contiguous(memory_format=torch.channels_last)
    for response in CONSTANTS.values():
        local_response_norm(x, response=response)
        norm_pool(x, response=response)
    assert called == (["normalize", "pool"] if form == "native" else [])
