"""Dropout: its masks, and what it multiplies by. The normalisations: see test_model_lrn.py."""

from __future__ import annotations

import torch

from model.layers import dropout, dropout_mask


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
