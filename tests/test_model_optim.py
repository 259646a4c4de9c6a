"""The update rule against a recurrence by hand; the schedule against the original's rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.alexnet import AlexNet
from model.optim import Sgd2012, learning_rates


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

    return {"conv1.weight": normal(3, 2), "conv1.bias": normal(3), "fc8.weight": normal(4)}


def give_gradients(named: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for value in named.values():
        value.grad = torch.randn(value.shape, generator=generator, dtype=torch.float64)


def test_rule_of_section_5() -> None:
    named = parameters()
    optimiser = Sgd2012(named.items())
    expected = {n: [float(x) for x in v.detach().flatten()] for n, v in named.items()}
    speeds = {n: [0.0] * len(v) for n, v in expected.items()}
    for step, (lr, lr_bias) in enumerate([(0.01, 0.02)] * 3 + [(0.001, 0.02)] * 3):
        give_gradients(named, step)
        optimiser.step(lr, lr_bias)
        for name, value in named.items():
            assert value.grad is not None
            for i, g in enumerate(value.grad.flatten().tolist()):
                rate, decay = (lr_bias, 0.0) if name.endswith("bias") else (lr, 0.0005)
                w = expected[name][i]
                speeds[name][i] = 0.9 * speeds[name][i] - decay * rate * w - rate * g
                expected[name][i] = w + speeds[name][i]
    for name, value in named.items():
        torch.testing.assert_close(
            value.detach().flatten().tolist(), expected[name], rtol=1e-14, atol=1e-15
        )
        torch.testing.assert_close(
            optimiser.velocities[name].flatten().tolist(), speeds[name], rtol=1e-13, atol=1e-15
        )


def test_differs_from_torchs_sgd_only_after_a_drop_of_the_rate() -> None:
    ours, theirs = parameters(), parameters()
    optimiser = Sgd2012(ours.items())
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
        optimiser.step(lr, lr)
        reference.step()
        return max((ours[n] - theirs[n]).abs().max().item() for n in ours)

    assert max(step(i, 0.01) for i in range(10)) < 1e-14
    # the speed built up at the old rate carries on here; there it is cut to a tenth at once
    assert step(10, 0.001) > 1e-3


def test_parameters_without_gradient_stay() -> None:
    named = parameters()
    give_gradients(named, 0)
    named["fc8.weight"].grad = None
    before = named["fc8.weight"].detach().clone()
    optimiser = Sgd2012(named.items())
    optimiser.step(0.01, 0.02)
    assert torch.equal(named["fc8.weight"].detach(), before)
    optimiser.zero_grad()
    assert all(value.grad is None for value in named.values())


def test_velocities_travel_under_the_keys_of_the_weights() -> None:
    net = AlexNet(classes=5, width=1 / 16)
    optimiser = Sgd2012(net.named_parameters())
    for value in net.parameters():
        value.grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(3))
    optimiser.step(0.01, 0.02)
    state = {key: value.clone() for key, value in optimiser.column_state(net).items()}
    assert state.keys() == net.column_state().keys()
    assert torch.equal(
        torch.cat((state["a.conv2.weight"], state["b.conv2.weight"])),
        optimiser.velocities["conv2.weight"],
    )
    other = Sgd2012(net.named_parameters())
    other.load_column_state(net, state)
    assert all(torch.equal(other.velocities[n], v) for n, v in optimiser.velocities.items())
    del state["b.fc7.bias"]
    with pytest.raises(ValueError, match=r"b\.fc7\.bias is missing"):
        other.load_column_state(net, state)


@pytest.mark.parametrize(
    ("progress", "weights", "biases"),
    [
        # layer-params-170: .01 .001587 .000252 .00004 in equal quarters, .02 and .002 in halves;
        # the end of a stretch belongs to it (lr.cu)
        (0.0, 0.01, 0.02),
        (0.25, 0.01, 0.02),
        (0.2500001, 0.001587, 0.02),
        (0.5, 0.001587, 0.02),
        (0.6, 0.000252, 0.002),
        (0.75, 0.000252, 0.002),
        (0.8, 0.00004, 0.002),
        (1.0, 0.00004, 0.002),
    ],
)
def test_schedule_of_network_170(progress: float, weights: float, biases: float) -> None:
    assert learning_rates(progress, 0.01) == pytest.approx((weights, biases), rel=1e-3)


def test_one_stretch_is_a_constant_rate() -> None:
    for progress in (0.0, 0.3, 1.0):
        rates = learning_rates(progress, 0.005, bias_factor=3, drops=1, bias_drops=1)
        assert rates == pytest.approx((0.005, 0.015), rel=1e-12)


def test_schedule_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match=r"progress is 1\.5"):
        learning_rates(1.5, 0.01)
    with pytest.raises(ValueError, match="progress is nan"):
        learning_rates(float("nan"), 0.01)
    with pytest.raises(ValueError, match="at least 1"):
        learning_rates(0.5, 0.01, drops=0)
