"""Finds the layer that made a loss non-finite, and the checkpoint to resume from.

The loss is read after the backward pass was launched and before the update: the weights are still
those that produced it, so the forward pass can be repeated and watched. On a GPU the host waits for
the forward pass only, and the backward pass runs meanwhile.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.mesh import ProcessMesh
from cluster.run.folder import CHECKPOINTS, list_checkpoints
from cluster.training.precision import autocast
from model.alexnet import AlexNet
from pipeline.tools.errors import DuetError


class NotFinite(DuetError):
    """The loss is NaN or infinite."""


def check_finite(
    loss: Tensor,
    net: AlexNet,
    images: Tensor,
    dtype: torch.dtype,
    mesh: ProcessMesh,
    step: int,
    run: Path,
) -> None:
    """Raise if the loss of a step is not finite; both columns of a pair call this together.

    Args:
        loss: scalar, on the device.
        net: the network, in the same mode and with the same weights as when it computed the loss.
        images: floating [b, 3, h, w]; images that the loss was computed from.
        dtype: dtype that the layers compute in.
        mesh: mesh of this process.
        step: number of the step.
        run: run folder, where the newest checkpoint is looked up for the message.

    Raises:
        NotFinite: the loss is not; the message names step, layer, and the checkpoint.
    """
    value = float(loss.detach())
    if math.isfinite(value):
        return
    found = find_first_not_finite(net, images, dtype, mesh.device)
    if mesh.pair is not None:  # name the column whose layer broke first
        both: list[Any] = [None, None]
        dist.all_gather_object(both, found, group=mesh.pair)
        found = min((index, f"column {'ab'[c]}, {text}") for c, (index, text) in enumerate(both))
    good = next(iter(list_checkpoints(run / CHECKPOINTS)), None)
    last = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    raise NotFinite(
        f"the loss of step {step} is {value}: {found[1]}; {last}; "
        "lower the rate (--lr with a new --run, or RUN/rates.toml from that checkpoint on)"
    )


def find_first_not_finite(
    net: AlexNet, images: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[int, str]:
    """Repeat the forward pass and find the first layer whose output is not finite.

    Returns:
        index of the layer (-1: the images; one past the last layer: none), and a description.
    """
    names = [stage.layer.name for stage in net.stages]
    seen: list[tuple[int, str]] = []
    if not images.isfinite().all():
        return -1, "the images themselves are not finite"

    def watch(name: str, x: Tensor) -> None:
        if not seen and not x.isfinite().all():
            seen.append((names.index(name), _describe_layer(net, name, x)))

    with torch.no_grad(), autocast(dtype, device):
        net(images.float(), watch)
    return seen[0] if seen else (len(names), "all layers are finite, but their logits too large")


def _describe_layer(net: AlexNet, name: str, x: Tensor) -> str:
    share = 1 - float(x.isfinite().float().mean())
    text = f"{name} is the first layer whose output is not finite ({share:.1%} of it)"
    for kind in ("weight", "bias"):
        values = net.get_parameter(f"{name}.{kind}")
        if not values.isfinite().all():
            return f"{text}, its {kind} is not either, since the update before"
    largest = float(net.get_parameter(f"{name}.weight").abs().max())
    return f"{text}, its weights are, the largest is {largest:.3g}"
