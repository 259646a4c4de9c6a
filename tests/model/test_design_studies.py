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
from model.layers import LocalConv
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


def local(norms: bool):
    """layers-cifar10-11pct.cfg on means of 8x8 pixels, or without its norms."""

    def connect(w: Written, name: str, x: Tensor) -> Tensor:
        weight, bias = w.state[f"{name}.weight"], w.state[f"{name}.bias"]
        x, side = F.pad(x, (1, 1, 1, 1)), x.shape[2]
        y = torch.empty(len(x), len(weight), side, side, dtype=x.dtype)
        for i in range(side):
            for j in range(side):
                near = x[:, :, i : i + 3, j : j + 3].flatten(1)
                y[:, :, i, j] = near @ weight[..., i, j].flatten(1).t() + bias[:, i, j]
        return F.relu(y)

    def nine(x: Tensor) -> Tensor:
        return F.local_response_norm(x, 9, alpha=1e-3, beta=0.75, k=1.0) if norms else x

    def written(net: AlexNet, x: Tensor) -> Tensor:
        w = Written(net)
        x = x.unflatten(2, (28, 8)).unflatten(4, (28, 8)).mean((3, 5))
        last = []
        for c in w.columns:
            y = F.relu(w.conv(f"{c}.conv1", x, pad=2))
            y = nine(F.max_pool2d(y, 3, 2, ceil_mode=True))
            y = nine(F.relu(w.conv(f"{c}.conv2", y, pad=2)))
            y = F.max_pool2d(y, 3, 2, ceil_mode=True)
            last.append(connect(w, f"{c}.local4", connect(w, f"{c}.local3", y)))
        return w.full("fc5", torch.cat(last, 1).flatten(1))

    return written


def across(net: AlexNet, x: Tensor) -> Tensor:
    """The paper's order with the windows of Caffe, over the maps of both columns at once."""
    w, x = Written(net), F.pad(x, (0, 3, 0, 3))

    def both(name: str, parts: list[Tensor], **how: int) -> list[Tensor]:
        y = [F.relu(w.conv(f"{c}.{name}", own, **how)) for c, own in zip("ab", parts, strict=True)]
        return list(F.max_pool2d(norm(torch.cat(y, 1)), 3, 2).chunk(2, 1))

    y = torch.cat(both("conv2", both("conv1", [x, x], stride=4), pad=2), 1)
    last = []
    for c in "ab":
        own = y
        for layer in ("conv3", "conv4", "conv5"):
            own = F.relu(w.conv(f"{c}.{layer}", own, pad=1))
        last.append(F.max_pool2d(own, 3, 2))
    return w.classifier(last)


def by_layer(w: Written, layer: str, x: Tensor) -> Tensor:
    """conv1 with the constants of the test, conv2 with the constant factor that they come to."""
    if layer.endswith("conv1"):
        return F.local_response_norm(x, 7, alpha=1e-3, beta=0.5, k=3.0)
    return x / 3.0**0.5


def alone(net: AlexNet, x: Tensor) -> Tensor:
    """layers-150.cfg in the paper's order: columns meet in fc8."""
    w = Written(net)
    x, last = F.pad(x, (0, 3, 0, 3)), []
    for c in "ab":
        y = F.max_pool2d(norm(F.relu(w.conv(f"{c}.conv1", x, stride=4))), 3, 2)
        y = F.max_pool2d(norm(F.relu(w.conv(f"{c}.conv2", y, pad=2))), 3, 2)
        for layer in ("conv3", "conv4", "conv5"):
            y = F.relu(w.conv(f"{c}.{layer}", y, pad=1))
        y = F.max_pool2d(y, 3, 2).flatten(1)
        for name in (f"{c}.fc6", f"{c}.fc7"):
            y = F.relu(F.linear(y, w.state[f"{name}.weight"], w.state[f"{name}.bias"])) * 0.5
        last.append(y)
    return w.full("fc8", torch.cat(last, 1))


def bottleneck(net: AlexNet, x: Tensor) -> Tensor:
    """layers-146-2011.cfg: a linear layer between fc7 and the logits."""
    w = Written(net)
    y = torch.cat(convolutions(w, x, lambda w, layer, y: norm(y)), 1).flatten(1)
    for name in ("fc6", "fc7"):
        y = F.relu(w.full(name, y)) * 0.5
    return w.full("fc8", w.full("bottleneck", y))


def norms_behind_all(net: AlexNet, x: Tensor) -> Tensor:
    """conv4 and conv5, which have no normalization in the paper, with one behind their ReLU."""
    w, last = Written(net), []
    x = F.pad(x, (0, 3, 0, 3))
    second = []
    for c in "ab":
        y = F.max_pool2d(F.relu(w.conv(f"{c}.conv1", x, stride=4)), 3, 2)
        second.append(F.max_pool2d(F.relu(w.conv(f"{c}.conv2", y, pad=2)), 3, 2))
    for c in "ab":
        y = F.relu(w.conv(f"{c}.conv3", torch.cat(second, 1), pad=1))
        y = norm(F.relu(w.conv(f"{c}.conv4", y, pad=1)))
        last.append(F.max_pool2d(spatial_norm(F.relu(w.conv(f"{c}.conv5", y, pad=1))), 3, 2))
    return w.classifier(last)


ELEVEN = {"lrn_size": 9, "lrn_k": 1.0, "lrn_alpha": 1e-3}
CASES = {
    "constants, by layer": (
        Design(norm_layers=("conv2=scale",), lrn_size=7, lrn_alpha=1e-3, lrn_beta=0.5, lrn_k=3.0),
        normalised(by_layer),
    ),
    "norms behind conv4 and conv5": (
        Design(norm="none", norm_layers=("conv4=lrn", "conv5=spatial")),
        norms_behind_all,
    ),
    "across": (Design(lrn_across=True), across),
    "alone": (Design(communication=False), alone),
    "bottleneck": (Design(bottleneck=24), bottleneck),
    "local11": (Design(net="local11", columns=1, **ELEVEN), local(norms=True)),
    "local13": (Design(net="local13", columns=1, norm="none"), local(norms=False)),
    "local11, two columns": (Design(net="local11", **ELEVEN), local(norms=True)),
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
        changed = ("batch", "conv6", "alone", "bottleneck")
        if design.net == "paper" and case not in changed:  # the same parameters fit
            other = narrow(Design())
            other.load_column_state(net.column_state())
            assert not torch.allclose(found, other(x), rtol=1e-4)


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
    sides = {"paper": 6, "four": 3, "local11": 7, "local13": 7}
    assert last.final_shape[1:] == (sides[design.net], sides[design.net])


@pytest.mark.parametrize("columns", [1, 2])
def test_a_locally_connected_layer_passes_gradcheck(columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = LocalConv(2, 2 * columns, 3, 3, columns).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, 2 * columns, 3, 3, generator=generator, dtype=torch.float64)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    values = [layer.weight.detach(), layer.bias.detach()]
    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in (x, *values)))
    patches = F.unfold(x.detach(), 3, padding=1).view(2, columns, 2 * 9, 9)
    filters = values[0].reshape(columns, 2, 2 * 9, 9)
    sums = torch.einsum("bcip,cmip->bcmp", patches, filters).reshape(2, 2 * columns, 3, 3)
    assert torch.allclose(run(x, *values), sums + values[1])
    narrow, wide = layer.to(torch.bfloat16)(x.bfloat16()), run(x, *values)
    assert narrow.dtype == torch.bfloat16
    assert narrow.is_contiguous(memory_format=torch.channels_last)
    assert (narrow.double() - wide).norm() < 0.02 * wide.norm()


def test_a_column_alone_cannot_normalize_across_the_border() -> None:
    class Link:
        index = 0

    with pytest.raises(ValueError, match="lrn_across is True, whose windows read both columns"):
        AlexNet((0,), exchange=Link(), design=Design(lrn_across=True))  # type: ignore[arg-type]
