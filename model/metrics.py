"""Testing as in the paper (section 4.1): one view or ten, mean softmax, top-1 and top-5 errors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CROP = 224
# Corners (top, left) of the crops of a 256 x 256 image, in the original's order
# (convdata_jpeg.py).
_CORNERS = ((0, 0), (0, 32), (16, 16), (32, 0), (32, 32))

_SHARE = 2.0**30


def ten_views(images: Tensor) -> Tensor:
    """The four corners and the centre of each image, then the mirror images of the five.

    Args:
        images: [b, 3, 256, 256], any dtype.

    Returns:
        [b, 10, 3, 224, 224].

    Raises:
        ValueError: images of another size.
    """
    return torch.stack(list(_views(images, 10)), dim=1)


def _views(images: Tensor, views: int) -> Iterator[Tensor]:
    """One view after the other, each [b, 3, 224, 224]."""
    if views not in (1, 10):
        raise ValueError(f"views is {views}; it is 1 (centre) or 10 (corners, centre, mirrored)")
    sizes = {(256, 256), (CROP, CROP)} if views == 1 else {(256, 256)}
    if images.dim() != 4 or tuple(images.shape[2:]) not in sizes:
        known = " or ".join(f"[b, 3, {h}, {w}]" for h, w in sorted(sizes))
        raise ValueError(f"{views} views need images {known}, not {list(images.shape)}")
    if views == 1:
        edge = (images.shape[2] - CROP) // 2
        yield images[:, :, edge : edge + CROP, edge : edge + CROP]
        return
    for mirrored in (False, True):
        for top, left in _CORNERS:
            crop = images[:, :, top : top + CROP, left : left + CROP]
            yield crop.flip(-1) if mirrored else crop


@torch.no_grad()
def average_views(
    net: nn.Module, images: Tensor, views: int = 1, mean: Tensor | None = None
) -> Tensor:
    """Class probabilities of images: the mean of the softmax outputs over the views.

    The network is put in evaluation mode for the purpose and left in the mode it was in.

    Args:
        net: [b, 3, 224, 224] -> logits [b, classes]. In a pair both ranks call this, with the same
            images.
        images: [b, 3, 256, 256]; for one view also [b, 3, 224, 224], the centre cut out already.
        views: 1 or 10.
        mean: [3, 224, 224] to subtract from every view: the mean image of the training set, if
            that is what the network was trained with. The original subtracts its centre from
            views of the corners and mirrored views, too (convdata_jpeg.py).

    Returns:
        float32 [b, classes], rows sum to 1.

    Raises:
        ValueError: another number of views, or images of the wrong size.
    """
    was_training = net.training
    net.eval()
    try:
        # one view at a time: a tenth of the memory of all views in one batch, and no slower
        outputs = [
            torch.softmax(net(view if mean is None else view - mean).float(), dim=1)
            for view in _views(images, views)
        ]
    finally:
        net.train(was_training)
    return torch.stack(outputs).mean(0)


def count_errors(probabilities: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """How many images have their class neither first nor among the first five.

    Ties as in the original (src/layer_kernels.cu): where n classes, the right one among them, are
    level for fewer than n places, the image counts as right to the share places / n, which is
    what drawing lots gives on average. A row with a NaN in it is wrong.

    Shares are rounded to 2**-30 of an image: so counts of many batches add up without rounding,
    and to the same number however the images were dealt out to batches and processes.

    Args:
        probabilities: float [b, classes], or anything that ranks the classes.
        labels: int64 [b].
        weights: float [b]; 0 for rows that only pad the batch.

    Returns:
        weighted counts of top-1 and top-5 errors (top-n with n < 5 classes: none), float64 scalars.
    """
    own = probabilities.gather(1, labels[:, None])
    ahead = (probabilities > own).sum(1)
    level = (probabilities == own).sum(1)
    broken = probabilities.isnan().any(1)

    def wrong(places: int) -> Tensor:
        right = ((places - ahead).double() / level.clamp(min=1)).clamp(0.0, 1.0)
        right = (right * _SHARE).round() / _SHARE
        return ((1.0 - right.masked_fill(broken, 0.0)) * weights).sum()

    return wrong(1), wrong(min(5, probabilities.shape[1]))


def sum_metrics(probabilities: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """What errors and loss of many batches are summed up from.

    Args:
        probabilities: float32 [b, classes].
        labels: int64 [b].
        weights: float [b]; 0 for rows that do not count.

    Returns:
        float64 [4], weighted sums over the batch: -log of the probability of the right class
        (capped at 87, where float32 ends), top-1 errors and top-5 errors as `errors` counts them,
        and the weights.
    """
    top1, top5 = count_errors(probabilities, labels, weights)
    chosen = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
    loss = (F.nll_loss(chosen, labels, reduction="none") * weights).sum()
    return torch.stack((loss.double(), top1, top5, weights.sum().double()))
