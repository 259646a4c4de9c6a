"""The network's sizes against the published ones, its initial values, and its state."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.alexnet import AlexNet
from model.architecture import Design, build_stages
from model.layer_table import LAYERS
from model.summary import build_table, sum_rows

# Fact sheet of the original (layers-145.cfg): parameters of one column of each layer
PARAMETERS = {
    "conv1": 17_472,
    "conv2": 153_728,
    "conv3": 442_560,
    "conv4": 331_968,
    "conv5": 221_312,
    "fc6": 18_876_416,
    "fc7": 8_390_656,
    "fc8": 2_048_500,
}
MULTIPLY_ADDS = {
    "conv1": 105_415_200,
    "conv2": 223_948_800,
    "conv3": 149_520_384,
    "conv4": 112_140_288,
    "conv5": 74_760_192,
    "fc6": 37_748_736,
    "fc7": 16_777_216,
    "fc8": 4_096_000,
}
SHAPES = {
    "conv1": ((3, 224, 224), (48, 55, 55), (48, 27, 27)),
    "conv2": ((48, 27, 27), (128, 27, 27), (128, 13, 13)),
    "conv3": ((256, 13, 13), (192, 13, 13), (192, 13, 13)),
    "conv4": ((192, 13, 13), (192, 13, 13), (192, 13, 13)),
    "conv5": ((192, 13, 13), (128, 13, 13), (128, 6, 6)),
    "fc6": ((9216,), (2048,), (2048,)),
    "fc7": ((4096,), (2048,), (2048,)),
    "fc8": ((4096,), (500,), (500,)),
}


@pytest.fixture(scope="module")
def full() -> AlexNet:
    return AlexNet()


def narrow(**options: int) -> AlexNet:
    return AlexNet(classes=options.pop("classes", 10), width=1 / 16, **options)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 60


def test_parameters_of_the_paper(full: AlexNet) -> None:
    assert sum(value.numel() for value in full.parameters()) == 60_965_224
    state = full.column_state()
    assert len(state) == 32
    for column in "ab":
        for layer, count in PARAMETERS.items():
            own = (
                state[f"{column}.{layer}.weight"].numel() + state[f"{column}.{layer}.bias"].numel()
            )
            assert own == count


def test_shapes_of_the_running_network_are_those_of_the_table(full: AlexNet) -> None:
    seen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name, module in full.named_children():
        module.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update(
                {name: (tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))}
            )
        )
    full.eval()
    with torch.no_grad():
        assert full(images(1)).shape == (1, 1000)
    for row in build_table():
        given, made = seen[row.layer]
        own_maps = 2 if row.reads == "own" else 1
        if row.reads != "picture":
            assert given == (own_maps * row.input_shape[0], *row.input_shape[1:])
        assert made == (2 * row.output_shape[0], *row.output_shape[1:])


def test_table_has_the_published_numbers() -> None:
    rows = build_table()
    assert sum_rows(rows).parameters == 60_965_224
    assert sum_rows(rows).parameter_bytes == 4 * 60_965_224
    assert sum_rows(rows).multiply_adds == 724_406_816
    assert [(row.layer, row.column) for row in rows[:3]] == [
        ("conv1", "a"), ("conv1", "b"), ("conv2", "a")
    ]  # fmt: skip
    for row in rows:
        assert row.parameters == PARAMETERS[row.layer]
        assert 2 * row.multiply_adds == MULTIPLY_ADDS[row.layer]
        assert (row.input_shape, row.output_shape, row.final_shape) == SHAPES[row.layer]


@pytest.mark.parametrize(("classes", "width"), [(10, 0.25), (7, 1 / 16), (1000, 1 / 3)])
def test_table_follows_the_network(classes: int, width: float) -> None:
    net = AlexNet(classes=classes, width=width)
    assert sum_rows(build_table(classes, Design(width=width))).parameters == sum(
        p.numel() for p in net.parameters()
    )


def test_initial_values(full: AlexNet) -> None:
    deviations = {"conv3": 0.03, "conv4": 0.03, "conv5": 0.03}
    ones = {"conv2", "conv4", "conv5", "fc6", "fc7"}
    for key, value in full.column_state().items():
        layer = key.split(".")[1]
        if key.endswith("bias"):
            assert value.unique().tolist() == [1.0 if layer in ones else 0.0]
            continue
        expected, count = deviations.get(layer, 0.01), value.numel()
        assert value.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * count))
        assert abs(value.mean().item()) < 4 * expected / math.sqrt(count)


def test_a_narrow_network_starts_with_larger_deviations() -> None:
    weight = AlexNet(classes=10, width=0.25).get_parameter("fc6.weight")
    assert weight.std().item() == pytest.approx(0.01 / math.sqrt(0.25), rel=0.01)


def test_columns_and_seeds_differ() -> None:
    state, other = narrow().column_state(), narrow(seed=1).column_state()
    assert not torch.equal(state["a.conv4.weight"], state["b.conv4.weight"])
    assert not torch.equal(state["a.conv4.weight"], other["a.conv4.weight"])
    again = narrow().column_state()
    assert all(torch.equal(value, again[key]) for key, value in state.items())


def by_hand(state: dict[str, Tensor], x: Tensor, masks: dict[str, Tensor] | None = None) -> Tensor:
    """The two columns written out, each layer of each column on its own."""

    def norm(x: Tensor) -> Tensor:
        return F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=2.0)

    def conv(name: str, x: Tensor, stride: int = 1, pad: int = 0) -> Tensor:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.relu(F.conv2d(x, weight, bias, stride=stride, padding=pad))

    def full(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def dropped(name: str, x: Tensor) -> Tensor:
        return F.relu(full(name, x)) * (0.5 if masks is None else masks[name])

    x = F.pad(x, (0, 3, 0, 3))
    pool5 = []
    pool2 = []
    for c in "ab":
        y = F.max_pool2d(norm(conv(f"{c}.conv1", x, stride=4)), 3, 2)
        pool2.append(F.max_pool2d(norm(conv(f"{c}.conv2", y, pad=2)), 3, 2))
    for c in "ab":
        y = conv(f"{c}.conv3", torch.cat(pool2, 1), pad=1)
        y = conv(f"{c}.conv5", conv(f"{c}.conv4", y, pad=1), pad=1)
        pool5.append(F.max_pool2d(y, 3, 2))
    y = torch.cat(pool5, 1).flatten(1)
    y = torch.cat([dropped(f"{c}.fc6", y) for c in "ab"], 1)
    y = torch.cat([dropped(f"{c}.fc7", y) for c in "ab"], 1)
    return torch.cat([full(f"{c}.fc8", y) for c in "ab"], 1)


def test_forward_is_the_network_written_out() -> None:
    net = narrow().double().eval()
    x = images().double()
    with torch.no_grad():
        torch.testing.assert_close(net(x), by_hand(net.column_state(), x), rtol=1e-10, atol=1e-12)
        odd = narrow(classes=7).double().eval()
        expected = by_hand(odd.column_state(), x)
        assert expected.shape == (2, 8)
        torch.testing.assert_close(odd(x), expected[:, :7], rtol=1e-10, atol=1e-12)


def test_training_masks_units_and_does_not_rescale() -> None:
    net = narrow().double().train()
    x = images().double()
    net.set_position(4)
    kept: dict[str, Tensor] = {}
    hooks = [
        net.get_submodule(f"fc{n + 1}").register_forward_pre_hook(
            lambda _, inputs, n=n: kept.update({f"fc{n}": inputs[0].detach().clone()})
        )
        for n in (6, 7)
    ]
    with torch.no_grad():
        logits = net(x)
        for hook in hooks:
            hook.remove()
        masks = {}
        for name, values in kept.items():
            assert 0.3 < (values == 0).double().mean().item() < 0.7
            for column, half in zip("ab", values.chunk(2, 1), strict=True):
                masks[f"{column}.{name}"] = (half != 0).double()
        expected = by_hand(net.column_state(), x, masks)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)


def test_masks_belong_to_samples_however_they_are_batched() -> None:
    net = narrow().train()
    x = images()

    def logits(position: int, images: Tensor) -> Tensor:
        net.set_position(position)
        with torch.no_grad():
            return net(images)

    whole = logits(7 * 2**40, x)
    assert not torch.equal(whole, logits(7 * 2**40 + 1, x))
    assert torch.equal(whole, logits(7 * 2**40, x))
    parts = [logits(7 * 2**40 + row, x[row : row + 1]) for row in range(len(x))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_training_needs_a_position() -> None:
    net = narrow().train()
    with pytest.raises(RuntimeError, match="set_position"):
        net(images())
    net.set_position(0)
    net(images())


def test_the_network_compiles_once_whatever_the_position() -> None:
    """No graph breaks, and a change of the position compiles nothing."""
    net, x = narrow().double().train(), images().double()
    from torch._dynamo.testing import CompileCounter  # here: every process of the tests collects

    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    seen = set()
    for position in (0, 1, 2, 3, 64, 255, 256, 1000, 2**31, 2**32 + 1, 2**40, 2**62):
        results = []
        for form in (compiled, net):
            net.zero_grad()
            net.set_position(position)
            logits = form(x)
            logits.logsumexp(1).sum().backward()
            gradients = {name: value.grad for name, value in net.named_parameters()}
            results.append((logits.detach(), gradients))
        (found, slopes), (expected, exact) = results
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(slopes, exact, rtol=1e-8, atol=1e-10)
        seen.add(float(found.sum()))
    assert counter.frame_count == 1
    assert len(seen) == 12


def test_the_position_is_no_part_of_the_state() -> None:
    net = narrow()
    names = set(net.state_dict())
    net.set_position(5)
    assert names == set(net.state_dict()) == set(net.values()) == set(dict(net.named_parameters()))


def test_layouts_and_images_that_need_gradients_agree() -> None:
    net = narrow().double().eval()
    x = images().double().requires_grad_()
    net(x).square().sum().backward()
    last = images().double().contiguous(memory_format=torch.channels_last).requires_grad_()
    net.to(memory_format=torch.channels_last)(last).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(last.grad, x.grad, rtol=1e-9, atol=1e-12)
    assert x.grad[:, :, 220:, 220:].any()


def test_autocast_stays_near_float32() -> None:
    net = narrow().to(memory_format=torch.channels_last).train()
    net.set_position(0)
    x = images()
    exact = net(x)
    gradients = {}
    exact.logsumexp(1).sum().backward()
    for name, value in net.named_parameters():
        assert value.grad is not None
        gradients[name], value.grad = value.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.02 * exact.norm()
    rough.float().logsumexp(1).sum().backward()
    for name, value in net.named_parameters():
        assert value.grad is not None
        assert value.grad.dtype == torch.float32
        near = F.cosine_similarity(value.grad.flatten(), gradients[name].flatten(), dim=0)
        assert near > 0.95, name


def test_state_round_trip_and_refusals() -> None:
    state = {key: value.clone() for key, value in narrow().column_state().items()}
    net = narrow(seed=9).to(memory_format=torch.channels_last)
    net.load_column_state(state)
    found = net.column_state()
    assert list(found) == list(state)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert all(value.is_contiguous() for value in found.values())

    before = {key: value.clone() for key, value in found.items()}
    bad = {key: value + 1 for key, value in state.items()}
    del bad["a.conv2.bias"]
    bad["c.conv1.weight"] = torch.zeros(1)
    bad["b.fc8.weight"] = bad["b.fc8.weight"][:-1]
    wrong = r"a\.conv2\.bias is missing, c\.conv1\.weight is not .*, b\.fc8\.weight is \[4, "
    with pytest.raises(ValueError, match=wrong):
        net.load_column_state(bad)
    assert all(torch.equal(net.column_state()[key], value) for key, value in before.items())


@pytest.mark.parametrize("width", [0.0, -1.0, 0.02])
def test_widths_without_maps_are_refused(width: float) -> None:
    with pytest.raises(ValueError, match=r"the smallest that makes sense is 0\.021"):
        AlexNet(width=width)


@pytest.mark.parametrize("width", [float("nan"), float("inf")])
def test_widths_that_are_not_finite_are_refused(width: float) -> None:
    with pytest.raises(ValueError, match=f"width is {width}; it must be finite"):
        AlexNet(width=width)


def test_smallest_width_and_two_classes_run() -> None:
    assert min(stage.outputs for stage in build_stages(1000, Design(width=1 / 48))) == 1
    net = AlexNet(classes=2, width=1 / 48).eval()
    assert net(images()).shape == (2, 2)
    with pytest.raises(ValueError, match="classes is 1"):
        AlexNet(classes=1)


@pytest.mark.parametrize("columns", [(), (1, 0), (2,), (0, 1, 2), (0,)])
def test_impossible_columns_are_refused(columns: tuple[int, ...]) -> None:
    message = "needs an exchange" if columns == (0,) else re.escape(f"columns is {columns}")
    with pytest.raises(ValueError, match=message):
        AlexNet(columns=columns)


def test_the_table_is_the_papers() -> None:
    assert [layer.maps for layer in LAYERS] == [48, 128, 192, 192, 128, 2048, 2048, None]
    assert [layer.name for layer in LAYERS if layer.reads == "both"] == [
        "conv3",
        "fc6",
        "fc7",
        "fc8",
    ]
    assert [layer.name for layer in LAYERS if "norm" in layer.then] == ["conv1", "conv2"]
    assert [layer.name for layer in LAYERS if "pool" in layer.then] == ["conv1", "conv2", "conv5"]
    assert [layer.name for layer in LAYERS if "dropout" in layer.then] == ["fc6", "fc7"]
