"""The networks of the step benchmarks, and a step of each. Needs torch alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.training.passes import Graph
from cluster.training.step import ReplicaBatch, TrainStep
from model.alexnet import AlexNet
from model.optimizer import Sgd2012
from model.schedule import Rates

Step = Callable[[int, Tensor, Tensor, torch.dtype], None]
"""Take training step number n on images [b, 3, 224, 224] and labels [b], computing in a dtype."""


class ColumnNorm(nn.Module):
    """torch's own local response normalization, on each column's maps."""

    def __init__(self) -> None:
        """Take the constants of the paper."""
        super().__init__()
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)

    def forward(self, x: Tensor) -> Tensor:
        """Take [b, 2 * maps, h, w]."""
        return torch.cat([self.norm(own) for own in x.chunk(2, dim=1)], dim=1)


def plain_alexnet(classes: int = 1000, width: float = 1.0) -> nn.Sequential:
    """Return the paper's network in plain torch: two columns by grouped convolutions."""

    def n(maps: int) -> int:
        return 2 * round(maps / 2 * width)

    return nn.Sequential(
        nn.ZeroPad2d((0, 3, 0, 3)),
        nn.Conv2d(3, n(96), 11, stride=4),
        nn.ReLU(inplace=True),
        ColumnNorm(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(n(96), n(256), 5, padding=2, groups=2),
        nn.ReLU(inplace=True),
        ColumnNorm(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(n(256), n(384), 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(n(384), n(384), 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(n(384), n(256), 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Flatten(),
        nn.Linear(36 * n(256), n(4096)),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(n(4096), n(4096)),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(n(4096), classes),
    )


def torchvision_alexnet(classes: int = 1000) -> nn.Module:
    """Return torchvision's AlexNet, which is another network: one column, no normalization.

    Raises:
        ImportError: torchvision is not there, or not one for this torch.
    """
    try:
        net: nn.Module = importlib.import_module("torchvision.models").alexnet(num_classes=classes)
    except Exception as error:  # one for another torch fails in many ways
        raise ImportError(f"no torchvision: {type(error).__name__}: {error}") from error
    return net


def eager_step(net: nn.Module) -> Step:
    """Return the step of the usual training loop."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step(number: int, images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def duet_step(
    net: AlexNet,
    call: Callable[[Tensor], Tensor] | None = None,
    graph: Callable[..., Graph] | None = None,
) -> Step:
    """Return the trainer's own step, at a low rate.

    Args:
        net: the network.
        call: what to call for its forward pass, if not the network itself: a compiled form.
        graph: `CudaGraph`, if steps are to be replayed; if they cannot be, the step raises.
    """
    optimizer, rates = Sgd2012(net.named_parameters()), Rates(1e-3, 2e-3)
    made: dict[torch.dtype, TrainStep] = {}

    def step(number: int, images: Tensor, labels: Tensor, dtype: torch.dtype) -> None:
        if dtype not in made:
            made[dtype] = TrainStep(net, optimizer, dtype, call=call, graph=graph, warn=refuse)
        whole = torch.ones(len(labels), device=images.device)
        batch = ReplicaBatch(images, labels, whole, torch.zeros_like(whole), len(labels))
        made[dtype](batch, number * len(labels), rates)

    return step


def refuse(line: str) -> None:
    """Raise an error for a warning of the trainer's step.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(line)
