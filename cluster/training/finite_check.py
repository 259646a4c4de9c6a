"""When the loss is no number any more: which layer was the first, and where to go on from.

The loss is looked at when the backward pass has been launched and before the update: weights are
then still those that made it, so the same forward pass can be made once more and watched. On a GPU
the host waits for the forward pass only, and the backward pass runs meanwhile.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.mesh import ProcessMesh
from cluster.run.folder import CHECKPOINTS, list_checkpoints
from cluster.training.precision import autocast
from model.alexnet import AlexNet
from pipeline.tools.errors import DuetError


class NotFinite(DuetError):
    """The loss is no number any more."""


def check_finite(
    loss: Tensor,
    net: AlexNet,
    images: Tensor,
    dtype: torch.dtype,
    mesh: ProcessMesh,
    step: int,
    run: Path,
) -> None:
    """Stop if the loss of a step is not finite; both columns of a pair call this alike.

    Args:
        loss: scalar, on the device.
        net: as it was when it made the loss, in the same mode and at the same step.
        images: that it made it from.
        dtype: that its layers compute in.
        mesh: of this process.
        step: number of the step.
        run: folder of the run, where the last good checkpoint is looked for.

    Raises:
        NotFinite: it is not; the message names step, layer, and the checkpoint.
    """
    value = float(loss.detach())
    if math.isfinite(value):
        return
    _, found = _of_the_pair(find_first_not_finite(net, images, dtype, mesh.device), mesh)
    good = next(iter(list_checkpoints(run / CHECKPOINTS)), None)
    last = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    raise NotFinite(
        f"the loss of step {step} is {value}: {found}; {last}; "
        "lower the rate (--lr with a new --run, or RUN/rates.toml from that checkpoint on)"
    )


def find_first_not_finite(
    net: AlexNet, images: Tensor, dtype: torch.dtype, device: torch.device
) -> tuple[int, str]:
    """Make the forward pass again and find the first layer that is not finite.

    Returns:
        its mesh in the network (behind the last layer: none is), and what was seen, in words.
    """
    names = [stage.layer.name for stage in net.stages]
    seen: list[tuple[int, str]] = []
    if not images.isfinite().all():
        return -1, "the images themselves are not finite"

    def watch(name: str, x: Tensor) -> None:
        if not seen and not x.isfinite().all():
            seen.append((names.index(name), _words(net, name, x)))

    with torch.no_grad(), autocast(dtype, device):
        net(images.float(), watch)
    return seen[0] if seen else (len(names), "all layers are finite, but their logits too large")


def _words(net: AlexNet, name: str, x: Tensor) -> str:
    share = 1 - float(x.isfinite().float().mean())
    told = f"{name} is the first layer whose output is not finite ({share:.1%} of it)"
    for kind in ("weight", "bias"):
        values = net.get_parameter(f"{name}.{kind}")
        if not values.isfinite().all():
            return f"{told}, its {kind} is not either, since the update before"
    largest = float(net.get_parameter(f"{name}.weight").abs().max())
    return f"{told}, its weights are, the largest is {largest:.3g}"


def _of_the_pair(found: tuple[int, str], mesh: ProcessMesh) -> tuple[int, str]:
    """What the column says that broke first."""
    if mesh.pair is None:
        return found
    both: list[tuple[int, str] | None] = [None, None]
    dist.all_gather_object(both, found, group=mesh.pair)
    told = [(one[0], f"column {'ab'[index]}, {one[1]}") for index, one in enumerate(both) if one]
    return min(told)
