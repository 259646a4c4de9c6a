"""The networks of the studies written out by hand: other normalisations, conv6, four layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.alexnet import RUNNING, AlexNet
from model.architecture import Design
from model.summary import build_table, sum_rows
from tests.model.test_design import CASES as PLAIN
from tests.model.test_design import WIDTH, Written, images, narrow, norm, spatial_norm

Norm = Callable[[Written, str, Tensor], Tensor]


def convolutions(w: Written, x: Tensor, normalise: Norm) -> list[Tensor]:
    """The paper's order up to the last pooling, each column."""
    x = F.pad(x, (0, 3, 0, 3))
    second, third = [], []
    for c in "ab":
        y = normalise(w, f"{c}.conv1", F.relu(w.conv(f"{c}.conv1", x, stride=4)))
        y = F.relu(w.conv(f"{c}.conv2", F.max_pool2d(y, 3, 2), pad=2))
        second.append(F.max_pool2d(normalise(w, f"{c}.conv2", y), 3, 2))
    for c in "ab":
        y = torch.cat(second, 1)
        for layer in ("conv3", "conv4", "conv5"):
            y = F.relu(w.conv(f"{c}.{layer}", y, pad=1))
        third.append(F.max_pool2d(y, 3, 2))
    return third


def by_batch(w: Written, layer: str, x: Tensor) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    mean, var, scale, shift = (w.state[f"{layer}.norm.{n}"][:, None, None] for n in names)
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def by_contrast(w: Written, layer: str, x: Tensor) -> Tensor:
    """The formula of `contrast_by_hand` as convolutions: that loop takes half a minute here."""
    away = torch.arange(-4, 5, dtype=torch.float64)
    gauss = torch.exp(-(away[:, None] ** 2 + away**2) / (2 * 2.25**2))[None, None]

    def weighted(of: Tensor) -> Tensor:
        total = F.conv2d(of.sum(1, keepdim=True), gauss, padding=4)
        return total / (of.shape[1] * F.conv2d(torch.ones_like(total), gauss, padding=4))

    v = x - weighted(x)
    sigma = weighted(v.square()).sqrt()
    return v / torch.maximum(sigma, sigma.mean((2, 3), keepdim=True))


def normalised(normalise: Norm):
    def written(net: AlexNet, x: Tensor) -> Tensor:
        w = Written(net)
        return w.classifier(convolutions(w, x, normalise))

    return written


def conv6(net: AlexNet, x: Tensor) -> Tensor:
    """layers-146-2012-2011.cfg, in the paper's order."""
    w = Written(net)
    both = torch.cat(convolutions(w, x, lambda w, layer, y: norm(y)), 1)
    return w.classifier([F.relu(w.conv(f"{c}.conv6", both, pad=1)) for c in "ab"])


def no_dropout(net: AlexNet, x: Tensor) -> Tensor:
    w = Written(net)
    y = torch.cat(convolutions(w, x, lambda w, layer, y: norm(y)), 1).flatten(1)
    for name in ("fc6", "fc7"):
        y = F.relu(w.full(name, y))
    return w.full("fc8", y)


def four(act):
    """layers-19pct.cfg on means of 8x8 pixels; with columns, conv1 and conv2 are cut in half."""

    def written(net: AlexNet, x: Tensor) -> Tensor:
        w = Written(net)
        x = x.unflatten(2, (28, 8)).unflatten(4, (28, 8)).mean((3, 5))
        second, third = [], []
        for c in w.columns:
            y = act(F.max_pool2d(w.conv(f"{c}.conv1", x, pad=2), 3, 2, ceil_mode=True))
            y = act(w.conv(f"{c}.conv2", y, pad=2))
            second.append(F.avg_pool2d(y, 3, 2, ceil_mode=True))
        for c in w.columns:
            y = act(w.conv(f"{c}.conv3", torch.cat(second, 1), pad=2))
            third.append(F.avg_pool2d(y, 3, 2, ceil_mode=True))
        assert third[0].shape[2:] == (3, 3)
        return w.full("fc4", torch.cat(third, 1).flatten(1))

    return written


CASES = {
    "spatial": (Design(norm="spatial"), normalised(lambda w, layer, x: spatial_norm(x))),
    "batch": (Design(norm="batch"), normalised(by_batch)),
    "lcn": (Design(norm="lcn"), normalised(by_contrast)),
    "conv6": (Design(conv6=True), conv6),
    "no_dropout": (Design(dropout=False), no_dropout),
    "four": (Design(net="four", columns=1, norm="none"), four(F.relu)),
    "four, two columns": (Design(net="four", norm="none", activation="tanh"), four(torch.tanh)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_network_of_a_study_is_that_network_written_out(case: str) -> None:
    design, written = CASES[case]
    net, x = narrow(design), images(1)
    with torch.no_grad():
        running = {name: b for name, b in net.named_buffers() if name.endswith(RUNNING)}
        for name, buffer in running.items():  # as if it had been trained
            buffer.add_(torch.linspace(0.5, 2, len(buffer))).mul_(100 if "mean" in name else 1e4)
        found = net(x)
        torch.testing.assert_close(found, written(net, x), rtol=1e-9, atol=1e-12)
        if design.net == "paper" and case not in ("batch", "conv6"):  # the same parameters fit
            other = narrow(Design())
            other.load_column_state(net.column_state())
            assert not torch.allclose(found, other(x), rtol=1e-3)


def test_without_dropout_a_test_is_what_training_is_and_needs_no_position() -> None:
    net, x = narrow(Design(dropout=False)), images(1)
    with torch.no_grad():
        assert torch.equal(net.train()(x), net.eval()(x))


@pytest.mark.parametrize(
    "design", [Design(), *(case[0] for case in (PLAIN | CASES).values())], ids=str
)
def test_the_table_is_of_the_network_that_runs(design: Design) -> None:
    net = AlexNet(classes=10, design=replace(design, width=WIDTH))
    rows = build_table(10, net.design)
    assert sum_rows(rows).parameters == sum(p.numel() for p in net.parameters())
    seen = {}
    for name, module in net.named_children():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: tuple(output.shape[1:])})
        )
    net.eval()(images(1).float())
    assert list(seen) == [row.layer for row in rows[:: design.columns]]
    for row in rows:
        maps, *side = seen[row.layer]
        assert (maps // design.columns, *side) == row.output_shape
    last = [row for row in rows if row.kernel][-1]
    assert last.final_shape[1:] == ((3, 3) if design.net == "four" else (6, 6))
