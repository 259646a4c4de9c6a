"""Finds the layer that made a loss non-finite, and the checkpoint to resume from.

The loss is looked at after the backward pass was launched and before the update: the weights are
still those that produced it, so the forward pass can be repeated and watched.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.run.folder import CHECKPOINTS, list_checkpoints
from cluster.training.components import Training
from cluster.training.passes import compute_logits
from cluster.training.precision import compute_dtype
from model.alexnet import AlexNet
from pipeline.tools.errors import DuetError


class NotFinite(DuetError):
    """The loss is NaN or infinite; the message begins with `START`."""

    START = "the loss of step "
    """A study recognizes a run that diverged by this in its log."""


def check_finite(t: Training, loss: float, images: Tensor, step: int) -> None:
    """Raise if the loss of a step is not finite; both columns of a pair call this together.

    Args:
        t: the training; its network is as it was when it computed the loss, in mode and weights.
        loss: the loss.
        images: floating [b, 3, h, w]; images that the loss was computed from.
        step: number of the step.

    Raises:
        NotFinite: the loss is not; the message names step, layer, and the checkpoint.
    """
    if math.isfinite(loss):
        return
    found = find_first_not_finite(t, images)
    if t.mesh.pair is not None:  # name the column whose layer broke first
        both: list[Any] = [None, None]
        dist.all_gather_object(both, found, group=t.mesh.pair)
        found = min((index, f"column {'ab'[c]}, {text}") for c, (index, text) in enumerate(both))
    good = next(iter(list_checkpoints(t.run / CHECKPOINTS)), None)
    last = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    raise NotFinite(
        f"{NotFinite.START}{step} is {loss}: {found[1]}; {last}; "
        "lower the rate (--lr with a new --run, or RUN/rates.toml from that checkpoint on)"
    )


def find_first_not_finite(t: Training, images: Tensor) -> tuple[int, str]:
    """Repeat the forward pass and find the first layer whose output is not finite.

    Returns:
        index of the layer (-1: the images; one past the last layer: none), and a description.
    """
    names = [stage.layer.name for stage in t.net.stages]
    seen: list[tuple[int, str]] = []
    if not images.isfinite().all():
        return -1, "the images themselves are not finite"

    def watch(name: str, x: Tensor) -> None:
        if not seen and not x.isfinite().all():
            seen.append((names.index(name), _describe_layer(t.net, name, x)))

    with torch.no_grad():
        compute_logits(
            partial(t.net, watch=watch), images, compute_dtype(t.config.dtype, t.mesh.device)
        )
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
