"""Dropout: its masks, and what it multiplies by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.layers import Dropout, derive_seed, draw_dropout_mask

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
    assert torch.equal(on_gpu.cpu(), draw_dropout_mask(2**40, 128, 2048, keys()))


def test_dropout_is_not_inverted() -> None:
    x, layer = torch.arange(1.0, 301.0).expand(2, 300), Dropout([KEY, 3])
    mask = draw_dropout_mask(9, 2, 150, layer.keys)
    assert torch.equal(layer(x, torch.tensor(9)), x * mask)
    assert torch.equal(layer.eval()(x, torch.tensor(9)), x / 2)
    assert not layer.state_dict()
