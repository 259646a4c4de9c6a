"""The networks that the paper's is compared with: sizes published, and each written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.alexnet import AlexNet
from model.architecture import Design, build_stages
from model.summary import build_table, sum_rows

SOURCE = Design(relu_first=False, spatial_norm=True)
WIDTH = 1 / 16


def images(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 224, 224, generator=generator, dtype=torch.float64) * 60


def narrow(design: Design) -> AlexNet:
    return AlexNet(classes=10, design=replace(design, width=WIDTH)).double().eval()


def norm(x: Tensor) -> Tensor:
    return F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=2.0)


def spatial_norm(x: Tensor) -> Tensor:
    sums = F.avg_pool2d(x.square(), 5, stride=1, padding=2, divisor_override=1)
    return x / (1 + 0.001 / 25 * sums) ** 0.75


class Written:
    """A network written out from its column states, in the style of its layer file."""

    def __init__(self, net: AlexNet) -> None:
        self.state = net.column_state()
        self.columns = "ab"[: net.design.columns]

    def conv(self, name: str, x: Tensor, stride: int = 1, pad: int = 0) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride=stride, padding=pad)

    def full(self, name: str, x: Tensor) -> Tensor:
        parts = [
            F.linear(x, self.state[f"{c}.{name}.weight"], self.state[f"{c}.{name}.bias"])
            for c in self.columns
        ]
        return torch.cat(parts, 1)

    def classifier(self, pool5: list[Tensor], act=F.relu) -> Tensor:
        y = torch.cat(pool5, 1).flatten(1)
        for name in ("fc6", "fc7"):
            if f"a.{name}.weight" not in self.state:
                continue
            y = act(self.full(name, y)) * 0.5
        return self.full("fc8", y)


def source2012(net: AlexNet, x: Tensor) -> Tensor:
    """layers-145.cfg, top to bottom; with one column, layers-145-half.cfg."""
    w = Written(net)
    x = F.pad(x, (0, 3, 0, 3))
    pool2, pool3 = [], []
    for c in w.columns:
        rnorm1 = norm(w.conv(f"{c}.conv1", x, stride=4))
        pool1 = F.relu(F.max_pool2d(rnorm1, 3, 2))
        rnorm2 = norm(F.relu(w.conv(f"{c}.conv2", pool1, pad=2)))
        pool2.append(F.max_pool2d(spatial_norm(rnorm2), 3, 2))
    for c in w.columns:
        conv3 = F.relu(w.conv(f"{c}.conv3", torch.cat(pool2, 1), pad=1))
        conv4 = F.relu(w.conv(f"{c}.conv4", conv3, pad=1))
        conv5 = w.conv(f"{c}.conv5", conv4, pad=1)
        pool3.append(F.relu(F.max_pool2d(conv5, 3, 2)))
    return w.classifier(pool3)


def pool2(net: AlexNet, x: Tensor) -> Tensor:
    """layers-147.cfg: windows of 2, 2 apart; the last of an odd row is cut off by the border."""
    w = Written(net)
    x = F.pad(x, (0, 3, 0, 3))

    def pool(y: Tensor) -> Tensor:
        odd = y.shape[-1] % 2
        return F.max_pool2d(F.pad(y, (0, odd, 0, odd), value=-torch.inf), 2, 2)

    second, third = [], []
    for c in "ab":
        y = F.relu(pool(norm(w.conv(f"{c}.conv1", x, stride=4))))
        y = spatial_norm(norm(F.relu(w.conv(f"{c}.conv2", y, pad=1))))
        second.append(pool(y))
    for c in "ab":
        y = F.relu(w.conv(f"{c}.conv3", torch.cat(second, 1), pad=1))
        y = F.relu(w.conv(f"{c}.conv4", y, pad=1))
        third.append(F.relu(pool(w.conv(f"{c}.conv5", y))))
    assert third[0].shape[-1] == 6
    return w.classifier(third)


def tanh_without_norm(net: AlexNet, x: Tensor) -> Tensor:
    w = Written(net)
    x = F.pad(x, (0, 3, 0, 3))
    second, third = [], []
    for c in "ab":
        y = F.max_pool2d(torch.tanh(w.conv(f"{c}.conv1", x, stride=4)), 3, 2)
        second.append(F.max_pool2d(torch.tanh(w.conv(f"{c}.conv2", y, pad=2)), 3, 2))
    for c in "ab":
        y = torch.tanh(w.conv(f"{c}.conv3", torch.cat(second, 1), pad=1))
        y = torch.tanh(w.conv(f"{c}.conv4", y, pad=1))
        third.append(F.max_pool2d(torch.tanh(w.conv(f"{c}.conv5", y, pad=1)), 3, 2))
    return w.classifier(third, torch.tanh)


def without(name: str):
    """The paper's order with a layer left out; what is next reads both columns for conv3."""

    def written(net: AlexNet, x: Tensor) -> Tensor:
        w = Written(net)
        x = F.pad(x, (0, 3, 0, 3))
        second, third = [], []
        for c in "ab":
            y = F.max_pool2d(norm(F.relu(w.conv(f"{c}.conv1", x, stride=4))), 3, 2)
            second.append(F.max_pool2d(norm(F.relu(w.conv(f"{c}.conv2", y, pad=2))), 3, 2))
        for c in "ab":
            y = torch.cat(second, 1)
            for layer in ("conv3", "conv4", "conv5"):
                if layer != name:
                    y = F.relu(w.conv(f"{c}.{layer}", y, pad=1))
            third.append(F.max_pool2d(y, 3, 2))
        return w.classifier(third)

    return written


CASES = {
    "source2012": (SOURCE, source2012),
    "one_gpu": (replace(SOURCE, columns=1), source2012),
    "pool2": (replace(SOURCE, pool="2/2"), pool2),
    "tanh": (Design(activation="tanh", norm="none"), tanh_without_norm),
    **{
        f"no_{name}": (Design(without=name), without(name))
        for name in ("conv3", "conv4", "conv5", "fc7", "dense")
    },
}


@pytest.mark.parametrize("case", CASES)
def test_each_design_is_its_network_written_out(case: str) -> None:
    design, written = CASES[case]
    net, x = narrow(design), images()
    with torch.no_grad():
        found = net(x)
        torch.testing.assert_close(found, written(net, x), rtol=1e-10, atol=1e-12)
        other = narrow(Design(columns=design.columns))
        if (
            net.column_state().keys() == other.column_state().keys() and design.pool == "3/2"
        ):  # the same parameters fit the paper's
            other.load_column_state(net.column_state())
            assert not torch.allclose(found, other(x), rtol=1e-3)


@pytest.mark.parametrize(
    ("design", "parameters"),
    [
        (SOURCE, 60_965_224),
        (Design(columns=1), 59_798_312),  # layers-145-half.cfg
        (Design(pool="2/2"), 60_965_224),
        (Design(norm="spatial"), 60_965_224),
        (Design(norm="lcn"), 60_965_224),
        (Design(norm="batch"), 60_965_224 + 2 * (96 + 256)),
        (Design(dropout=False), 60_965_224),
        (Design(conv6=True), 60_965_224 + 2 * (128 * 256 * 9 + 128)),  # layers-146-2012-2011.cfg
        (Design(conv6=True, columns=1), 59_798_312 + 256 * 256 * 9 + 256),
        # layers-19pct.cfg has 4x4 pixels before its fc10; of a crop of 28x28 3x3 are left.
        (Design(net="four", columns=1), 2432 + 25_632 + 51_264 + 1000 * (64 * 9 + 1)),
        (Design(net="four"), 2432 + 2 * (16 * 16 * 25 + 16) + 51_264 + 1000 * (64 * 9 + 1)),
        (Design(without="conv3"), 60_965_224 - 2 * (192 * 256 * 9 + 192) + 2 * 192 * 64 * 9),
        (Design(without="conv4"), 60_965_224 - 2 * (192 * 192 * 9 + 192)),
        (Design(without="conv5"), 60_965_224 - 2 * 192 * (192 * 9 + 1)),
        (Design(without="fc7"), 60_965_224 - 4096 * 4097),
        (Design(without="dense"), 60_965_224 - 4096 * (9217 + 4097 + 1000) + 1000 * 9216),
        (Design(norm_layers=("conv4=batch",)), 60_965_224 + 2 * 2 * 192),
        # layers-146-2011.cfg without its sixth convolution: 2x1024 units between fc7 and fc8.
        (Design(bottleneck=1024), 60_965_224 + 2 * 1024 * 4097 - 1000 * 4096 + 1000 * 2048),
        (
            Design(communication=False),
            2
            * (
                17_472
                + 160 * 1201
                + 192 * (160 * 9 + 1)
                + 331_968
                + 221_312
                + 4096 * 4609
                + 2048 * 4097
            )
            + 4_097_000,
        ),  # layers-150.cfg
        # layers-cifar10-11pct.cfg and layers-conv-local-13pct.cfg of 28x28
        (
            Design(net="local11", columns=1),
            4864 + 102_464 + 49 * 64 * 577 + 49 * 32 * 577 + 1000 * (32 * 49 + 1),
        ),
        (
            Design(net="local13", columns=1),
            4864 + 102_464 + 49 * 32 * 577 + 49 * 32 * 289 + 1000 * (32 * 49 + 1),
        ),
    ],
    ids=str,
)
def test_parameters_of_each_design(design: Design, parameters: int) -> None:
    assert sum_rows(build_table(design=design)).parameters == parameters
    with torch.device("meta"):
        sizes = [
            (stage.inputs * max(1, stage.layer.kernel) ** 2 + 1)
            * stage.outputs
            * (stage.output_size**2 if stage.layer.kind == "local" else 1)
            + stage.outputs * (2 if "batch_norm" in stage.layer.then else 0)
            for stage in build_stages(1000, design)
        ]
    assert design.columns * sum(sizes) == parameters


def test_one_column_has_its_own_checkpoint_keys_and_no_exchange() -> None:
    net = AlexNet(classes=7, design=Design(columns=1, width=WIDTH))
    assert {key[0] for key in net.column_state()} == {"a"}
    assert net.get_parameter("fc8.weight").shape == (7, 256)
    with pytest.raises(ValueError, match=r"columns \(0,\)"):
        AlexNet((0, 1), classes=7, design=Design(columns=1))
    with pytest.raises(ValueError, match="width or design"):
        AlexNet(width=1.0, design=Design())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"norm": "group"},
            "norm is 'group'; it takes 'lrn', 'scale', 'spatial', 'lcn', 'batch', 'none'",
        ),
        ({"net": "five"}, "net is 'five'; it takes 'paper', 'four', 'local11', 'local13'"),
        ({"net": "four", "conv6": True}, "conv6 is True; with net = 'four' it stays False"),
        ({"net": "four", "without": "conv3"}, "without is 'conv3'; with net = 'four'"),
        ({"net": "four", "relu_first": False}, "relu_first is False; with net = 'four'"),
        ({"norm": "batch", "spatial_norm": True}, "spatial_norm goes with norm = 'lrn'"),
        ({"pool": "3"}, "pool is '3'; it takes '3/2', '2/2'"),
        ({"without": "conv1"}, "without is 'conv1'"),
        ({"columns": 3}, "columns is 3"),
        ({"norm": "none", "spatial_norm": True}, "spatial_norm goes with norm = 'lrn'"),
        ({"width": 0.01}, "smallest that makes sense is 0.021"),
    ],
)
def test_a_design_that_cannot_be_is_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        Design(**values)  # type: ignore[arg-type]
