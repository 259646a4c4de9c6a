"""The update rule of the paper (section 5) and the learning rates of the original source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from model.alexnet import AlexNet


class Sgd2012:
    """Stochastic gradient descent with momentum, the learning rate inside the velocity.

        weights:  v <- momentum * v - weight_decay * lr * w - lr * gradient;   w <- w + v
        biases:   v <- momentum * v - lr_bias * gradient;                      b <- b + v

    `torch.optim.SGD` multiplies the velocity by the rate afterwards: the same as long as the rate
    stays, but a drop of it then cuts at once the speed that here runs on for some ten steps.
    Gradients are means over the batch (the original divides by its size in src/layer.cu).

    Args:
        named_parameters: (name, parameter) pairs; a name that ends in "bias" makes it a bias.
        momentum: share of the velocity kept in a step, in [0, 1).
        weight_decay: as in the rule; biases have none.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        self.momentum = momentum
        self.weight_decay = weight_decay
        self._parameters = dict(named_parameters)
        self.velocities = {name: torch.zeros_like(p) for name, p in self._parameters.items()}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float, lr_bias: float) -> None:
        """Update every parameter that has a gradient.

        Args:
            lr: learning rate of the weights.
            lr_bias: learning rate of the biases.
        """
        for biases, rate, decay in ((False, lr, self.weight_decay), (True, lr_bias, 0.0)):
            names = [
                name
                for name, parameter in self._parameters.items()
                if name.endswith("bias") == biases and parameter.grad is not None
            ]
            if names:
                self._update(names, rate, decay)

    def _update(self, names: list[str], rate: float, decay: float) -> None:
        values: list[Tensor] = [self._parameters[name] for name in names]
        gradients = [value.grad for value in values if value.grad is not None]
        velocities = [self.velocities[name] for name in names]
        torch._foreach_mul_(velocities, self.momentum)
        if decay:
            torch._foreach_add_(velocities, values, alpha=-decay * rate)
        torch._foreach_add_(velocities, gradients, alpha=-rate)
        torch._foreach_add_(values, velocities)

    def column_state(self, net: AlexNet) -> dict[str, Tensor]:
        """The velocities, under the keys that `net.column_state` gives the parameters."""
        return net.split(self.velocities)

    def load_column_state(self, net: AlexNet, state: Mapping[str, Tensor]) -> None:
        """Take over the velocities of `column_state`.

        Raises:
            ValueError: a key is missing or unexpected or a shape differs; nothing is changed then.
        """
        net.fill(self.velocities, state)


def learning_rates(
    progress: float,
    lr: float,
    bias_factor: float = 2.0,
    drop: float = 250.0,
    drops: int = 4,
    bias_drop: float = 10.0,
    bias_drops: int = 2,
) -> tuple[float, float]:
    """Learning rates of weights and biases: equal stretches, each with a constant rate.

    The schedule `dexp` of the original with the values of its network 170 (layer-params-170.cfg),
    which came as far on its own as the paper's network did with rates lowered by hand: .01, .0016,
    .00025, .00004 and, for biases, .02, .002.

    Args:
        progress: share of the training done, in [0, 1].
        lr: first rate of the weights.
        bias_factor: first rate of the biases, as a multiple of `lr`.
        drop: first rate of the weights over their last.
        drops: number of stretches for the weights; 1 keeps the rate constant.
        bias_drop: as `drop`, for biases.
        bias_drops: as `drops`, for biases.

    Raises:
        ValueError: progress outside [0, 1], or fewer than 1 stretch.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress is {progress}; it is the share of the training done, 0 to 1")
    return (
        _stretch_rate(progress, lr, drop, drops),
        _stretch_rate(progress, lr * bias_factor, bias_drop, bias_drops),
    )


def _stretch_rate(progress: float, first: float, drop: float, stretches: int) -> float:
    if stretches < 1:
        raise ValueError(f"a schedule has at least 1 stretch, not {stretches}")
    if stretches == 1:
        return first
    # The end of a stretch still belongs to it, as in the original (cuda-convnet2, src/lr.cu).
    place = next(i for i in range(stretches) if progress <= (i + 1) / stretches)
    return float(first * (1.0 / drop) ** (place / (stretches - 1)))
