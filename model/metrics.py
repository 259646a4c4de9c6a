"""Testing as in the paper (section 4.1): one view or ten, mean softmax, top-1 and top-5 errors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CROP = 224
# Top and left of the crops, in halves of what an image is larger, in the original's order
# (convdata_jpeg.py).
_CORNERS = ((0, 0), (0, 2), (1, 1), (2, 0), (2, 2))
_SHARE = 2.0**30


def _cut_views(images: Tensor, views: int, crop: int) -> Iterator[Tensor]:
    """One view of all images after the other, each [b, 3, crop, crop].

    One view is the center; ten are the corners and the center, then the same five mirrored.
    """
    if views not in (1, 10):
        raise ValueError(f"views is {views}; it is 1 (centre) or 10 (corners, centre, mirrored)")
    side = images.shape[-1]
    if images.dim() != 4 or images.shape[2] != side or side < crop + (views == 10):
        least = f"more than {crop}" if views == 10 else f"at least {crop}"
        raise ValueError(
            f"{views} views need square images of {least} pixels, not {list(images.shape)}"
        )
    corners = _CORNERS if views == 10 else ((1, 1),)
    for is_mirrored in (False, True)[: 1 + (views == 10)]:
        for top, left in ([(side - crop) * half // 2 for half in one] for one in corners):
            view = images[:, :, top : top + crop, left : left + crop]
            yield view.flip(-1) if is_mirrored else view


@torch.no_grad()
def average_views(
    net: nn.Module,
    images: Tensor,
    views: int = 1,
    mean: Tensor | None = None,
    crop: int = CROP,
) -> Tensor:
    """Class probabilities of images: the mean of the softmax outputs over the views.

    The network computes in evaluation mode and is left in the mode it was in.

    Args:
        net: [b, 3, crop, crop] -> logits [b, classes]. In a pair both ranks call this, with the
            same images.
        images: [b, 3, side, side], 256 in the paper; for one view perhaps the center alone.
        views: 1 (the center) or 10 (four corners and the center, and those mirrored).
        mean: [3, crop, crop] to subtract from every view: the mean image of the training set, if
            the network was trained with it. The original subtracts its center from views of the
            corners and mirrored views, too (convdata_jpeg.py).
        crop: side of a view in pixels.

    Returns:
        float32 [b, classes], rows sum to 1.

    Raises:
        ValueError: another number of views, or images of the wrong size.
    """
    was_training = net.training
    net.eval()
    try:
        # One view at a time: a tenth of the memory of all views in one batch, and no slower.
        outputs = [
            torch.softmax(net(view if mean is None else view - mean).float(), dim=1)
            for view in _cut_views(images, views, crop)
        ]
    finally:
        net.train(was_training)
    return torch.stack(outputs).mean(0)


def count_errors(probabilities: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Number of images whose class is not ranked first, and not among the first five.

    Ties as in the original (src/layer_kernels.cu): where n classes, the right one among them, are
    level for fewer than n places, the image counts as right to the share places / n, which is
    the mean over random orders. A row with a NaN in it is wrong.

    Shares are rounded to 2**-30 of an image: so counts of many batches add up without rounding,
    and to the same number however the images were split into batches and processes.

    Args:
        probabilities: float [b, classes], or anything that ranks the classes.
        labels: int64 [b].
        weights: float [b]; 0 for rows that only pad the batch.

    Returns:
        Weighted counts of top-1 and top-5 errors (top-n with n < 5 classes: none), float64 scalars.
    """
    own = probabilities.gather(1, labels[:, None])
    above = (probabilities > own).sum(1)
    level = (probabilities == own).sum(1)
    has_nan = probabilities.isnan().any(1)

    def count_wrong(places: int) -> Tensor:
        right = ((places - above).double() / level.clamp(min=1)).clamp(0.0, 1.0)
        right = round_shares(right)
        return ((1.0 - right.masked_fill(has_nan, 0.0)) * weights).sum()

    return count_wrong(1), count_wrong(min(5, probabilities.shape[1]))


def round_shares(values: Tensor) -> Tensor:
    """Round to 2**-30, as float64: sums of them, below 2**23, are exact in any order."""
    return (values.double() * _SHARE).round() / _SHARE


def count_top1_errors(probabilities: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The first count of `count_errors`, which is all that a training logs, in ten operations.

    A third of what both counts take: each is a launch on a GPU, in every step. Arguments as there.
    """
    is_first = probabilities == probabilities.amax(1, keepdim=True)  # nowhere in a row with a NaN
    level = is_first.sum(1, dtype=torch.float64).clamp(min=1.0)
    right = is_first.gather(1, labels[:, None])[:, 0] / level
    # float64 has no finer steps than 2**-30 up there: the sum is rounded as in `count_errors`.
    far = 2.0**52 / _SHARE
    return ((1.0 + far - (right + far)) * weights).sum()


def sum_metrics(probabilities: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Loss, errors and number of images of a batch, to be added over batches and divided once.

    Args:
        probabilities: float32 [b, classes].
        labels: int64 [b].
        weights: float [b]; 0 for rows that do not count.

    Returns:
        float64 [4], weighted sums over the batch: -log of the probability of the right class
        (capped at 87, where float32 ends), top-1 errors and top-5 errors as `count_errors` counts
        them, and the weights.
    """
    top1, top5 = count_errors(probabilities, labels, weights)
    logs = probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
    loss = (F.nll_loss(logs, labels, reduction="none") * weights).sum()
    return torch.stack((loss.double(), top1, top5, weights.sum().double()))
