"""A convolution or a matrix product cut along its inputs: the half at hand first, then the other.

Own arithmetic rather than autograd's, because autograd hands out the gradients of a layer only all
at once: here the one that the other column waits for comes first. On a CPU core the two halves of
conv3, fc6, fc7 or fc8 take as long as the whole (measured at batch 128, forward and backward:
within 2 %; but conv3 forward in bfloat16 3 ms more, in a step of 780).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Halves(Protocol):
    """What a layer does with a half of its inputs, x, and the weights of that half."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output, as far as it comes from x."""
        ...

    def add(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """y, with what comes from x added in place."""
        ...

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of x, given that of the output."""
        ...

    def parameter_gradients(
        self, gradient: Tensor, first: Tensor, second: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the whole weight and of the bias, given both halves of the inputs."""
        ...


def halves_of(module: nn.Module) -> Halves:
    """The arithmetic of a layer.

    Args:
        module: an `nn.Linear`, or an `nn.Conv2d` of one group with zeros around, in numbers.

    Raises:
        TypeError: any other.
    """
    if isinstance(module, nn.Linear):
        return LinearHalves()
    if type(module) is nn.Conv2d and module.groups == 1 and not isinstance(module.padding, str):
        return ConvHalves(module.stride, module.padding, module.dilation)
    raise TypeError(f"only Linear, and Conv2d of one group, can read both columns, not {module}")


class LinearHalves:
    """[b, units] times [outputs, units]."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Halves`."""
        return F.linear(x, weight, bias)

    def add(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See `Halves`."""
        return y.addmm_(x, weight.t())

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See `Halves`."""
        return gradient @ weight

    def parameter_gradients(
        self, gradient: Tensor, first: Tensor, second: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Halves`. Joins inputs, not gradients: the weights are far larger."""
        return gradient.t() @ torch.cat((first, second), dim=1), gradient.sum(0)


@dataclass(frozen=True)
class ConvHalves:
    """[b, maps, h, w] under filters [outputs, maps, kernel, kernel]."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `Halves`."""
        return torch.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)

    def add(self, y: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See `Halves`."""
        return y.add_(self.product(x, weight, None))

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """See `Halves`."""
        return self._backward(gradient, x, weight, (True, False, False))[0]

    def parameter_gradients(
        self, gradient: Tensor, first: Tensor, second: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `Halves`. Joins gradients, not inputs: the maps are far larger."""
        weights = weight.chunk(2, dim=1)
        _, one, bias = self._backward(gradient, first, weights[0], (False, True, True))
        _, two, _ = self._backward(gradient, second, weights[1], (False, True, False))
        return torch.cat((one, two), dim=1), bias

    def _backward(
        self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, weight and bias; only those wanted are tensors."""
        biases = [weight.shape[0]]
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            gradient, x, weight, biases, self.stride, self.padding, self.dilation,
            False, (0, 0), 1, wanted,
        )  # fmt: skip
        return found
