"""The update rule of the paper (section 5), and the per-layer means that the original printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from model.alexnet import AlexNet
from model.schedule import Rates

ONE_THREAD = 8192
"""Numbers that torch sums in one thread: fewer than its grain of 32,768."""


class Sgd2012:
    """Stochastic gradient descent with momentum, the learning rate inside the velocity.

        weights:  v <- momentum * v - weight_decay * lr * w - lr * gradient;   w <- w + v
        biases:   v <- momentum * v - lr_bias * gradient;                      b <- b + v

    `torch.optim.SGD` multiplies the velocity by the rate afterwards: the same as long as the rate
    is constant, but a drop of it then cuts the speed at once, which here decays over some ten
    steps. Gradients are means over the batch (the original divides by its size in src/layer.cu).

    A parameter of rate 0 is frozen as in the original: neither value nor velocity changes, and a
    later rate above 0 resumes with that velocity (src/weights.cu, `Weights::update`).

    Args:
        named_parameters: (name, parameter) pairs; a name that ends in "bias" makes it a bias.
        momentum: factor on the velocity in a step, in [0, 1).
        weight_decay: as in the rule; biases have none.
        columns: equal pieces, along dim 0, in which parameters are updated. The last few values of
            a tensor are computed one by one, without the processor's vectors, and may be rounded
            otherwise: with 2, both columns get the bits that they get alone.
        trust: coefficient of LARS, 0 for none (You, Gitman, Ginsburg 2017, arXiv 1708.03888). The
            rate of weights is then multiplied by trust * |w| / (|gradient| + decay * |w|), with
            Euclidean norms over a layer's weights in a column; by 1 if either norm is 0. Biases and
            the scales of batch normalization keep their rates. `columns` must be their true number.
        decays: weight decay of single layers, by name, in place of `weight_decay`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        columns: int = 1,
        trust: float = 0.0,
        decays: Mapping[str, float] | None = None,
    ) -> None:
        self._columns = columns
        self._trust = trust
        self._decays = dict(decays or {})
        self.momentum = momentum
        self.weight_decay = weight_decay
        self._parameters = dict(named_parameters)
        self.velocities = {name: torch.zeros_like(p) for name, p in self._parameters.items()}
        self.updates = 0
        """Number of calls of `step`."""
        self._moved: list[str] = []

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    @torch.no_grad()
    def step(self, rates: Rates) -> None:
        """Update every parameter that has a gradient; the gradients stay as they are."""
        self.updates += 1
        groups: dict[tuple[float, float], list[str]] = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None and rates.get(name) > 0:
                layer = name.partition(".")[0]
                decay = self._decays.get(layer, self.weight_decay)
                decay = 0.0 if name.endswith("bias") else decay
                groups.setdefault((rates.get(name), decay), []).append(name)
        self._moved = [name for names in groups.values() for name in names]
        for (rate, decay), names in groups.items():
            if plain := [name for name in names if not self._is_adapted(name)]:
                self._update(plain, rate, decay)
            for name in filter(self._is_adapted, names):
                self._adapt(name, rate, decay)

    def _is_adapted(self, name: str) -> bool:
        """Return whether LARS sets the rate of a parameter."""
        is_weight = self._parameters[name].dim() > 1 and not name.endswith("bias")
        return self._trust > 0 and is_weight

    def _adapt(self, name: str, rate: float, decay: float) -> None:
        """Update one parameter by LARS; the host does not wait for the norms."""
        gradient = self._parameters[name].grad
        assert gradient is not None
        whole: tuple[Tensor, ...] = self._parameters[name], gradient, self.velocities[name]
        pieces = (self._cut([tensor]) for tensor in whole)
        for value, slope, velocity in zip(*pieces, strict=True):
            size, steepness = compute_norm(value), compute_norm(slope)
            ratio = self._trust * size / (steepness + decay * size)
            ratio = torch.where((size > 0) & (steepness > 0), ratio, torch.ones_like(ratio))
            change = torch.add(slope, value, alpha=decay).mul_((rate * ratio).to(value.dtype))
            velocity.mul_(self.momentum).sub_(change)
            value.add_(velocity)

    def _update(self, names: list[str], rate: float, decay: float) -> None:
        values = self._cut([self._parameters[name] for name in names])
        given = [g for name in names if (g := self._parameters[name].grad) is not None]
        # torch's fused update reads memory in order: with other strides it needs a copy.
        gradients = [
            gradient
            if gradient.stride() == value.stride()
            else torch.empty_like(value).copy_(gradient)
            for value, gradient in zip(values, self._cut(given), strict=True)
        ]
        velocities = self._cut([self.velocities[name] for name in names])
        if self.momentum == 0.0:  # torch keeps no velocity then
            torch._foreach_zero_(velocities)
            torch._foreach_add_(velocities, values, alpha=-decay * rate)
            torch._foreach_add_(velocities, gradients, alpha=-rate)
            torch._foreach_add_(values, velocities)
            return
        # torch: v <- momentum * v + (1 - dampening) * (gradient + decay * w);  w <- w - lr * v.
        # With lr = -1 that is the rule itself, in one pass, and the buffer is the velocity at any
        # rate: a change of the rate rescales nothing. 1 - dampening is exact to 1e-16.
        sgd(
            values,
            gradients,
            list(velocities),
            fused=True,
            lr=-1.0,
            dampening=1.0 + rate,
            weight_decay=decay,
            momentum=self.momentum,
            nesterov=False,
            maximize=False,
        )

    def _cut(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Cut tensors into the columns; as they are with 1."""
        if self._columns == 1:
            return list(tensors)
        return [own for tensor in tensors for own in tensor.chunk(self._columns)]

    def compute_updates(self) -> dict[str, Tensor]:
        """The change of each parameter in the last step: its velocity, or zeros if frozen."""
        return {
            name: velocity if name in self._moved else torch.zeros_like(velocity)
            for name, velocity in self.velocities.items()
        }

    def column_state(self, net: AlexNet) -> dict[str, Tensor]:
        """The velocities, under the same keys as the parameters in `net.column_state`."""
        return net.split(self.velocities)

    def load_column_state(self, net: AlexNet, state: Mapping[str, Tensor]) -> None:
        """Load the velocities of `column_state`.

        Raises:
            ValueError: a key is missing or unexpected or a shape differs; nothing is changed then.
        """
        net.fill(self.velocities, state)


def compute_norm(x: Tensor) -> Tensor:
    """Euclidean norm, a float64 scalar, with the same bits for any number of threads.

    Halves are added to each other until so few numbers are left that torch adds them in one thread.
    """
    squares = x.detach().flatten().double().square()
    while len(squares) > ONE_THREAD:
        half, odd = divmod(len(squares), 2)
        folded = squares[:half] + squares[half : 2 * half]
        squares = torch.cat((folded, squares[-1:])) if odd else folded
    return squares.sum().sqrt()


class Means(NamedTuple):
    """Means over a parameter, as the original printed them with every test (convnet.py)."""

    value: float
    """Mean of |w|."""
    update: float
    """Mean of |w now - w before the last step|; 0 for a frozen parameter."""
    gradient: float
    """Mean of |dL/dw|; 0 without a gradient."""


@torch.no_grad()
def compute_layer_statistics(net: AlexNet, optimizer: Sgd2012) -> dict[str, Means]:
    """Means of each parameter of each column in this process: "a.conv1.weight", ...

    Call it after a step, before the gradients are dropped. It waits for the device once.
    """
    parameters = dict(net.named_parameters())
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in parameters.items()
    }
    sums = torch.stack(
        [
            rows.sum()
            for tensors in (parameters, optimizer.compute_updates(), gradients)
            for rows in net.split({name: _sum_rows(t) for name, t in tensors.items()}).values()
        ]
    ).tolist()
    sizes = {key: piece.numel() for key, piece in net.split(parameters).items()}
    return {
        key: Means(*(total / size for total in sums[index :: len(sizes)]))
        for index, (key, size) in enumerate(sizes.items())
    }


def _sum_rows(tensor: Tensor) -> Tensor:
    """Sums of |x| over all dims but 0; a single float32 sum over millions is off by a percent."""
    if tensor.dim() == 1:
        return tensor.abs()
    return torch.linalg.vector_norm(tensor, 1, dim=tuple(range(1, tensor.dim())))
