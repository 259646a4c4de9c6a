"""Dropout: its masks, and what it multiplies by."""

from __future__ import annotations

import pytest
import torch

from model.layers import derive_seed, draw_dropout_mask, dropout

CPU = torch.device("cpu")
KEY = derive_seed("a key")


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
    mask = draw_dropout_mask(position, 7, 150, CPU, key)
    assert mask.tolist() == [
        [by_hand(position + row, unit, key) for unit in range(150)] for row in range(7)
    ]


def test_a_sample_has_its_mask_in_any_batch() -> None:
    whole = draw_dropout_mask(1000, 16, 48, CPU, KEY)
    for cut in (1, 5, 8):
        parts = [draw_dropout_mask(1000 + row, min(cut, 16 - row), 48, CPU, KEY) for row in
                 range(0, 16, cut)]  # fmt: skip
        assert torch.equal(torch.cat(parts), whole)


def test_masks_are_half_ones_and_no_two_have_to_do_with_each_other() -> None:
    mask = draw_dropout_mask(0, 512, 2048, CPU, KEY).double()
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    bound = 5  # standard deviations
    assert (mask.mean() - 0.5).abs() < bound * 0.5 / mask.numel() ** 0.5
    for dim, count in ((0, 512), (1, 2048)):
        assert ((mask.mean(dim) - 0.5).abs() < bound * 0.5 / count**0.5).all()
    signs = 2 * mask - 1
    neighbours = [(signs[1:] * signs[:-1]), (signs[:, 1:] * signs[:, :-1])]
    neighbours += [signs[:, 64:] * signs[:, :-64], signs[64:] * signs[:-64]]
    other = draw_dropout_mask(0, 512, 2048, CPU, derive_seed("another"))
    neighbours.append(signs * (2.0 * other - 1))
    for products in neighbours:
        assert products.mean().abs() < bound / products.numel() ** 0.5


def test_masks_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(99)
    before = torch.get_rng_state()
    draw_dropout_mask(3, 128, 1024, CPU, KEY)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
def test_a_gpu_draws_the_same() -> None:
    on_gpu = draw_dropout_mask(2**40, 128, 2048, torch.device("cuda"), KEY)
    assert torch.equal(on_gpu.cpu(), draw_dropout_mask(2**40, 128, 2048, CPU, KEY))


def test_dropout_is_not_inverted() -> None:
    x = torch.tensor([[2.0, 4.0, 6.0]])
    assert dropout(x, torch.tensor([[1, 0, 1]], dtype=torch.uint8)).tolist() == [[2.0, 0.0, 6.0]]
    assert dropout(x, None).tolist() == [[1.0, 2.0, 3.0]]
