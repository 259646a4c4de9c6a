"""Local contrast and batch normalisation against plain float64 loops, and against torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.alexnet import AlexNet
from model.architecture import Design
from model.norm import BatchNorm, local_contrast_norm
from tests.helpers.lrn import LAYOUTS, maps

WIDTH = 1 / 16


def contrast_by_hand(x: Tensor) -> Tensor:
    """Jarrett et al. 2009, pixel by pixel: an image [maps, h, w] of one column, float64."""
    maps, height, width = x.shape

    def weighted(of: Tensor, j: int, k: int) -> Tensor:
        total, weights = torch.zeros((), dtype=of.dtype), 0.0
        for p in range(-4, 5):
            for q in range(-4, 5):
                if 0 <= j + p < height and 0 <= k + q < width:
                    weight = math.exp(-(p * p + q * q) / (2 * 2.25**2))
                    total = total + weight * of[:, j + p, k + q].sum()
                    weights += weight * maps
        return total / weights

    pixels = [(j, k) for j in range(height) for k in range(width)]
    mean = torch.stack([weighted(x, j, k) for j, k in pixels]).view(height, width)
    v = x - mean
    sigma = torch.stack([weighted(v.square(), j, k).sqrt() for j, k in pixels])
    sigma = sigma.view(height, width)
    return v / torch.maximum(sigma, sigma.mean())


def test_contrast_is_the_loop_forward_and_backward() -> None:
    rows, slopes = maps(2, 6, 7, 11).requires_grad_(), maps(2, 6, 7, 11, seed=2)
    wanted = torch.stack([torch.cat([contrast_by_hand(c) for c in one.chunk(2)]) for one in rows])
    (expected,) = torch.autograd.grad((wanted * slopes).sum(), rows)
    for layout in LAYOUTS:
        x = rows.detach().contiguous(memory_format=layout).requires_grad_()
        y = local_contrast_norm(x, columns=2)
        torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)
        (found,) = torch.autograd.grad((y * slopes).sum(), x)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        assert y.is_contiguous(memory_format=layout)
        rough = local_contrast_norm(x.detach().float(), 2)
        torch.testing.assert_close(rough.double(), y.detach(), rtol=1e-4, atol=1e-4)
        half = local_contrast_norm(x.detach().bfloat16(), 2)
        assert half.dtype == torch.bfloat16
        assert (half.double() - y.detach()).norm() < 0.02 * y.detach().norm()


def test_contrast_has_the_slopes_that_autograd_measures() -> None:
    x = (maps(1, 4, 5, 6) / 100).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: local_contrast_norm(t, 2), (x,), atol=1e-6)


def test_an_image_without_contrast_becomes_nothing_and_has_no_wild_gradient() -> None:
    x = torch.full((2, 4, 12, 12), 50.0)
    x[1] = 0
    x.requires_grad_()
    y = local_contrast_norm(x)
    y.sum().backward()
    assert y.abs().max() < 1
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_contrast_refuses_maps_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="2 columns"):
        local_contrast_norm(torch.zeros(1, 3, 4, 4), 2)
    with pytest.raises(ValueError, match="must be"):
        local_contrast_norm(torch.zeros(3, 4, 4))


def filled(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, norm.num_features))
        norm.bias.copy_(torch.linspace(-1, 1, norm.num_features))
    return norm.double()


def test_batch_norm_is_the_formula_and_torchs_own() -> None:
    ours, theirs = filled(BatchNorm(3)), filled(nn.BatchNorm2d(3))
    for step in range(3):
        x = maps(4, 3, 5, 7, seed=step) + 300
        y = ours(x)
        torch.testing.assert_close(y, theirs(x))
        for m in range(3):
            own = x[:, m]
            wanted = (own - own.mean()) / (own.var(unbiased=False) + 1e-5).sqrt()
            wanted = wanted * ours.weight[m] + ours.bias[m]
            torch.testing.assert_close(y[:, m], wanted)
        taken = ours.take_statistics()
        assert taken is not None
        ours.update_running_stats(taken)
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.take_statistics() is None
    x = maps(2, 3, 5, 7)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    assert ours.take_statistics() is None  # a test leaves no trace
    assert [name for name, _ in ours.named_buffers()] == ["running_mean", "running_var"]


def test_parts_of_a_batch_move_the_running_statistics_once() -> None:
    """A mean as over replicas, each of which has a part."""
    x = maps(6, 3, 5, 7)
    parts, alone = filled(BatchNorm(3)), [filled(BatchNorm(3)) for _ in range(3)]
    for part, norm in zip(x.split(2), alone, strict=True):
        torch.testing.assert_close(parts(part), norm(part))
    taken = [norm.take_statistics() for norm in alone]
    expected = torch.stack([one for one in taken if one is not None]).mean(0)
    found = parts.take_statistics()
    assert found is not None
    torch.testing.assert_close(found, expected)
    parts.update_running_stats(found)
    torch.testing.assert_close(parts.running_mean, 0.1 * expected[0])


def test_the_statistics_of_a_network_travel_with_its_weights_under_the_columns_names() -> None:
    design = Design(norm="batch", width=WIDTH)
    net, images = AlexNet(classes=4, design=design), torch.randn(3, 3, 224, 224) * 60
    net.set_position(0)
    net(images).sum().backward()
    statistics = net.take_statistics()
    assert statistics is not None
    assert statistics.shape == (2 * (6 + 16),)  # one message: both layers' maps
    net.update_running_stats(statistics)
    assert net.take_statistics() is None
    state = net.column_state()
    assert state["a.conv1.norm.running_mean"].shape == (3,)
    assert state["b.conv2.norm.running_var"].shape == (8,)
    assert not torch.equal(state["b.conv2.norm.running_var"], torch.ones(8))
    assert not any("tracked" in key for key in state)
    other = AlexNet(classes=4, design=design, seed=1)
    other.load_column_state(state)
    with torch.no_grad():
        assert torch.equal(net.eval()(images), other.eval()(images))
    with pytest.raises(ValueError, match="running"):
        other.load_column_state({k: v for k, v in state.items() if "running" not in k})


def test_batch_norm_in_half_precision_stays_near() -> None:
    x = maps(4, 3, 5, 7).float().contiguous(memory_format=torch.channels_last)
    norm = BatchNorm(3)
    exact, rough = norm(x), norm(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.02 * exact.norm()
    assert F.mse_loss(exact.mean((0, 2, 3)), torch.zeros(3)) < 1e-9
