"""The update rule against a recurrence by hand; the means per layer against sums in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.alexnet import AlexNet
from model.optimizer import Sgd2012, compute_layer_statistics, compute_norm
from model.schedule import Rates

SHAPES = {"conv1.weight": (3, 2), "conv1.bias": (3,), "fc8.weight": (2, 2), "fc8.bias": (2,)}


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(*shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for value in named.values():
        value.grad = torch.randn(value.shape, generator=generator).to(value.dtype)


class ByHand:
    """The rule of section 5 and of the source's src/weights.cu, a number at a time, in double."""

    def __init__(self, named: dict[str, nn.Parameter], momentum: float = 0.9) -> None:
        self.momentum = momentum
        self.values = {n: [float(x) for x in v.detach().flatten()] for n, v in named.items()}
        self.speeds = {n: [0.0] * len(v) for n, v in self.values.items()}

    def step(self, named: dict[str, nn.Parameter], rates: Rates) -> None:
        for name, value in named.items():
            if value.grad is None:
                continue
            layer, kind = name.split(".")
            pair = rates.layers.get(layer, (rates.weights, rates.biases))
            rate, decay = (pair[1], 0.0) if kind == "bias" else (pair[0], 0.0005)
            if rate == 0:  # if (... && _lrs->getBaseRate() > 0)
                continue
            for i, g in enumerate(value.grad.flatten().tolist()):
                w = self.values[name][i]
                v = self.momentum * self.speeds[name][i] - decay * rate * w - rate * g
                self.speeds[name][i] = v
                self.values[name][i] = w + v

    def check(self, named: dict[str, nn.Parameter], optimizer: Sgd2012, atol: float) -> None:
        for name, value in named.items():
            for mine, theirs in (
                (value.detach(), self.values[name]),
                (optimizer.velocities[name], self.speeds[name]),
            ):
                assert mine.flatten().tolist() == pytest.approx(theirs, rel=0, abs=atol), name


rate = st.sampled_from([0.0, 1e-5, 1e-4, 0.001, 0.01, 0.02, 0.3])
schedule = st.builds(
    Rates,
    rate,
    rate,
    st.dictionaries(st.sampled_from(["conv1", "fc8"]), st.tuples(rate, rate), max_size=2),
)


@settings(max_examples=60, deadline=None)
@given(
    rates=st.lists(st.tuples(schedule, st.integers(1, 6)), min_size=1, max_size=6),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_rule_of_section_5_through_drops_own_rates_freezing_and_thawing(
    rates: list[tuple[Rates, int]], momentum: float
) -> None:
    named = parameters()
    optimizer, oracle = Sgd2012(named.items(), momentum), ByHand(named, momentum)
    step = 0
    for of_step, times in rates:
        for _ in range(times):
            give_gradients(named, step)
            optimizer.step(of_step)
            oracle.step(named, of_step)
            step += 1
    oracle.check(named, optimizer, atol=2e-14)


class LarsByHand:
    """Algorithm 1 of You, Gitman, Ginsburg 2017, a number at a time, in double, by column."""

    def __init__(self, named: dict[str, nn.Parameter], columns: int) -> None:
        self.columns = columns
        self.values = {n: v.detach().double().tolist() for n, v in named.items()}
        self.speeds = {n: torch.zeros_like(v).tolist() for n, v in named.items()}

    def step(self, named: dict[str, nn.Parameter], rates: Rates, decay: dict[str, float]) -> None:
        for name, value in named.items():
            assert value.grad is not None
            rows, own = self.values[name], self.speeds[name]
            given = value.grad.double().tolist()
            if name.endswith("bias"):
                for i, g in enumerate(given):
                    own[i] = 0.9 * own[i] - rates.get(name) * g
                    rows[i] += own[i]
                continue
            size = len(rows) // self.columns
            beta = decay[name.partition(".")[0]]
            for start in range(0, len(rows), size):
                part = range(start, start + size)
                w = math.sqrt(sum(x * x for i in part for x in rows[i]))
                g = math.sqrt(sum(x * x for i in part for x in given[i]))
                local = 0.001 * w / (g + beta * w) if w and g else 1.0
                for i in part:
                    for j in range(len(rows[i])):
                        slope = given[i][j] + beta * rows[i][j]
                        own[i][j] = 0.9 * own[i][j] - rates.get(name) * local * slope
                        rows[i][j] += own[i][j]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-5)])
def test_lars_is_its_papers_algorithm_in_each_column(dtype: torch.dtype, bound: float) -> None:
    named = parameters(dtype) | {"fc7.weight": nn.Parameter(torch.zeros(4, 3, dtype=dtype))}
    named["conv1.weight"] = nn.Parameter(
        torch.randn(6, 2, 3, dtype=torch.float64).to(dtype)[..., 0]
    )
    oracle = LarsByHand(named, columns=2)
    optimizer = Sgd2012(named.items(), columns=2, trust=0.001, decays={"fc8": 0.02})
    decay = {"conv1": 0.0005, "fc7": 0.0005, "fc8": 0.02}
    for step, rates in enumerate((Rates(3.0, 0.02), Rates(10.0, 0.02, {"fc8": (1.0, 0.1)}))):
        for _ in range(10):
            give_gradients(named, step)
            if step == 0:  # no gradient, no factor
                named["conv1.weight"].grad[:3] = 0  # type: ignore[index]
            optimizer.step(rates)
            oracle.step(named, rates, decay)
    for name, value in named.items():
        expected = torch.tensor(oracle.values[name], dtype=torch.float64)
        torch.testing.assert_close(value.detach().double(), expected, rtol=bound, atol=bound)
    assert named["fc7.weight"].abs().max() > 1e-3  # zeros would never move by a factor of |w|


def test_norms_have_the_same_bits_with_any_number_of_threads() -> None:
    x = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    threads, found = torch.get_num_threads(), set()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.add(float(compute_norm(x)))
    torch.set_num_threads(threads)
    (norm,) = found
    assert norm == pytest.approx(math.sqrt(math.fsum(v * v for v in x.tolist())), rel=1e-14)
    assert float(compute_norm(torch.zeros(0))) == 0.0


RUN = [
    (Rates(0.01, 0.02), 20),
    (Rates(0.001, 0.02), 20),
    (Rates(0.0001, 0.002, {"conv1": (0.00001, 0.002)}), 20),
    (Rates(0.0001, 0.002, {"conv1": (0.0, 0.0), "fc8": (0.01, 0.02)}), 20),
    (Rates(0.001, 0.002), 20),
]
"""Drops, one layer slowed, frozen and thawed, one faster."""


def test_float32_stays_close_to_float64_through_a_run() -> None:
    named = parameters(torch.float32)
    optimizer, oracle = Sgd2012(named.items()), ByHand(named)
    for number, rates in enumerate(rates for rates, times in RUN for _ in range(times)):
        give_gradients(named, number)
        optimizer.step(rates)
        oracle.step(named, rates)
    # Values are up to 4 or so: each of 100 additions rounds by at most 2**-23.
    oracle.check(named, optimizer, atol=100 * 2**-23)


def test_a_frozen_layer_is_left_alone_and_thaws_with_the_speed_it_had() -> None:
    named = parameters()
    optimizer = Sgd2012(named.items())
    give_gradients(named, 0)
    optimizer.step(Rates(0.01, 0.02))
    start = named["conv1.weight"].detach().clone()
    speed = optimizer.velocities["conv1.weight"].clone()
    other = named["conv1.bias"].detach().clone()
    for step in range(1, 20):
        give_gradients(named, step)
        optimizer.step(Rates(0.01, 0.02, {"conv1": (0.0, 0.02)}))  # as its epoch 72: weights alone
    assert torch.equal(named["conv1.weight"].detach(), start)
    assert torch.equal(optimizer.velocities["conv1.weight"], speed)
    assert not torch.equal(named["conv1.bias"].detach(), other)
    optimizer.step(Rates(0.01, 0.02))
    gradient = named["conv1.weight"].grad
    assert gradient is not None
    torch.testing.assert_close(
        named["conv1.weight"].detach(),
        start + 0.9 * speed - 0.01 * (gradient + 0.0005 * start),
    )


def test_differs_from_torchs_sgd_only_after_a_drop_of_the_rate() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = Sgd2012(ours.items())
    weights = [v for n, v in theirs.items() if not n.endswith("bias")]
    biases = [v for n, v in theirs.items() if n.endswith("bias")]
    reference = torch.optim.SGD(
        [{"params": weights, "weight_decay": 5e-4}, {"params": biases}], lr=0.01, momentum=0.9
    )

    def step(count: int, lr: float) -> float:
        for group in reference.param_groups:
            group["lr"] = lr
        give_gradients(ours, count)
        give_gradients(theirs, count)
        optimizer.step(Rates(lr, lr))
        reference.step()
        return max((ours[n] - theirs[n]).abs().max().item() for n in ours)

    assert max(step(i, 0.01) for i in range(10)) < 1e-14
    # the speed built up at the old rate carries on here; there it is cut to a tenth at once
    assert step(10, 0.001) > 1e-3


def test_parameters_without_gradient_stay_and_gradients_are_not_touched() -> None:
    named = parameters()
    give_gradients(named, 0)
    named["fc8.weight"].grad = None
    before = named["fc8.weight"].detach().clone()
    gradient = named["conv1.weight"].grad
    assert gradient is not None
    kept = gradient.clone()
    optimizer = Sgd2012(named.items())
    optimizer.step(Rates(0.01, 0.02))
    assert torch.equal(named["fc8.weight"].detach(), before)
    assert torch.equal(gradient, kept)
    optimizer.zero_grad()
    assert all(value.grad is None for value in named.values())


def test_a_gradient_may_lie_otherwise_in_memory_than_its_parameter() -> None:
    shape, last = (4, 3, 5, 2), torch.channels_last
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameter = nn.Parameter(value.to(memory_format=last))
    parameter.grad = torch.zeros(shape, dtype=torch.float64).copy_(gradient)
    assert parameter.stride() != parameter.grad.stride()
    Sgd2012([("conv1.weight", parameter)]).step(Rates(0.1, 0.2))
    torch.testing.assert_close(parameter.detach(), value - 0.1 * (gradient + 0.0005 * value))


def network_with_gradients(width: float = 1 / 16) -> AlexNet:
    net = AlexNet(classes=5, width=width)
    generator = torch.Generator().manual_seed(3)
    for value in net.parameters():
        value.grad = torch.randn(value.shape, generator=generator)
    return net


def test_velocities_travel_under_the_keys_of_the_weights() -> None:
    net = network_with_gradients()
    optimizer = Sgd2012(net.named_parameters())
    optimizer.step(Rates(0.01, 0.02))
    state = {key: value.clone() for key, value in optimizer.column_state(net).items()}
    assert state.keys() == net.column_state().keys()
    assert torch.equal(
        torch.cat((state["a.conv2.weight"], state["b.conv2.weight"])),
        optimizer.velocities["conv2.weight"],
    )
    # What a checkpoint holds is the v of the rule: from rest, minus rate times gradient.
    bias = net.get_parameter("conv2.bias")
    assert bias.grad is not None
    torch.testing.assert_close(
        torch.cat((state["a.conv2.bias"], state["b.conv2.bias"])), -0.02 * bias.grad
    )
    other = Sgd2012(net.named_parameters())
    other.load_column_state(net, state)
    assert all(torch.equal(other.velocities[n], v) for n, v in optimizer.velocities.items())
    del state["b.fc7.bias"]
    with pytest.raises(ValueError, match=r"b\.fc7\.bias is missing"):
        other.load_column_state(net, state)


def test_a_run_that_is_cut_at_a_drop_goes_on_to_the_bit() -> None:
    def go_on(net: AlexNet, optimizer: Sgd2012) -> dict[str, torch.Tensor]:
        for _ in range(3):
            optimizer.step(Rates(0.0007, 0.02, {"conv1": (0.0, 0.0)}))
        return net.column_state() | {
            f"v {key}": value for key, value in optimizer.column_state(net).items()
        }

    net = network_with_gradients()
    optimizer = Sgd2012(net.named_parameters())
    for _ in range(3):
        optimizer.step(Rates(0.013, 0.026))
    weights = {key: value.clone() for key, value in net.column_state().items()}
    speeds = {key: value.clone() for key, value in optimizer.column_state(net).items()}
    resumed = network_with_gradients()
    resumed.load_column_state(weights)
    new = Sgd2012(resumed.named_parameters())
    new.load_column_state(resumed, speeds)
    undisturbed, cut = go_on(net, optimizer), go_on(resumed, new)
    assert undisturbed.keys() == cut.keys()
    assert all(torch.equal(undisturbed[key], cut[key]) for key in cut)


def test_means_of_each_parameter_of_each_column() -> None:
    net = network_with_gradients(width=1 / 2)  # fc6 has 9.4 million weights: sums must not drift
    optimizer = Sgd2012(net.named_parameters())
    optimizer.step(Rates(0.01, 0.02))
    net.get_parameter("fc8.bias").grad = None
    found = compute_layer_statistics(net, optimizer)
    weights, speeds = net.column_state(), optimizer.column_state(net)
    assert found.keys() == weights.keys()
    gradients = net.split(
        {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in net.named_parameters()}
    )
    for key, means in found.items():
        for mine, tensor in zip(means, (weights[key], speeds[key], gradients[key]), strict=True):
            expected = tensor.double().abs().mean().item()
            assert mine == pytest.approx(expected, rel=1e-6), key
    assert found["a.fc8.bias"].gradient == 0.0
    assert found["a.conv1.weight"] != found["b.conv1.weight"]


def test_the_update_of_frozen_weights_is_0_though_their_velocity_waits() -> None:
    net = network_with_gradients()
    optimizer = Sgd2012(net.named_parameters())
    optimizer.step(Rates(0.01, 0.02))
    moving = compute_layer_statistics(net, optimizer)["b.conv1.weight"]
    optimizer.step(Rates(0.01, 0.02, {"conv1": (0.0, 0.02)}))
    frozen = compute_layer_statistics(net, optimizer)
    assert moving.update > 0.0
    assert frozen["b.conv1.weight"]._replace(gradient=0.0) == (moving.value, 0.0, 0.0)
    assert frozen["b.conv1.weight"].gradient == moving.gradient
    assert frozen["b.conv1.bias"].update > 0.0
    assert optimizer.velocities["conv1.weight"].any()
