"""Views, averaged probabilities and error counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.metrics import average_views, count_errors, count_top1_errors, sum_metrics


def position_images(b: int = 2) -> Tensor:
    """Images whose pixels hold their place: channel 0 its row, 1 its column, 2 the image."""
    rows = torch.arange(256.0)[:, None].expand(256, 256)
    number = torch.arange(float(b))[:, None, None].expand(b, 256, 256)
    return torch.stack((rows.expand(b, 256, 256), rows.T.expand(b, 256, 256), number), dim=1)


class Corner(nn.Module):
    """Logits are the first pixel, scaled; half as large when not training."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0] / (10.0 if self.training else 20.0)


class Recorder(Corner):
    """Keeps each batch of views that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.views: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.views.append(x)
        return super().forward(x)


def ten_views(images: Tensor) -> Tensor:
    """[b, 10, 3, 224, 224], as the network sees them."""
    net = Recorder()
    average_views(net, images, views=10)
    return torch.stack(net.views, dim=1)


def test_ten_views_in_the_originals_order() -> None:
    views = ten_views(position_images())
    assert views.shape == (2, 10, 3, 224, 224)
    corners = [(int(v[0, 0, 0]), int(v[1, 0, 0])) for v in views[0]]
    assert corners[:5] == [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    # mirrored: the left edge shows what was the right edge
    assert corners[5:] == [(top, left + 223) for top, left in corners[:5]]
    assert views[1, :, 2].unique().tolist() == [1.0]


def test_probabilities_are_averaged_not_logits() -> None:
    net = Corner().train()
    images = position_images()
    found = average_views(net, images, views=10)
    logits = torch.stack([view[:, :, 0, 0] / 20.0 for view in ten_views(images).unbind(1)])
    torch.testing.assert_close(found, torch.softmax(logits, -1).mean(0))
    assert not torch.allclose(found, torch.softmax(logits.mean(0), -1), atol=1e-3)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    assert net.training


def test_one_view_is_the_centre() -> None:
    images = position_images()
    expected = torch.softmax(images[:, :, 16, 16] / 20.0, -1)
    torch.testing.assert_close(average_views(Corner().eval(), images, views=1), expected)
    crop = images[:, :, 16:240, 16:240]
    torch.testing.assert_close(average_views(Corner(), crop, views=1), expected)


@pytest.mark.parametrize("views", [1, 10])
def test_the_mean_image_is_the_same_for_every_view_and_never_mirrored(views: int) -> None:
    """The order of convdata_jpeg.py: crop, flip, then subtract the center of the mean."""
    images = position_images()
    mean = torch.rand(3, 224, 224, generator=torch.Generator().manual_seed(1)) * 50
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 224 * 224, 4)).requires_grad_(False)
    corners = [(16, 16)] if views == 1 else [(0, 0), (0, 32), (16, 16), (32, 0), (32, 32)]
    crops = [images[:, :, top : top + 224, left : left + 224] for top, left in corners]
    crops += [crop.flip(3) for crop in crops] if views == 10 else []
    expected = torch.stack([torch.softmax(net((crop - mean) / 200), 1) for crop in crops]).mean(0)
    scaled = average_views(net, images / 200, views, mean / 200)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(average_views(net, images / 200, views), expected, atol=1e-3)


def test_sums_are_of_loss_errors_and_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(50, 8, generator=generator).softmax(1)
    labels = torch.randint(0, 8, (50,), generator=generator)
    weights = (torch.arange(50) % 4 > 0).float()
    loss, top1, top5, count = sum_metrics(probabilities, labels, weights).tolist()
    chosen = probabilities.double()[torch.arange(50), labels]
    assert loss == pytest.approx(float(-(chosen.log() * weights).sum()), rel=1e-6)
    assert [top1, top5] == [float(one) for one in count_errors(probabilities, labels, weights)]
    assert count == 37
    none = torch.tensor([[1.0, 0.0]])
    loss = sum_metrics(none, torch.tensor([1]), torch.ones(1))[0].item()
    assert loss == pytest.approx(87.34, abs=0.01)


def test_unusable_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="views is 5"):
        average_views(Corner(), position_images(), views=5)
    with pytest.raises(ValueError, match="more than 224"):
        average_views(Corner(), position_images()[..., :224, :224], views=10)
    with pytest.raises(ValueError, match="at least 224"):
        average_views(Corner(), position_images()[..., :200, :200], views=1)


def test_errors_against_a_sort() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(200, 12, generator=generator).softmax(1)
    labels = torch.randint(0, 12, (200,), generator=generator)
    weights = torch.rand(200, generator=generator)
    order = [sorted(range(12), key=lambda c: -row[c].item()) for row in probabilities]
    for count, places in zip(count_errors(probabilities, labels, weights), (1, 5), strict=True):
        expected = sum(
            w
            for w, label, row in zip(weights.tolist(), labels.tolist(), order, strict=True)
            if label not in row[:places]
        )
        assert count.item() == pytest.approx(expected, rel=1e-5)
        assert count.dtype == torch.float64


def test_padding_rows_do_not_count() -> None:
    probabilities = torch.tensor([[0.1, 0.9], [0.1, 0.9], [0.1, 0.9]])
    top1, top5 = count_errors(probabilities, torch.tensor([0, 1, 0]), torch.tensor([1.0, 1.0, 0.0]))
    assert (top1.item(), top5.item()) == (1.0, 0.0)


def test_a_tie_counts_as_lots_drawn() -> None:
    one = torch.ones(1)
    level = torch.full((1, 10), 0.1)
    top1, top5 = count_errors(level, torch.tensor([3]), one)
    assert (top1.item(), top5.item()) == pytest.approx((0.9, 0.5))
    # two ahead, then four level ones on places 3 to 6: three of the four are among the first five
    row = torch.tensor([[0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]])
    top1, top5 = count_errors(row, torch.tensor([4]), one)
    assert (top1.item(), top5.item()) == pytest.approx((1.0, 0.25))


def test_nan_is_wrong() -> None:
    rows = torch.full((2, 6), float("nan"))
    rows[1] = torch.tensor([0.5, float("nan"), 0.1, 0.1, 0.1, 0.1])
    counts = count_errors(rows, torch.tensor([0, 0]), torch.ones(2))
    assert [count.item() for count in counts] == [2.0, 2.0]


def test_the_first_count_alone_is_equal_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    for classes, values in ((2, 2), (7, 3), (1000, 4), (1000, 10**6)):
        scores = torch.randint(0, values, (300, classes), generator=generator) / values - 0.5
        scores[:3, classes // 2] = torch.nan
        scores[3:6, 0], scores[6:9, 1] = torch.inf, -torch.inf
        labels = torch.randint(0, classes, (300,), generator=generator)
        weights = (torch.arange(300) % 5 > 0).float()
        for rows in (*(slice(row, row + 1) for row in range(40)), slice(None)):
            given = scores[rows], labels[rows], weights[rows]
            assert torch.equal(count_top1_errors(*given), count_errors(*given)[0])
