"""A layer across the pair: the same numbers, the bytes of the paper, and nothing waits too soon."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.alexnet import AlexNet
from model.exchange import Exchange, _ApplySplit, _SplitConv, _SplitLinear, _Swap, split_layer
from tests.helpers.processes import run_ranks

BATCH = 6
POSITION = 24
"""Seed of the dropout masks that the bounds of WIRE were found with."""
WIDTH = 1 / 8
CLASSES = 10
# Values of one column at width 1 that the other one reads (paper, figure 2), for each image.
READ = {"conv3": 128 * 13 * 13, "fc6": 128 * 6 * 6, "fc7": 2048, "fc8": 2048}

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(2 * 5, 7), (5,)),
    "conv": (lambda: nn.Conv2d(2 * 6, 10, 3, padding=1), (6, 9, 9)),
    "strided conv": (lambda: nn.Conv2d(2 * 6, 10, 3, stride=2, dilation=2), (6, 11, 11)),
}
MODES = {
    "float64": (torch.float64, torch.contiguous_format, False),
    "float32, channels last": (torch.float32, torch.channels_last, False),
    "bfloat16 autocast": (torch.float32, torch.channels_last, True),
}


def layer_and_maps(kind: str, mode: str, column: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer of this column, both columns' maps, and the slopes of what follows the layer."""
    dtype, layout, _ = MODES[mode]
    make, shape = LAYERS[kind]
    torch.manual_seed(1 + column)
    layer = make().to(dtype)
    torch.manual_seed(8)
    maps = torch.randn(BATCH, 2 * shape[0], *shape[1:]).to(dtype)
    if maps.dim() == 4:
        layer = layer.to(memory_format=layout)  # type: ignore[call-overload]
        maps = maps.contiguous(memory_format=layout)
    with torch.no_grad():
        slopes = torch.randn(layer(maps).shape, generator=torch.Generator().manual_seed(column))
    return layer, maps, slopes.to(dtype)


def crossed(link: Exchange, kind: str, mode: str) -> dict[str, Tensor]:
    """Output and gradients of one column's layer in a pair."""
    layer, maps, slopes = layer_and_maps(kind, mode, link.index)
    own = maps.chunk(2, dim=1)[link.index].clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=MODES[mode][2]):
        y = link.apply_layer(layer, own)
    (y.to(slopes.dtype) * slopes).sum().backward()
    found = {"y": y, "maps": own.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    return {name: value.detach().clone() for name, value in found.items()}  # type: ignore[union-attr]


def whole(kind: str, mode: str) -> list[dict[str, Tensor]]:
    """The same of both columns in one process: each column's layer reads all maps."""
    found = []
    gradients = []
    for column in range(2):
        layer, maps, slopes = layer_and_maps(kind, mode, column)
        maps.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=MODES[mode][2]):
            y = layer(maps)
        (y.to(slopes.dtype) * slopes).sum().backward()
        gradients.append(maps.grad)
        found.append({"y": y.detach(), "weight": layer.weight.grad, "bias": layer.bias.grad})
    for column, halves in enumerate(sum(gradients).chunk(2, dim=1)):  # type: ignore[union-attr]
        found[column]["maps"] = halves
    return found  # type: ignore[return-value]


def trained(link: Exchange, dtype: torch.dtype, autocast: bool = False) -> dict[str, Any]:
    """Gradients of one step of a narrow network, and what crossed; then what a test crosses."""
    net = AlexNet((link.index,), classes=CLASSES, width=WIDTH, exchange=link, seed=7).to(dtype)
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(BATCH, 3, 224, 224, generator=generator, dtype=torch.float64) * 60
    labels = torch.arange(BATCH) % CLASSES
    net.set_position(POSITION)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = net(images.to(dtype)).to(dtype)
    F.cross_entropy(logits, labels).backward()
    found = {"gradients": net.split({n: p.grad for n, p in net.named_parameters()})}  # type: ignore[misc]
    found["training"] = counted(link)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        net.eval()(images.to(dtype))
    return {**found, "logits": logits.detach(), "testing": counted(link)}


def counted(link: Exchange) -> dict[str, tuple[int, int, int]]:
    """Bytes forward and backward and messages, by place; begins anew."""
    found = {name: (t.forward, t.backward, t.swaps) for name, t in link.traffic.items()}
    link.traffic.clear()
    assert len(link.waits.take()) == sum(swaps for _, _, swaps in found.values())
    return found


def full_size() -> dict[str, tuple[int, int, int]]:
    """Bytes that the network of the paper itself sends in a step on one image, in float32."""
    link = Exchange()
    net = AlexNet((link.index,), exchange=link)
    net.set_position(POSITION)
    F.cross_entropy(net(torch.zeros(1, 3, 224, 224)), torch.zeros(1, dtype=torch.long)).backward()
    return counted(link)


def in_what_order(link: Exchange) -> dict[str, list[str]]:
    """The steps of a layer across the pair, forward and backward, as they come."""
    events: list[str] = []

    class Watched(_SplitLinear):
        def __getattribute__(self, name: str) -> Any:
            if not name.startswith("_"):
                events.append(name)
            return super().__getattribute__(name)

    class WatchedSwap(_Swap):
        def wait(self) -> Tensor:
            events.append("wait")
            return super().wait()

    class WatchedLink(Exchange):
        def _send(self, x: Tensor, name: str, back: bool = False, exact: bool = False) -> _Swap:
            events.append("send")
            return WatchedSwap(self, x)

    weight, bias = torch.ones(3, 4, requires_grad=True), torch.ones(3, requires_grad=True)
    x = torch.ones(2, 2, requires_grad=True)
    y = _ApplySplit.apply(x, weight, bias, Watched(), WatchedLink(link.group), "")
    forward, events[:] = events[:], []
    y.sum().backward()
    return {"forward": forward, "backward": events}


def frozen_below(link: Exchange) -> dict[str, Any]:
    """A layer whose inputs take no gradient: nobody waits for one."""
    layer, maps, _ = layer_and_maps("linear", "float64", link.index)
    own = maps.chunk(2, dim=1)[link.index].clone()
    link.apply_layer(layer, own, "fc").sum().backward()
    return {"traffic": counted(link), "weight": layer.weight.grad}


def refused(link: Exchange) -> list[str]:
    """Messages for wrong arguments."""
    said = []
    for wrong in (
        lambda: link.apply_layer(nn.Conv2d(4, 4, 3, groups=2), torch.zeros(1, 2, 4, 4)),
        lambda: link.apply_layer(nn.ReLU(), torch.zeros(1, 2)),
        lambda: Exchange(wire=torch.float64),
    ):
        with suppress(TypeError, ValueError, AttributeError):
            wrong()
            said.append("accepted")
    return said


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/init"
    patience = timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2, timeout=patience)
    link, thin = Exchange(), Exchange(wire=torch.bfloat16)
    found = {f"{kind}, {mode}": crossed(link, kind, mode) for kind in LAYERS for mode in MODES}
    counted(link)
    steps = {
        "float64": trained(link, torch.float64),
        "float32": trained(link, torch.float32),
        "bfloat16 wire": trained(thin, torch.float32),
        "float16 wire": trained(Exchange(wire=torch.float16), torch.float32),
        "bfloat16 autocast": trained(link, torch.float32, autocast=True),
    }
    more = {
        "order": in_what_order(link),
        "frozen": frozen_below(link),
        "refused": refused(link),
        "full size": full_size(),
    }
    torch.save({"layers": found, "steps": steps, **more}, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(work, (folder,), 2)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


def far(found: Tensor, expected: Tensor) -> float:
    """Length of the difference as a share of the length of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_across_the_pair_is_the_layer(pair: Any, kind: str, mode: str) -> None:
    # bfloat16: each part of a sum is rounded to 8 bits (2 ** -9), instead of the sum
    limit = {"float64": 1e-15, "float32, channels last": 1e-6, "bfloat16 autocast": 8e-3}[mode]
    for column, expected in enumerate(whole(kind, mode)):
        found = pair[column]["layers"][f"{kind}, {mode}"]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name].dtype == value.dtype, name
            assert found[name].shape == value.shape, name
            if name != "maps":  # a slice there, dense here
                assert found[name].stride() == value.stride(), name
            assert far(found[name], value) <= limit, name


def test_bytes_of_the_paper(pair: Any) -> None:
    """facts of the original (layers-145.cfg), but fc8, which we cut as well, and the logits."""
    for half in pair:
        assert half["full size"] == {
            "conv3": (86_528, 86_528, 2),
            "fc6": (18_432, 18_432, 2),
            "fc7": (8_192, 8_192, 2),
            "fc8": (8_192, 8_192, 2),
            "logits": (4 * 500, 0, 1),
        }


@pytest.mark.parametrize(
    ("step", "size"),
    [("float64", 8), ("float32", 4), ("bfloat16 wire", 2), ("float16 wire", 2),
     ("bfloat16 autocast", 2)],
)  # fmt: skip
def test_bytes_of_a_step_follow_from_the_shapes(pair: Any, step: str, size: int) -> None:
    wire = {name: BATCH * round(count * WIDTH) * size for name, count in READ.items()}
    logits = BATCH * CLASSES // 2 * (4 if step.endswith("wire") else size)
    for half in pair:
        training, testing = half["steps"][step]["training"], half["steps"][step]["testing"]
        assert training.pop("logits") == (logits, 0, 1)
        assert testing.pop("logits") == (logits, 0, 1)
        # one message each way and no other: nothing crosses before conv2, conv4 and conv5
        assert training == {name: (count, count, 2) for name, count in wire.items()}
        assert testing == {name: (count, 0, 1) for name, count in wire.items()}


def test_what_the_other_column_waits_for_goes_first(pair: Any) -> None:
    for half in pair:
        assert half["order"]["forward"] == ["send", "multiply", "wait", "add_product"]
        assert half["order"]["backward"] == [
            "compute_input_gradient",
            "send",
            "compute_input_gradient",
            "compute_parameter_gradients",
            "wait",
        ]


def test_no_gradient_crosses_that_nobody_needs(pair: Any) -> None:
    for half in pair:
        assert half["frozen"]["traffic"] == {"fc": (BATCH * 5 * 8, 0, 1)}
        assert half["frozen"]["weight"].norm() > 0


def test_wrong_layers_and_wires_are_refused(pair: Any) -> None:
    assert [half["refused"] for half in pair] == [[], []]
    with pytest.raises(TypeError, match="only Linear, and Conv2d of one group"):
        split_layer(nn.Conv2d(4, 4, 3, groups=2))
    assert isinstance(split_layer(nn.Conv2d(4, 4, 3)), _SplitConv)


def errors_of(pair: Any, step: str, key: str) -> dict[str, float]:
    """Relative error of every gradient, against float64."""
    return {
        name: far(value, half["steps"]["float64"]["gradients"][name])
        for half in pair
        for name, value in half["steps"][step]["gradients"].items()
        if key in name
    }


# What a bfloat16 wire does to the gradients, lengths of the errors against float64. It rounds the
# other column's half to 8 bits, 4e-3 at most; on the way down ReLUs near 0 and pooling windows with
# near ties decide otherwise, which adds up. In float32 that happens, too, but rarely: once in these
# six images, in layer 2. Computing in bfloat16 throughout, as GPUs do, costs about twice that.
WIRE = {"fc8": (4e-3, 1e-6), "fc7": (0.1, 1e-6), "fc6": (0.1, 1e-6), "conv": (0.3, 1e-2)}
"""Bounds of the errors by layer: with the wire, and without."""


@pytest.mark.parametrize("layer", WIRE)
def test_a_bfloat16_wire_within_bounds_of_float32_and_float64(pair: Any, layer: str) -> None:
    thin, float32 = errors_of(pair, "bfloat16 wire", layer), errors_of(pair, "float32", layer)
    limit, limit_of_float32 = WIRE[layer]
    assert max(float32.values()) < limit_of_float32
    assert max(thin.values()) < limit
    assert min(thin.values()) > 2 * max(float32.values())  # it is rounded indeed


def test_a_bfloat16_wire_costs_less_than_bfloat16_throughout(pair: Any) -> None:
    thin, narrow = (
        errors_of(pair, step, "weight") for step in ("bfloat16 wire", "bfloat16 autocast")
    )
    ratios = sorted(thin[name] / narrow[name] for name in thin)
    assert ratios[len(ratios) // 2] < 0.7


def test_a_float16_wire_loses_less_than_a_bfloat16_one(pair: Any) -> None:
    """It has three bits more."""
    thin, half = (errors_of(pair, f"{wire} wire", "weight") for wire in ("bfloat16", "float16"))
    ratios = sorted(half[name] / thin[name] for name in thin)
    assert ratios[len(ratios) // 2] < 0.5
    assert max(errors_of(pair, "float16 wire", "fc8").values()) < 1e-3


def test_gradients_cross_in_float16_at_the_scale_of_a_batch_sum() -> None:
    """Below 6e-8 float16 has nothing."""
    link, small = Exchange.__new__(Exchange), torch.full((2, 3), 1e-8)
    link._prepare(0, torch.float16)
    link._transfer = lambda sent: lambda: sent  # type: ignore[method-assign]
    assert torch.equal(link._send(small, "conv3").wait(), torch.zeros(2, 3))
    found = link._send(small, "conv3", back=True).wait()
    assert torch.allclose(found, small, rtol=0.05, atol=0.0)


def test_both_columns_see_the_same_logits(pair: Any) -> None:
    for step in pair[0]["steps"]:
        a, b = (half["steps"][step]["logits"] for half in pair)
        assert torch.equal(a, b)
