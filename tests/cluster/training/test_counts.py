"""Errors counted over the ranks of a job are those that one process counts, to the last image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from model.metrics import count_errors, sum_metrics
from pipeline.batches import Stream
from tests.helpers.images import flip_bit

IMAGES = 20


def score_images(images: Tensor) -> Tensor:
    """A network whose answers, [b, 8], are level in pairs, in fours and in sixes."""
    coarse = adaptive_avg_pool2d(images, (1, 2))[:, :2].flatten(1)
    return (coarse / 60).round().repeat_interleave(2, dim=1)


def count_over_ranks(data, world: int, batch_size: int) -> Tensor:
    """Loss, top-1 and top-5 errors and images, summed over batches and ranks."""
    total = torch.zeros(4, dtype=torch.float64)
    for rank in range(world):
        with Stream(
            data, split="val", crop="center", once=True,
            batch_size=batch_size, rank=rank, world_size=world,
        ) as stream:  # fmt: skip
            for batch in stream:
                total += sum_metrics(
                    score_images(batch.images).softmax(1), batch.labels, batch.weights
                )
    return total


@pytest.mark.parametrize("damaged", [(), (0,), (7, 19)])
def test_counts_do_not_depend_on_the_number_of_ranks(data, damaged):
    flip_bit(data, "val", *damaged)
    one = count_over_ranks(data, world=1, batch_size=IMAGES)
    assert one[3] == IMAGES - len(damaged)
    assert 0 < one[2] < one[1] < one[3]
    for world, batch_size in [(1, 9), (2, 8), (2, 6), (3, 7), (3, 64)]:
        assert IMAGES % batch_size  # the last batch is padded
        found = count_over_ranks(data, world, batch_size)
        assert found[1:].tolist() == one[1:].tolist()
        torch.testing.assert_close(found[0], one[0], rtol=1e-6, atol=0)


def test_that_network_is_level_where_it_matters(tiny_data):
    with Stream(tiny_data, split="val", crop="center", once=True, batch_size=IMAGES) as stream:
        batch = next(stream)
    answers = score_images(batch.images).softmax(1)
    shares = [
        [
            float(count_errors(answers[[k]], batch.labels[[k]], torch.ones(1))[which])
            for k in range(20)
        ]
        for which in (0, 1)
    ]
    assert len(set(shares[0])) > 3
    assert any(share * 12 == pytest.approx(10) for share in shares[0])  # lots among six
    assert sum(0 < share < 1 for share in shares[1]) > 0
