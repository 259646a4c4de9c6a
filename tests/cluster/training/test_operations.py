"""Operations of a whole step, as a GPU would launch them, counted on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.training.step import ReplicaBatch, TrainStep
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from model.schedule import Rates
from tests.helpers.gpu_interpreter import interpret_kernels

MOST_OPERATIONS = 106
MOST_KERNELS = 128
IMAGES = 2
NO_LAUNCH = {
    "_local_scalar_dense", "_unsafe_view", "alias", "detach", "empty", "empty_like",
    "empty_strided", "lift_fresh", "new_empty", "new_empty_strided",
}  # fmt: skip
"""Operations that launch nothing, besides views."""
KERNELS = {
    "_fused_sgd_": 3,  # 320 blocks of 65,536 numbers each
    "constant_pad_nd": 2,  # zeros and the copy; its gradient is one
    "convolution": 2,  # cuDNN's, and the bias
    "convolution_backward": 3,  # inputs, weights, bias
    "nll_loss_backward": 2,  # zeros, and a number for each label
}
"""Kernels of the operations that are more than one on a GPU, in ATen's source."""


class LaunchedOperations(TorchDispatchMode):
    """Records what torch dispatches, forward and backward: names of operations that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        is_view = any(
            argument.alias_info is not None and not argument.alias_info.is_write
            for argument in function._schema.arguments
        )
        if not is_view and name not in NO_LAUNCH:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_has_few_operations() -> None:
    """Forward, loss, error, backward and update of float16 images in bfloat16, both columns."""
    net = AlexNet(classes=10, width=1 / 16)
    step = TrainStep(net, Sgd2012(net.named_parameters()), torch.bfloat16)
    images = torch.ones(IMAGES, 3, 224, 224, dtype=torch.float16)
    rows = torch.ones(IMAGES)
    check: Callable[..., object] = lambda *_: None  # noqa: E731
    for number in range(2):
        batch = ReplicaBatch(images, rows.long(), rows, rows, IMAGES * (number + 1))
        with interpret_kernels(runs=False) as ours, LaunchedOperations() as theirs:
            step(batch, IMAGES * number, Rates(0.01, 0.02), check)
    assert sorted(ours) == ["dropout"] * 4 + ["pool_backward"] * 3 + ["pool_forward"] * 3
    operations = [*ours, *theirs.names]
    assert len(operations) <= MOST_OPERATIONS, operations
    assert sum(KERNELS.get(name, 1) for name in operations) <= MOST_KERNELS, operations
