"""Feature maps of chosen layers, of images that the report shows with the network's answers.

An image goes through the network as in an evaluation of one view. A map is what the next layer
reads: the layer's output after its operations, such as ReLU, normalization and pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.checkpoint.format import Checkpoint, load_checkpoint
from cluster.config import read_run_config
from cluster.report.images import (
    QUALITY,
    SHOWN_SIDE,
    AnsweredImage,
    Answers,
    MissingFigure,
    shorten_error,
    tile_images,
)
from cluster.run.folder import CONFIG
from model.alexnet import AlexNet
from model.architecture import COLUMN_NAMES
from pipeline.dataset.images import Pixels
from pipeline.remote.dataset import choose_versions, locate_dataset
from pipeline.tools.charts import encode_image
from pipeline.tools.errors import DuetError, UsageError

Floats = npt.NDArray[np.float32]

MOST_MAPS = 48
"""Most maps of a column that are drawn."""
ACROSS = 12
"""Maps in a row."""


@dataclass(frozen=True)
class ColumnMaps:
    """Sheet of the most active maps of a column."""

    name: str
    uri: str
    shown: int
    count: int
    """Maps of the column in all."""
    silent: int
    """Maps of the column that are 0 everywhere."""


@dataclass(frozen=True)
class LayerMaps:
    """Maps of a layer for one image."""

    layer: str
    side: int
    """Height and width of a map."""
    operations: str
    """Operations between the weights and the maps; "" without any."""
    columns: tuple[ColumnMaps, ...]


@dataclass(frozen=True)
class MappedImage:
    """Image with the maps of the chosen layers."""

    uri: str
    sample: int
    """Sample id in the split."""
    truth: str
    layers: tuple[LayerMaps, ...]


@dataclass(frozen=True)
class FeatureMaps:
    """Maps of all images, and the checkpoint that they are of."""

    images: tuple[MappedImage, ...]
    split: str
    step: int


def check_layers(run: Path, layers: Sequence[str]) -> None:
    """Refuse names of layers without maps.

    Raises:
        UsageError: the run has no such layer, or it is fully connected; or RUN/config.toml cannot
            be read.
    """
    config, _ = read_run_config(run / CONFIG)
    kinds = {layer.name: layer.kind for layer in config.design.rows()}
    usable = ", ".join(name for name, kind in kinds.items() if kind != "fc")
    for name in layers:
        if kinds.get(name, "fc") == "fc":
            fault = (
                "is fully connected and has no maps" if name in kinds else f"{run} does not have"
            )
            raise UsageError(f"--maps names {name}, which {fault}; it takes {usable}")


def draw_feature_maps(
    run: Path, data: str, found: Checkpoint, answers: Answers, layers: Sequence[str]
) -> FeatureMaps:
    """Return the maps of the first image of each choice, computed in float32 on the CPU.

    Args:
        run: folder of the run.
        data: the data set that was evaluated; "": the one that the run recorded.
        found: checkpoint of the network.
        answers: images with the network's answers.
        layers: names that `check_layers` accepts.

    Raises:
        MissingFigure: the images or the network cannot be read here.
    """
    firsts = {images[0].sample: images[0] for _, images in answers.groups if images}
    try:
        config, _ = read_run_config(run / CONFIG)
        net = AlexNet(classes=len(found.classes), design=config.design, initializes=False)
        load_checkpoint(found.path, net)
        crops, mean = read_crops(run, data, answers.split, list(firsts), found)
        maps = compute_maps(net, crops, layers)
    except (DuetError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise MissingFigure(f"{shorten_error(error)}.") from error
    pixels = (crops + mean).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    images = tuple(
        _describe_image(net, one, seen, {name: values[row] for name, values in maps.items()})
        for row, (one, seen) in enumerate(zip(firsts.values(), pixels, strict=True))
    )
    return FeatureMaps(images, answers.split, found.mark.step)


def read_crops(
    run: Path, data: str, split: str, ids: Sequence[int], found: Checkpoint
) -> tuple[Tensor, Tensor]:
    """Read the center of images as an evaluation of the run does, less the training's mean.

    Returns:
        The images in the order of `ids`, float32 [b, 3, side, side], and the mean that they are
        less, float32 [3, 1, 1] or [3, side, side].

    Raises:
        MissingFigure: an image is damaged or was withdrawn, or there is none.
        DuetError: the data set or DALI is missing.
    """
    # DALI takes seconds to load.
    from cluster.evaluate import find_mean
    from pipeline.batches import Stream

    if not ids:
        raise MissingFigure("There is no sound image.")
    config, _ = read_run_config(run / CONFIG)
    data, folder = locate_dataset(run, data, **config.cached)
    crops = []
    for sample in ids:
        with Stream(
            data,
            split=split,
            version=choose_versions(run, folder),
            batch_size=1,
            position=sample,  # in stored order, where samples have their ids as places
            crop="center",
            size=config.design.image_size,
            mean=find_mean(config, found),
            once=True,
            prefetch=1,
            **config.cached,
        ) as stream:
            batch, mean = next(stream), stream.mean
        if batch.replaced.any() or batch.ids.tolist() != [sample]:
            raise MissingFigure(f"Sample {sample} of {split} is damaged or was withdrawn.")
        crops.append(batch.images.float())
    return torch.cat(crops), torch.from_numpy(mean)


@torch.no_grad()
def compute_maps(net: AlexNet, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return the maps of layers in evaluation mode, in the order of the network.

    Args:
        net: both columns, or the one of a design with one.
        images: float32 [b, 3, side, side], mean subtracted.
        layers: names of layers that are not fully connected.

    Returns:
        float32 [b, columns, maps, side, side] of each layer.
    """
    found: dict[str, Tensor] = {}

    def watch(name: str, x: Tensor) -> None:
        if name in layers:
            found[name] = x.float().unflatten(1, (len(net.columns), -1))

    net.eval()(images, watch)
    return found


def _describe_image(
    net: AlexNet, one: AnsweredImage, seen: Pixels, maps: Mapping[str, Tensor]
) -> MappedImage:
    """Draw the maps of one image, [columns, maps, side, side] of each layer."""
    operations = {
        stage.layer.name: ", ".join(word for word in stage.layer.then if word != "dropout")
        for stage in net.stages
    }
    layers = []
    for name, values in maps.items():
        columns = zip(COLUMN_NAMES, values.numpy(), strict=False)  # one column has no b
        drawn = tuple(_describe_column(*column) for column in columns)
        layers.append(LayerMaps(name, values.shape[-1], operations[name], drawn))
    return MappedImage(
        encode_image(seen, SHOWN_SIDE, QUALITY), one.sample, one.truth, tuple(layers)
    )


def _describe_column(name: str, values: Floats) -> ColumnMaps:
    return ColumnMaps(
        name=name,
        uri=encode_image(draw_maps(values)),
        shown=min(MOST_MAPS, len(values)),
        count=len(values),
        silent=int((values == 0).all(axis=(1, 2)).sum()),
    )


def draw_maps(values: Floats) -> Pixels:
    """Draw the most active maps side by side, each stretched to full contrast.

    Args:
        values: maps of a column, float32 [maps, side, side]; those with the highest mean absolute
            value come first.

    Returns:
        Grey image with an alpha channel, uint8 [height, width, 2], one pixel for each unit, gaps
        clear. 0 is black and the largest value of a map white; in a layer with negative values, 0
        is grey.
    """
    sizes = np.abs(values)
    order = np.argsort(-sizes.mean(axis=(1, 2)), kind="stable")[:MOST_MAPS]
    most = sizes.max(axis=(1, 2), keepdims=True)
    shares = (values / np.maximum(most, 1e-12))[order]
    if values.min() < 0:
        shares = (1 + shares) / 2
    shades = np.round(255 * shares).astype(np.uint8)[..., None]
    return tile_images(shades, min(ACROSS, len(shades)))
