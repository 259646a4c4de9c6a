"""Dropout: its masks, and what it multiplies by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.gpu_support import GPU_DTYPES
from model.layers import Dropout, derive_seed, draw_dropout_mask, launch_dropout
from tests.helpers.gpu_compiler import ARCHITECTURES, compile_launches
from tests.helpers.gpu_interpreter import interpret_kernels

KEY = derive_seed("a key")


def keys(*numbers: int) -> Tensor:
    return Dropout(numbers or (KEY,)).keys


def by_hand(position: int, unit: int, key: int) -> int:
    """SplitMix64 in Python's own integers, as Steele, Lea and Flood have it."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    state = mix((position + key) % 2**64)
    word = mix((state + (unit // 64 + 1) * 0x9E3779B97F4A7C15) % 2**64)
    return word >> unit % 64 & 1


@pytest.mark.parametrize("position", [0, 5, 2**31 - 3, 14_000_000 * 90, 2**62])
@pytest.mark.parametrize("key", [0, KEY, 2**64 - 1])
def test_bits_are_those_of_splitmix(position: int, key: int) -> None:
    drawn = [by_hand(position + row, unit, k) for row in range(7) for k in (key, 3)
             for unit in range(150)]  # fmt: skip
    for given in (position, torch.tensor(position)):
        mask = draw_dropout_mask(given, 7, 150, keys(key, 3))
        assert mask.dtype == torch.uint8
        assert mask.shape == (7, 300)
        assert mask.flatten().tolist() == drawn


def test_a_sample_has_its_mask_in_any_batch() -> None:
    whole = draw_dropout_mask(1000, 16, 48, keys())
    for cut in (1, 5, 8):
        parts = [draw_dropout_mask(1000 + row, min(cut, 16 - row), 48, keys())
                 for row in range(0, 16, cut)]  # fmt: skip
        assert torch.equal(torch.cat(parts), whole)


def test_masks_are_half_ones_and_no_two_have_to_do_with_each_other() -> None:
    mask = draw_dropout_mask(0, 512, 2048, keys()).double()
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    bound = 5  # standard deviations
    assert (mask.mean() - 0.5).abs() < bound * 0.5 / mask.numel() ** 0.5
    for dim, count in ((0, 512), (1, 2048)):
        assert ((mask.mean(dim) - 0.5).abs() < bound * 0.5 / count**0.5).all()
    signs = 2 * mask - 1
    neighbours = [(signs[1:] * signs[:-1]), (signs[:, 1:] * signs[:, :-1])]
    neighbours += [signs[:, 64:] * signs[:, :-64], signs[64:] * signs[:-64]]
    other = draw_dropout_mask(0, 512, 2048, keys(derive_seed("another")))
    neighbours.append(signs * (2.0 * other - 1))
    for products in neighbours:
        assert products.mean().abs() < bound / products.numel() ** 0.5


def test_masks_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    draw_dropout_mask(3, 128, 1024, keys())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_a_gpu_draws_the_same() -> None:
    on_gpu = draw_dropout_mask(2**40, 128, 2048, keys().cuda())
    mask = draw_dropout_mask(2**40, 128, 2048, keys())
    assert torch.equal(on_gpu.cpu(), mask)
    for dtype in GPU_DTYPES:
        x = torch.randn(128, 2048).to(dtype)
        y = launch_dropout(x.cuda(), torch.tensor(2**40).cuda(), keys().cuda())
        assert torch.equal(y.cpu(), x * mask)


@pytest.mark.parametrize("units", [1, 64, 150])
@pytest.mark.parametrize("position", [0, 2**31 - 3, 14_000_000 * 90, 2**62, 2**63 - 4])
def test_the_kernel_multiplies_by_the_same_bits(position: int, units: int) -> None:
    """Zeros have the sign that they have on a CPU, and NaN stays."""
    generator = torch.Generator().manual_seed(units)
    with interpret_kernels() as launched:
        for numbers, dtype in (((2**64 - 1,), torch.bfloat16), ((0, KEY), torch.float64)):
            x = torch.randn(40, units * len(numbers), generator=generator).to(dtype)
            y = launch_dropout(x, torch.tensor(position), keys(*numbers))
            expected = x * draw_dropout_mask(position, 40, units, keys(*numbers))
            assert torch.equal(y.view(torch.uint8), expected.view(torch.uint8))
        assert launched == ["dropout", "dropout"]
        nothing = torch.full((2, 70), torch.nan)
        assert launch_dropout(nothing, torch.tensor(position), keys()).isnan().all()


def test_the_kernel_masks_the_gradient_again_and_stores_no_mask() -> None:
    x, position, layer = torch.ones(5, 140, requires_grad=True), torch.tensor(9), Dropout([KEY, 3])
    with interpret_kernels():
        y = layer(x, position)
        assert y.grad_fn is not None
        assert [saved.shape for saved in y.grad_fn.saved_tensors] == [(), (2,)]  # type: ignore[attr-defined]
        (y * torch.arange(140.0)).sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, y * torch.arange(140.0))
        assert layer(x[:0], position).shape == (0, 140)
        late = layer(x, position).sum()
        position.fill_(10)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(number, marks=[pytest.mark.slow] * (number != 90)) for number in ARCHITECTURES],
)
def test_the_kernel_compiles_for_a_gpu(architecture: int) -> None:
    position, numbers = torch.zeros((), dtype=torch.int64), keys(KEY, 3)
    position, numbers = position.to("meta"), numbers.to("meta")
    pytest.importorskip("triton")
    with compile_launches(architecture) as compiled:
        for dtype, most in ((torch.bfloat16, 16), (torch.float32, 22)):
            x = torch.empty(128, 2 * 2048, dtype=dtype, device="meta")
            launch_dropout(x, position, numbers)
            # To draw a word takes some 60 instructions: it must serve several units.
            assert compiled[-1].count_instructions(x.numel()) < most
        launch_dropout(torch.empty(7, 2 * 150, device="meta"), position, numbers)
    assert [kernel.spills for kernel in compiled] == [0] * 3
    assert max(kernel.registers for kernel in compiled) <= 64


def test_dropout_is_not_inverted() -> None:
    x, layer = torch.arange(1.0, 301.0).expand(2, 300), Dropout([KEY, 3])
    mask = draw_dropout_mask(9, 2, 150, layer.keys)
    assert torch.equal(layer(x, torch.tensor(9)), x * mask)
    assert torch.equal(layer.eval()(x, torch.tensor(9)), x / 2)
    assert not layer.state_dict()
